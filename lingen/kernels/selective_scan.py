"""Mamba's selective scan (S6; Gu and Dao 2023, eq. 2 and algorithm 2): pure torch, and mamba-ssm's CUDA kernel.

Shapes: B batch, L tokens, E channels in G groups of e that share B and C, S state channels a channel.
``selective_scan_ref`` defines the truth; ``lingen.kernels.selective_scan_torch`` says how it goes about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lingen.kernels import forms
from lingen.kernels.mamba_package import bare_mamba_package
from lingen.kernels.selective_scan_torch import selective_scan_torch

MAX_ELEMENTS = 2**31 - 1  # some releases of the kernel compute offsets in 32 bits


def selective_scan_ref(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None) -> Tensor:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t`` and ``y_t = h_t C_t + D x_t`` from ``h_0 = 0``, in pure torch.

    Each channel has its own time step and S decay rates, where Mamba2 has one of each for a whole head. Decays and
    states are fp32 (fp64 where x is fp64); no exponent is positive. Deterministic; differentiable once.

    Args:
        x: (B, L, E), any L >= 1.
        dt: (B, L, E), positive (after the softplus).
        A: (E, S), negative.
        B, C: (B, L, G, S). E is a multiple of G; group g serves the channels g*E/G to (g+1)*E/G.
        D: (E,), the skip.

    Returns:
        y (B, L, E) in x's dtype.

    Raises:
        ValueError: an argument has a wrong shape or dtype; the message names it.
    """
    _check(x, dt, A, B, C, D)
    return selective_scan_torch(x, dt, A, B, C, D)


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None) -> Tensor:
    """``selective_scan_ref`` in the form chosen for x's device and dtype: same arguments, result and errors."""
    _check(x, dt, A, B, C, D)
    if forms.chosen("selective_scan", x.device, x.dtype) == "torch":
        return selective_scan_torch(x, dt, A, B, C, D)
    y: Tensor = _scan_mamba_ssm(x, dt, A, B, C, D)
    return y


def selective_scan_flops(length: int, channels: int, d_state: int) -> int:
    """Forward FLOPs of ``selective_scan_ref`` on one sample as matmuls count, 2mnk: the states read by C, 2ES a token.

    The decays, and what a token writes, are elementwise: another 4ES and ES exponentials a token that no counter of
    FLOPs sees, here as for every other elementwise operation of the model.
    """
    return 2 * length * channels * d_state


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    for name, tensor, axes, dims in (("x", x, "(B, L, E)", 3), ("B", B, "(B, L, G, S)", 4)):
        if tensor.dim() != dims or 0 in tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {axes}, each at least 1")
    (batch, length, channels), (groups, d_state) = x.shape, B.shape[2:]
    if channels % groups:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; its G={groups} must divide the E={channels} of x {tuple(x.shape)}"
        )
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "x": (x, (batch, length, channels)),
        "dt": (dt, (batch, length, channels)),
        "A": (A, (channels, d_state)),
        "B": (B, (batch, length, groups, d_state)),
        "C": (C, (batch, length, groups, d_state)),
        "D": (D, (channels,)),
    }
    for name, (given, shape) in expected.items():
        if given is None:
            continue
        if tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; it must be {shape}")
        if not given.is_floating_point():
            raise ValueError(f"{name} {tuple(given.shape)} has dtype {given.dtype}; it must be floating point")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _scan_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    with bare_mamba_package():
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return _scan_in_pieces(selective_scan_fn, x, dt, A, B, C, D, MAX_ELEMENTS)


def _scan_in_pieces(
    kernel: Callable[..., Tensor],
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, max_elements: int,
) -> Tensor:  # fmt: skip
    """``kernel``, which wants tokens last, over pieces none of whose tensors passes ``max_elements``.

    It takes one dtype for all that varies over the tokens, so dt is rounded to x's, as Mamba's own layers do.
    """
    u, steps = x.mT, dt.to(x.dtype).mT  # (B, E, L)
    B, C = (t.to(x.dtype).permute(0, 2, 3, 1) for t in (B, C))  # (B, G, S, L)
    A, D = A.float(), None if D is None else D.float()
    if x.numel() <= max_elements:
        return kernel(u.contiguous(), steps.contiguous(), A, B.contiguous(), C.contiguous(), D).mT.contiguous()
    y: list[list[Tensor]] = [[] for _ in u]
    for b, g, es in _pieces(u.shape, B.shape[1], max_elements):
        part = (t[b : b + 1, es].contiguous() for t in (u, steps))
        shared = (t[b : b + 1, g : g + 1].contiguous() for t in (B, C))
        y[b].append(kernel(*part, A[es], *shared, None if D is None else D[es]))
    return torch.cat([torch.cat(parts, dim=1) for parts in y]).mT.contiguous()


def _pieces(shape: torch.Size, groups: int, max_elements: int) -> Iterator[tuple[int, int, slice]]:
    """Sample, group and channels of each piece of (B, E, L): as many channels of one group as ``max_elements`` hold."""
    batch, channels, length = shape
    per_group = channels // groups
    step = max(1, min(per_group, max_elements // length))
    for b in range(batch):
        for g in range(groups):
            for i in range(g * per_group, (g + 1) * per_group, step):
                yield b, g, slice(i, min(i + step, (g + 1) * per_group))
