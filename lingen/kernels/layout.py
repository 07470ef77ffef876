"""How tensors lie in memory: what the seams ask of it, and how far a kernel must reach."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def last_offset(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first one of a tensor to its last one."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises:
    ValueError: they are not (B, N, h, P) of one floating-point dtype on one device, each row of P together.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (B, N, h, P), each at least 1")
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; "
                f"it must be as q is, {tuple(q.shape)} {q.dtype} on {q.device}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} {tuple(x.shape)} has dtype {x.dtype}; it must be floating point")
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"{name} {tuple(x.shape)} has strides {x.stride()}; the last must be 1")
