"""DeepSpeed at ZeRO levels 0 to 3.

Its own checkpoints are neither atomic nor free of pickle, and bound to a world size, so we use none of them: this file
finds each level's fp32 masters and Adam moments and shows them as fragments. It leans on internals of DeepSpeed
(tested against the version in the constraints file); each such place is in a function of its own level.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from torch import nn

from lingen.config import EngineConfig, OptimConfig
from lingen.dist import Dist
from lingen.engine import DTYPES, AdamState, Fragment, Replicas, decay_groups, make_adam, never

Piece = tuple[str, torch.Size, int, torch.Tensor, int, int]  # parameter, shape, start | flat master, offset, length


class DeepSpeedEngine:
    """``deepspeed.initialize`` with torch's AdamW."""

    def __init__(self, model: nn.Module, config: EngineConfig, optim: OptimConfig, dist: Dist) -> None:
        dist.ensure_group()
        self._dist = dist
        self.zero_stage: int = config.zero_stage
        self._clip = optim.grad_clip
        self._accumulation = config.grad_accumulation
        self._micro = 0  # micro-batches since the last step
        self._params = dict(model.named_parameters())
        self._shapes = {name: p.shape for name, p in self._params.items()}  # ZeRO-3 empties the parameters
        # DeepSpeed makes bf16 masters out of rounded weights. Kept references cost no copy, and mend that below.
        exact = {name: p.data for name, p in self._params.items()} if config.dtype == "bf16" else {}

        groups = [(decay, [self._params[name] for name in names]) for decay, names in decay_groups(model)]
        self._adam = make_adam([(decay, list(params)) for decay, params in groups], optim)
        if dist.device.type == "cpu":
            deepspeed.ops.__compatible_ops__ = {}  # else it compiles a collective for 20 s that training never calls
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # its calls, each time
        with contextlib.redirect_stdout(io.StringIO()):  # prints of memory; its logger's warnings still come through
            self._ds, *_ = deepspeed.initialize(
                model=model,
                optimizer=self._adam,
                config=_settings(config, optim, sum(shape.numel() for shape in self._shapes.values())),
                dist_init_required=False,
            )
        self._refuse: Callable[[float], bool] = never
        self._refused: bool | None = None  # the step under way; None: not asked yet
        if self._is_wrapped:
            self._adam.register_step_pre_hook(self._ask)
        self._state = AdamState(self._adam, self._flat_masters())
        self._replicas = Replicas(dist)
        self._fragments = self._find_fragments()
        for fragment in self._fragments if exact else ():
            piece = exact[fragment.name].flatten()[fragment.start : fragment.start + fragment.master.numel()]
            fragment.master.copy_(piece)
        if exact:
            self.refresh()

    @property
    def model(self) -> nn.Module:
        """DeepSpeed's wrapper around the model."""
        wrapper: nn.Module = self._ds
        return wrapper

    @property
    def steps(self) -> int:
        """Steps taken by AdamW."""
        return self._state.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._state.steps = value

    def backward(self, loss: torch.Tensor) -> None:
        """DeepSpeed averages over the ranks; the multiplication makes that our sum."""
        self._micro += 1
        self._ds.set_gradient_accumulation_boundary(self._micro == self._accumulation)
        self._ds.backward(loss * self._dist.world, scale_wrt_gas=False)

    def step(self, lr: float, refuse: Callable[[float], bool] = never) -> float:
        """See ``Engine.step``."""
        if self._micro != self._accumulation:
            raise RuntimeError(
                f"{self._micro} micro-batches before a step, not engine.grad_accumulation={self._accumulation}"
            )
        self._micro = 0
        self._state.set_lr(lr)
        if not self._is_wrapped:
            return self._step_unwrapped(refuse)
        self._refuse, self._refused = refuse, None
        self._ds.step()
        # A norm that is not finite leaves that of an earlier step behind.
        return float(self._ds.get_global_grad_norm()) if self._ds.was_step_applied() else math.inf

    def fragments(self) -> list[Fragment]:
        """What this rank's optimizer holds; at level 0, where all hold all, its slice of that."""
        return self._fragments

    @torch.no_grad()
    def refresh(self) -> None:
        """As DeepSpeed does it after a step, level by level."""
        optimizer = self._ds.optimizer
        if self.zero_stage == 0:
            self._replicas.share()
            if self._is_bf16:
                for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                    torch._foreach_copy_([p.data for p in lows], [m.data for m in masters])
        elif self.zero_stage < 3:
            optimizer.update_lp_params()
        else:
            optimizer._partition_all_parameters()
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:  # small ones stay gathered between steps
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def close(self) -> None:
        """Undo the hooks, and one reference that ZeRO-3 keeps in a list of its module for ever."""
        self._ds.destroy()
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self._ds.module]
        self.__dict__.clear()

    @property
    def _is_bf16(self) -> bool:
        return bool(self._ds.bfloat16_enabled())

    @property
    def _is_wrapped(self) -> bool:
        """Whether AdamW sits inside an optimizer of DeepSpeed's."""
        return self.zero_stage > 0 or self._is_bf16

    def _ask(self, adam: torch.optim.Optimizer, *_: object) -> None:
        """Before AdamW's step, when DeepSpeed has the norm: AdamW leaves alone what has no gradient.

        DeepSpeed calls AdamW for one group after the other, each time with that group alone.
        """
        if self._refused is None:
            self._refused = self._refuse(float(self._ds.optimizer._global_grad_norm))
        if self._refused:
            adam.zero_grad(set_to_none=True)

    def _step_unwrapped(self, refuse: Callable[[float], bool]) -> float:
        """Level 0 in fp32 has no optimizer of DeepSpeed's that would report the norm or refuse an infinite one."""
        grads = [p.grad for p in self._params.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if math.isfinite(norm) and not refuse(norm):
            torch._foreach_mul_(grads, min(1.0, self._clip / (norm + 1e-6)))
            self._ds.step()
        else:
            self._ds.zero_grad()
        return norm

    def _flat_masters(self) -> list[torch.Tensor]:
        """The fp32 tensors that AdamW updates on this rank."""
        optimizer = self._ds.optimizer
        if self.zero_stage == 0:
            return (
                [m for group in optimizer.fp32_groups for m in group] if self._is_bf16 else list(self._params.values())
            )
        if self.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(self._partitions())

    def _partitions(self) -> list[torch.Tensor]:
        """Levels 1 and 2: one flat partition a group. Level 1 in bf16 with fp32 gradients is a class of its own."""
        optimizer = self._ds.optimizer
        name = (
            "fp32_groups_flat_partition"
            if hasattr(optimizer, "fp32_groups_flat_partition")
            else "single_partition_of_fp32_groups"
        )
        flat: list[torch.Tensor] = getattr(optimizer, name)
        return flat

    def _find_fragments(self) -> list[Fragment]:
        if self.zero_stage == 0:
            for name, master in self._replicated():
                self._replicas.add(name, self._shapes[name], self._state.views(master, 0, master.numel()))
            return self._replicas.owned
        pieces = self._pieces_of_level_3() if self.zero_stage == 3 else self._pieces_of_levels_1_and_2()
        return [
            Fragment(name, tuple(shape), start, *self._state.views(flat, offset, length))
            for name, shape, start, flat, offset, length in pieces
        ]

    def _replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Level 0: each parameter's whole master."""
        if not self._is_bf16:
            yield from self._params.items()
            return
        names = {id(p): name for name, p in self._params.items()}
        for lows, masters in zip(self._ds.optimizer.fp16_groups, self._ds.optimizer.fp32_groups, strict=True):
            yield from ((names[id(low)], master) for low, master in zip(lows, masters, strict=True))

    def _pieces_of_levels_1_and_2(self) -> Iterator[Piece]:
        """DeepSpeed notes on each parameter which part of it lies where in this rank's partition."""
        partitions = self._partitions()
        for name, p in self._params.items():
            mapping = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:  # else no part of it is ours
                here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                yield (
                    name,
                    self._shapes[name],
                    here.start,
                    partitions[mapping.param_group_index],
                    there.start,
                    there.numel,
                )

    def _pieces_of_level_3(self) -> Iterator[Piece]:
        """Each parameter is cut into equal parts, the last one padded."""
        optimizer = self._ds.optimizer
        for name, p in self._params.items():
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(p)]
            start = self._dist.rank * padded
            length = min(padded, self._shapes[name].numel() - start)
            if length > 0:
                yield name, self._shapes[name], start, optimizer.fp32_partitioned_groups_flat[group], offset, length


def _settings(config: EngineConfig, optim: OptimConfig, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes vary from bucket to bucket, and only scale what we do not use."""
    is_bf16 = DTYPES[config.dtype] == torch.bfloat16
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.grad_accumulation,
        "gradient_clipping": 0.0 if config.zero_stage == 0 and not is_bf16 else optim.grad_clip,
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": min(parameters, 500_000_000)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_bf16, "check_grad_overflow": True},
        "steps_per_print": None,
    }
    if is_bf16 and config.zero_stage > 0:
        # Micro-batches and ranks add up in fp32. Level 0 knows only bf16 gradients.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings
