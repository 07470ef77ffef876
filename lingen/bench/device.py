"""What a benchmark runs on: its clock, its peak, and how much memory something takes there."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch

from lingen.bench.timing import Clock, cpu_seconds
from lingen.errors import UserError
from lingen.memory import Live

# Dense bf16 FLOP/s with fp32 accumulation, from the makers' data sheets, by what the name of a device begins with;
# the first that fits.
PEAKS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
}
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}

T = TypeVar("T")


def find_device(wanted: str) -> torch.device:
    """'auto': a GPU where there is one. On a CPU this process takes one thread from now on.

    Raises:
        UserError: a GPU was asked for, and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no GPU here; set device=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(1)
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def dtype_of(wanted: str, device: torch.device) -> str:
    """'auto': bf16 on a GPU, fp32 on a CPU."""
    return wanted if wanted != "auto" else "bf16" if device.type == "cuda" else "fp32"


def name_of(device: torch.device) -> str:
    """The GPU's name, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that the device could do, and where the figure is from: the data sheet, or a matrix product run now."""
    listed = next((peak for name, peak in PEAKS.items() if name_of(device).startswith(name)), None)
    if listed is not None and dtype == torch.bfloat16:
        return listed, "data sheet"
    side = MATMUL_SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    clock = clock_of(device)
    torch.mm(a, b)
    seconds = min(clock(lambda: torch.mm(a, b)) for _ in range(5))
    return 2 * side**3 / seconds, f"matmul of {side}, measured"


@contextlib.contextmanager
def fitting(what: str, device: torch.device) -> Iterator[None]:
    """Raises:
    UserError: ``what`` is measured inside, and takes more memory than the device has.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU is one
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"{what} does not fit the memory of {name_of(device)}: {error}") from error
        raise


def clock_of(device: torch.device) -> Clock:
    """CUDA events on a GPU, the process's CPU time on a CPU."""
    return _event_seconds if device.type == "cuda" else cpu_seconds


def _event_seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class Meter(Protocol):
    """Measures memory."""

    def run(self, call: Callable[[], T]) -> tuple[T, int, int]:
        """What ``call`` returns, the bytes that stay with it, and the most that it held at once."""
        ...


def meter_of(device: torch.device) -> Meter:
    """The allocator's own count on a GPU, the bytes of live tensors on a CPU."""
    return GpuMeter(device) if device.type == "cuda" else CpuMeter()


class CpuMeter:
    """Counts tensors that are made or read while it runs something; slow, so never while a clock runs."""

    def __init__(self) -> None:
        self._live = Live("cpu")

    def run(self, call: Callable[[], T]) -> tuple[T, int, int]:
        gc.collect()
        before = self._live.peak = self._live.bytes
        with self._live:
            value = call()
        gc.collect()
        return value, self._live.bytes - before, self._live.peak - before


class GpuMeter:
    """``torch.cuda.max_memory_allocated``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def run(self, call: Callable[[], T]) -> tuple[T, int, int]:
        gc.collect()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        value = call()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        gc.collect()
        return value, torch.cuda.memory_allocated(self._device) - before, peak - before
