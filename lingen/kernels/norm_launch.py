"""How the norms' Triton kernels are cut and launched: what the three files of them share.

Shapes: rows of one reduction each, in programs of ``count`` rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # that share the rows of a backward: several for each processor of a GPU, few beside the rows


def wide(given: Tensor) -> torch.dtype:
    """What a kernel computes in, and sums partial sums in."""
    return torch.promote_types(given.dtype, torch.float32)


def options(given: Tensor, width: int) -> dict[str, object]:
    """The constants of a kernel whose program holds rows of ``width`` numbers."""
    block = triton.next_power_of_2(width)
    return {
        "BLOCK": block,
        "WIDE": tl.float64 if wide(given) == torch.float64 else tl.float32,
        "num_warps": min(max(block // 512, 1), 16),  # 16 numbers of a row a thread; a backward holds some eight rows
        "maxnreg": 128,  # 512 threads at once on a processor of an H100, none of whose registers spills
    }


def shares(rows: int, programs: int | None = None) -> tuple[int, int]:
    """Rows a program takes, and how many programs that makes: at most ``programs``, or ``PROGRAMS``."""
    count = triton.cdiv(rows, programs or PROGRAMS)
    return count, triton.cdiv(rows, count)


def dense(gradient: Tensor) -> Tensor:
    """``gradient`` with contiguous channels, which one that was broadcast or transposed does not have."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()
