"""Plain torch: replicated weights, gradients summed over the ranks before each step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from lingen.config import EngineConfig, OptimConfig
from lingen.dist import Dist
from lingen.engine import DTYPES, AdamState, Fragment, Replicas, decay_groups, make_adam, never


class TorchEngine:
    """AdamW over one flat fp32 master a group (decayed or not).

    In fp32 the parameters and their gradients are views of the flat ones, so nothing is copied. In bf16 each
    micro-batch's gradients are added to the flat fp32 ones, and the parameters follow the masters after a step.
    """

    zero_stage = 0

    def __init__(self, model: nn.Module, config: EngineConfig, optim: OptimConfig, dist: Dist) -> None:
        self._model = model
        self._dist = dist
        self._clip = optim.grad_clip
        self._dtype = DTYPES[config.dtype]
        self._params: list[nn.Parameter] = []
        self._weights: list[torch.Tensor] = []  # each parameter's piece of its flat master, in its shape
        self._grads: list[torch.Tensor] = []  # the same of the flat gradient
        self._flat_grads: list[torch.Tensor] = []
        self._replicas = Replicas(dist)

        named = dict(model.named_parameters())
        groups = [(decay, [named[name] for name in names]) for decay, names in decay_groups(model)]
        masters = [nn.Parameter(torch.cat([p.data.float().flatten() for p in params])) for _, params in groups]
        adam = make_adam([(decay, [m]) for (decay, _), m in zip(groups, masters, strict=True)], optim)
        self._adam = adam
        self._state = AdamState(adam, list(masters))
        names = {id(p): name for name, p in named.items()}
        for (_, params), master in zip(groups, masters, strict=True):
            master.grad = torch.zeros_like(master)
            self._flat_grads.append(master.grad)
            offset = 0
            for p in params:
                views = self._state.views(master, offset, p.numel())
                self._replicas.add(names[id(p)], p.shape, views)
                self._params.append(p)
                self._weights.append(views[0].view(p.shape))
                self._grads.append(master.grad.narrow(0, offset, p.numel()).view(p.shape))
                offset += p.numel()
        for p, weight, grad in zip(self._params, self._weights, self._grads, strict=True):
            if self._dtype == torch.float32:
                p.data, p.grad = weight, grad
            else:
                p.data = weight.to(self._dtype)

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self._model

    @property
    def steps(self) -> int:
        """Steps taken by AdamW."""
        return self._state.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._state.steps = value

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's gradients to the flat fp32 ones."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self._dtype != torch.float32:
            for p, grad in zip(self._params, self._grads, strict=True):
                if p.grad is not None:
                    grad.add_(p.grad)
                    p.grad = None

    @torch.no_grad()
    def step(self, lr: float, refuse: Callable[[float], bool] = never) -> float:
        """Sum over ranks, clip, AdamW, zero the gradients; see ``Engine.step``."""
        for flat in self._flat_grads:
            self._dist.all_reduce_sum(flat)
        norm = float(torch.nn.utils.get_total_norm(self._grads))
        if math.isfinite(norm) and not refuse(norm):
            torch._foreach_mul_(self._flat_grads, min(1.0, self._clip / (norm + 1e-6)))
            self._state.set_lr(lr)
            self._adam.step()
            self._follow()
        torch._foreach_zero_(self._flat_grads)
        return norm

    def fragments(self) -> list[Fragment]:
        """This rank's slice of every parameter."""
        return self._replicas.owned

    def refresh(self) -> None:
        """Share the slices, then let the parameters follow."""
        self._replicas.share()
        self._follow()

    def close(self) -> None:
        """Drop the flat tensors; nothing but this object and the model refers to them."""
        self.__dict__.clear()

    def _follow(self) -> None:
        if self._dtype != torch.float32:
            torch._foreach_copy_([p.data for p in self._params], self._weights)
