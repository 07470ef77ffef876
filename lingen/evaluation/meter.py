"""What one generation takes: seconds, FLOPs that were executed, bytes at the peak.

Shapes: B videos; latents (R, C, T, h, w), R = 2B where guidance makes pairs.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lingen.models import Backbone
from lingen.models.embed import token_grid

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Meter:
    """Readings of one generation; ``flops`` counts whole forwards of the model, those that no cache stands for."""

    flops: int = 0
    began: float | None = None  # when the model was first entered
    ended: float | None = None  # when the last step was done
    seconds: float = 0.0
    peak_memory: int | None = None

    @property
    def denoise_seconds(self) -> float:
        """Of the loop over the steps."""
        assert self.began is not None and self.ended is not None
        return self.ended - self.began


@contextmanager
def metered(model: Backbone, device: torch.device) -> Iterator[Meter]:
    """Measure what happens inside. Waits for the device twice: before the first step and at the end."""
    meter = Meter()

    def entered(module: nn.Module, arguments: Any) -> None:
        if meter.began is None:
            meter.began = now(device)

    def forwarded(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        latents, text = arguments[0], arguments[2]
        meter.flops += forward_flops(model, latents.shape, text)

    # The patch embedding runs in every call, whatever a cache skips.
    hooks = [model.patch_in.register_forward_pre_hook(entered), model.register_forward_hook(forwarded)]
    reset_peak(device)
    start = now(device)
    try:
        yield meter
    finally:
        for hook in hooks:
            hook.remove()
    meter.seconds = now(device) - start
    meter.peak_memory = read_peak(device)


def forward_flops(model: Backbone, shape: torch.Size, text: Mapping[str, torch.Tensor]) -> int:
    """Of one forward of latents (R, C, T, h, w), by the model's own count."""
    grid = token_grid(tuple(shape[2:]), model.patch)  # type: ignore[arg-type]
    return shape[0] * model.flops(grid, {name: states.shape[1] for name, states in text.items()})


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far: of the device's tensors, or, on a CPU, of the process (Linux can)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.exists():
        RESET.write_text("5")


def read_peak(device: torch.device) -> int | None:
    """Bytes since ``reset_peak``; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not (RESET.exists() and STATUS.exists()):
        return None
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0].split()[1]) if lines else None


def machine(device: torch.device) -> str:
    """What latencies were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
