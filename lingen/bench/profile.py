"""Where the time of one LinGen block goes: the kernels that take the most of it, in a forward and in both passes.

Shapes: one sample of N tokens of the grid (T, H, W), D d_model, L text tokens.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lingen.bench.workload import TEXT_LENGTH, bench_config, leave_no_zeros
from lingen.engine import DTYPES
from lingen.kernels.index import Grid
from lingen.models import make_model

LAYER = 1  # the first whose windows are shifted
CALLS = 3
TOP = 15


def run(size: str, grid: Grid, device: torch.device, dtype: str, text_tokens: int) -> list[dict[str, Any]]:
    """A row for each of the kernels (on a CPU: operations) that take the most time, forward and then both passes."""
    words = (f"engine.dtype={dtype}", f"size.depth.lingen={LAYER + 1}", f"{TEXT_LENGTH}={text_tokens}")
    config = bench_config("lingen", size, *words)
    torch.manual_seed(0)
    with device:
        model = make_model(config).to(DTYPES[dtype])
        leave_no_zeros(model)
        block, width = model.blocks[LAYER], config.size.d_model
        x, weight = torch.randn(2, 1, prod(grid), width, dtype=DTYPES[dtype])  # (1, N, D) each
        text = torch.randn(1, text_tokens, width, dtype=DTYPES[dtype])
        modulation = torch.randn(1, 6, width, dtype=DTYPES[dtype])
        mask = torch.ones(1, text_tokens, dtype=torch.bool)
    x.requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            block(x, grid, modulation, text, mask)

    def both() -> None:
        torch.autograd.grad(block(x, grid, modulation, text, mask), [x, *block.parameters()], weight)

    return [
        {"pass": name, **row} for name, call in (("forward", forward), ("both", both)) for row in _top(call, device)
    ]


def _top(call: Any, device: torch.device) -> list[dict[str, Any]]:
    call()  # compiles and tunes
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in recorded.key_averages()
        if event.device_type == kind
    }
    total = sum(microseconds for microseconds, _ in times.values())
    top = sorted(times.items(), key=lambda item: -item[1][0])[:TOP]
    return [
        {
            "kernel": name,
            "calls": count // CALLS,
            "ms": us / 1e3 / CALLS,
            "share": us / total,
            "total_ms": total / 1e3 / CALLS,
        }
        for name, (us, count) in top
    ]
