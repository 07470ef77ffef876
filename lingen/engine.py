"""Backward and step behind one small interface: plain torch, or DeepSpeed at any ZeRO level.

Both keep fp32 master weights and Adam moments as flat tensors, and show the pieces that this rank owns as
``Fragment``s. Checkpoints and the weight average see nothing but those, so they do not care who trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from lingen.config import EngineConfig, OptimConfig
from lingen.dist import Dist
from lingen.errors import UserError
from lingen.kernels import forms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_forms(kernels: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Take these forms of the kernels, and the fastest of the others. Returns the form of each.

    Raises:
        UserError: a form was asked for that this machine does not have, or not in ``dtype``.
    """
    try:
        forms.ask(kernels, device, dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    return {kernel: forms.chosen(kernel, device, dtype) for kernel in forms.FORMS}


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one parameter that this rank owns; over all ranks they cover each parameter once.

    The tensors are live fp32 views of the optimizer's memory, each (elements,): what is written there is trained on
    once ``Engine.refresh`` has run.
    """

    name: str  # of the parameter in the bare model
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # of this piece in the flattened parameter
    master: torch.Tensor  # (elements,) fp32 weights
    exp_avg: torch.Tensor  # (elements,) first Adam moment
    exp_avg_sq: torch.Tensor  # (elements,) second Adam moment


def never(norm: float) -> bool:
    """Refuse no step whose gradient is finite."""
    return False


class Engine(Protocol):
    """Trains a model. ``backward``, ``step`` and ``refresh`` are collectives: all ranks call them, in one order.

    Convention: the gradient is the SUM over micro-batches and ranks of d loss; whoever wants a mean divides the loss.
    Parameters and their gradients are in the compute precision (``engine.dtype``), buffers stay as they are.
    """

    steps: int  # taken by AdamW so far, for its bias correction; set it when moments are loaded
    zero_stage: int

    @property
    def model(self) -> nn.Module:
        """What to call for a forward pass, in training and in validation."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's scalar loss; ``engine.grad_accumulation`` of them make a step."""
        ...

    def step(self, lr: float, refuse: Callable[[float], bool] = never) -> float:
        """Clip to ``optim.grad_clip``, take an AdamW step, zero the gradients.

        Returns the global gradient norm before clipping. Where it is not finite, or ``refuse`` says so of it, weights,
        moments and the count of steps stay what they were. ``refuse`` is asked once, where the norm is finite, and must
        answer the same on every rank.
        """
        ...

    def fragments(self) -> list[Fragment]:
        """The pieces that this rank owns; always the same views."""
        ...

    def refresh(self) -> None:
        """Make all ranks' compute-precision weights follow the fragments, after these were written."""
        ...

    def close(self) -> None:
        """Let go of the model and its memory, before the next stage's engine is made. It cannot be used afterwards."""
        ...


def make_engine(model: nn.Module, config: EngineConfig, optim: OptimConfig, dist: Dist) -> Engine:
    """Move ``model`` to its device and precision and wrap it. All ranks start from rank 0's weights.

    Raises:
        ValueError: the model has frozen parameters or persistent buffers, which no checkpoint of ours would hold.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    saved = set(model.state_dict().keys()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if frozen or saved:
        raise ValueError(f"only trained parameters are saved, yet the model has {sorted(saved.union(frozen))}")
    model.to(dist.device)
    for parameter in model.parameters():
        dist.broadcast(parameter.data)
    if config.kind == "torch":
        from lingen.engines.plain import TorchEngine

        return TorchEngine(model, config, optim, dist)
    from lingen.engines.zero import DeepSpeedEngine  # imports deepspeed: slow

    return DeepSpeedEngine(model, config, optim, dist)


def decay_groups(model: nn.Module) -> list[tuple[bool, list[str]]]:
    """Parameter names, first those that weight decay applies to, then the others; an empty group is left out.

    Decay shrinks the matrices that multiply activations. Biases, norm gains and state-space rates (1-D, or named
    'scale' or 'A_log') and look-up tables (``nn.Embedding``, or named 'table') are not such.
    """
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[str] = []
    plain: list[str] = []
    for name, parameter in model.named_parameters():
        is_exempt = id(parameter) in lookups or name.endswith(("scale", "table", "A_log"))
        (plain if is_exempt or parameter.ndim < 2 else decayed).append(name)
    return [(decay, names) for decay, names in ((True, decayed), (False, plain)) if names]


def make_adam(groups: list[tuple[bool, list[torch.Tensor]]], optim: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over (decayed?, tensors) groups. Its learning rate is set at each step."""
    return torch.optim.AdamW(
        [{"params": tensors, "weight_decay": optim.weight_decay if decay else 0.0} for decay, tensors in groups],
        lr=0.0,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


class AdamState:
    """AdamW's moments and step counts, which exist from the start, so that a checkpoint can be loaded before a step."""

    def __init__(self, adam: torch.optim.AdamW, masters: list[torch.Tensor]) -> None:
        self._adam = adam
        self._masters = masters
        for master in masters:
            adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def views(self, master: torch.Tensor, offset: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(weights, first moment, second moment) of ``length`` elements from ``offset`` of one flat master."""
        state = self._adam.state[master]
        whole = (master.detach().view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        weights, first, second = (tensor.narrow(0, offset, length) for tensor in whole)
        return weights, first, second

    def set_lr(self, lr: float) -> None:
        """The learning rate of every group."""
        for group in self._adam.param_groups:
            group["lr"] = lr

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self._adam.state[self._masters[0]]["step"])

    @steps.setter
    def steps(self, value: int) -> None:
        for master in self._masters:
            self._adam.state[master]["step"].fill_(value)


class Replicas:
    """Masters that every rank holds whole: each owns an equal slice of each parameter, for saving and averaging."""

    def __init__(self, dist: Dist) -> None:
        self._dist = dist
        self._whole: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.owned: list[Fragment] = []

    def add(self, name: str, shape: torch.Size, views: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """One parameter with its (weights, first moment, second moment), each (numel,)."""
        self._whole.append(views)
        start, length = self._slice(views[0].numel(), self._dist.rank)
        if length:
            weights, first, second = (view.narrow(0, start, length) for view in views)
            self.owned.append(Fragment(name, tuple(shape), start, weights, first, second))

    def share(self) -> None:
        """Give every rank what the owners hold. Collective."""
        for views in self._whole:
            for source in range(self._dist.world):
                start, length = self._slice(views[0].numel(), source)
                for view in views if length else ():
                    self._dist.broadcast(view.narrow(0, start, length), source)

    def _slice(self, numel: int, rank: int) -> tuple[int, int]:
        each = -(-numel // self._dist.world)
        start = min(rank * each, numel)
        return start, min(each, numel - start)
