"""Mamba2's state-space scan (SSD; Dao and Gu 2024, section 6): one seam, a pure-torch form and mamba-ssm's kernels.

Shapes: B batch, L tokens, H heads, P channels a head, G groups of heads that share B and C, N state channels a head.
``ssd_ref`` defines the truth and is what trains on a CPU; ``lingen.kernels.ssd_torch`` says how it goes about it, and
``lingen.kernels.ssd_mamba`` what mamba-ssm's kernels can take.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from lingen.kernels import forms
from lingen.kernels.ssd_mamba import scan_mamba_ssm
from lingen.kernels.ssd_torch import scan_torch


@overload
def ssd_ref(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int,
    D: Tensor | None = ..., initial_states: Tensor | None = ..., return_final_states: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ssd_ref(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int,
    D: Tensor | None = ..., initial_states: Tensor | None = ..., return_final_states: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def ssd_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    D: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T`` and ``y_t = S_t C_t + D x_t``, in pure torch.

    Decays and states are fp32 (fp64 where x is fp64); no exponent is positive. Deterministic; differentiable once.

    Args:
        x: (B, L, H, P), any L >= 1.
        dt: (B, L, H), positive (after the softplus).
        A: (H,), negative.
        B, C: (B, L, G, N). H is a multiple of G; group g serves the heads g*H/G to (g+1)*H/G.
        chunk_size: tokens that are treated as dense algebra; it changes the cost, not the result.
        D: (H,) or (H, P), the skip.
        initial_states: (B, H, P, N); zero where absent.

    Returns:
        y (B, L, H, P) in x's dtype; with ``return_final_states`` also the states after the last token (B, H, P, N).

    Raises:
        ValueError: an argument has a wrong shape or dtype; the message names it.
    """
    _check(x, dt, A, B, C, D, initial_states, chunk_size)
    y, states = scan_torch(x, dt, A, B, C, D, initial_states, chunk_size)
    return (y, states) if return_final_states else y


@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int,
    D: Tensor | None = ..., initial_states: Tensor | None = ..., return_final_states: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int,
    D: Tensor | None = ..., initial_states: Tensor | None = ..., return_final_states: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    D: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``ssd_ref`` in the form chosen for x's device and dtype: same arguments, result and errors."""
    _check(x, dt, A, B, C, D, initial_states, chunk_size)
    if forms.chosen("ssd", x.device, x.dtype) == "torch":
        y, states = scan_torch(x, dt, A, B, C, D, initial_states, chunk_size)
    else:
        y, states = scan_mamba_ssm(x, dt, A, B, C, D, initial_states, chunk_size)
    return (y, states) if return_final_states else y


def ssd_flops(length: int, heads: int, head_dim: int, groups: int, d_state: int, chunk_size: int) -> int:
    """Forward FLOPs of ``ssd_ref`` on one sample: its matmuls, 2mnk each. A ragged last chunk costs what it is long."""
    flops = 0
    for q, chunks in ((chunk_size, length // chunk_size), (length % chunk_size, 1)):
        scores = groups * 2 * q * q * d_state  # C B^T, once a group
        mixing = heads * 2 * q * q * head_dim
        states = heads * 4 * q * d_state * head_dim  # what the chunk writes into the state, and what it reads
        flops += chunks * (scores + mixing + states)
    return flops


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, chunk_size: int
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    for name, tensor, axes in (("x", x, "(B, L, H, P)"), ("B", B, "(B, L, G, N)")):
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {axes}, each at least 1")
    (batch, length, heads, head_dim), (groups, d_state) = x.shape, B.shape[2:]
    if heads % groups:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; its G={groups} must divide the H={heads} of x {tuple(x.shape)}"
        )
    expected: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "x": (x, [(batch, length, heads, head_dim)]),
        "dt": (dt, [(batch, length, heads)]),
        "A": (A, [(heads,)]),
        "B": (B, [(batch, length, groups, d_state)]),
        "C": (C, [(batch, length, groups, d_state)]),
        "D": (D, [(heads,), (heads, head_dim)]),
        "initial_states": (initial, [(batch, heads, head_dim, d_state)]),
    }
    for name, (given, shapes) in expected.items():
        if given is None:
            continue
        if tuple(given.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; it must be {' or '.join(map(str, shapes))}")
        if not given.is_floating_point():
            raise ValueError(f"{name} {tuple(given.shape)} has dtype {given.dtype}; it must be floating point")
