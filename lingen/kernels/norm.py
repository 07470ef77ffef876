"""Norms with what stands next to them: the gate behind the scan, adaLN's modulation, the rotation of queries and keys.

Shapes: B batch, N tokens in natural order, R review tokens, M = R + N scan positions, D d_model, h heads of P channels
(of the scan: of each of its two directions), E = h*P, d 1 where both directions share a gate and 2 where each has its
own. Each ``_ref`` defines the truth, runs anywhere, and is what trains on a CPU. The Triton forms compute in fp32 (fp64
where the input is), write nothing but their results, and sum gradients in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lingen.kernels import forms
from lingen.kernels.index import ScanIndex, gather_rows

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, (N, 1, 1, P) each


# ------------------------------------------------------------------------------------ behind the scan


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, index: ScanIndex, *, eps: float) -> Tensor:
    """The scan's two directions, read back into natural order, gated and RMS-normed (Mamba2's gated norm).

    With one gate (d = 1) the directions are added before it: ``RMSNorm((y_f + y_b) * silu(z)) * weight``. With two,
    each is gated and normed by itself: ``[RMSNorm(y_f * silu(z_f)), RMSNorm(y_b * silu(z_b))] * weight``.

    Args:
        y: (B, M, 2h, P) in scan order: the forward heads, then the backward heads, mirrored as ``index`` says.
        z: (B, N, d*E) in natural order; any strides but the last, which is 1.
        weight: (d*E,).
        index: the scan's order.
        eps: added to the mean square.

    Returns:
        (B, N, d*E) in natural order, in y's dtype.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device; the message names it.
    """
    _check_gated(y, z, weight, index)
    if forms.chosen("norm", y.device) == "triton":
        from lingen.kernels.norm_gated_triton import gated_norm_triton

        fused: Tensor = gated_norm_triton(y, z, weight, index, eps)
        return fused
    return gated_norm_ref(y, z, weight, index, eps=eps)


def gated_norm_ref(y: Tensor, z: Tensor, weight: Tensor, index: ScanIndex, *, eps: float) -> Tensor:
    """``gated_norm`` in pure torch."""
    if z.shape[-1] == y.shape[2] // 2 * y.shape[3]:
        return gate_ref(merge_directions_ref(y, index).flatten(2), z, weight, eps=eps)
    return gate_ref(split_directions_ref(y, index).flatten(3), z, weight, eps=eps)


def gate_ref(y: Tensor, z: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """What ``gated_norm`` does once y is in natural order: y (B, N, E), the directions' sum, or (B, N, 2, E), both;
    z (B, N, d*E), weight (d*E,) -> (B, N, d*E)."""
    width = y.shape[-1:]
    if y.ndim == 3:
        return F.rms_norm(y * F.silu(z), width, weight, eps).to(y.dtype)
    gate = torch.unflatten(F.silu(z), -1, (2, -1))  # (B, N, 2, E)
    return (F.rms_norm(y * gate, width, eps=eps) * weight.view(2, -1)).flatten(2).to(y.dtype)


def merge_directions(y: Tensor, index: ScanIndex) -> Tensor:
    """The sum of the scan's two directions, y (B, M, 2h, P) in scan order -> (B, N, h, P) in natural order.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device; the message names it.
    """
    _check_scanned(y, index)
    if forms.chosen("norm", y.device) == "triton":
        from lingen.kernels.norm_gated_triton import merge_directions_triton

        fused: Tensor = merge_directions_triton(y, index)
        return fused
    return merge_directions_ref(y, index)


def merge_directions_ref(y: Tensor, index: ScanIndex) -> Tensor:
    """``merge_directions`` in pure torch."""
    forward, backward = _aligned(y, index)
    return _unscan(forward + backward, index)


def split_directions(y: Tensor, index: ScanIndex) -> Tensor:
    """The scan's two directions apart, y (B, M, 2h, P) in scan order -> (B, N, 2, h, P) in natural order.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device; the message names it.
    """
    _check_scanned(y, index)
    if forms.chosen("norm", y.device) == "triton":
        from lingen.kernels.norm_gated_triton import split_directions_triton

        fused: Tensor = split_directions_triton(y, index)
        return fused
    return split_directions_ref(y, index)


def split_directions_ref(y: Tensor, index: ScanIndex) -> Tensor:
    """``split_directions`` in pure torch."""
    return _unscan(torch.stack(_aligned(y, index), dim=2), index)


def _aligned(y: Tensor, index: ScanIndex) -> tuple[Tensor, Tensor]:
    """Both directions without the reviews and in the forward direction's order: (B, N, h, P) each."""
    forward, backward = torch.unflatten(y[:, index.reviews :], 2, (2, -1)).unbind(2)
    return forward, backward.flip(1)


def _unscan(tokens: Tensor, index: ScanIndex) -> Tensor:
    """(B, N, ...) from the forward direction's order into natural order."""
    place, source = index.place[index.reviews :] - index.reviews, index.source[index.reviews :] - index.reviews
    return gather_rows(tokens, place, source)


# ------------------------------------------------------------------------------------ adaLN


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift``, the norm without parameters (adaLN; DiT, section 3.2).

    Args:
        x: (B, N, D); any strides but the last, which is 1.
        shift, scale: (B, 1, D), likewise.
        eps: added to the variance.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device; the message names it.
    """
    _check_modulate(x, shift, scale)
    if forms.chosen("norm", x.device) == "triton":
        from lingen.kernels.norm_modulate_triton import modulate_triton

        fused: Tensor = modulate_triton(x, shift, scale, eps)
        return fused
    return modulate_ref(x, shift, scale, eps=eps)


def modulate_ref(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """``modulate`` in pure torch."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale).to(x.dtype)


# ------------------------------------------------------------------------------------ queries and keys


def norm_rotate(qkv: Tensor, scale: Tensor, table: Rotation, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, RMS-normed over their channels, scaled, and rotated by position (RoFormer, eq. 34).

    Channels (i, i + P/2) are a pair: ``out = x * cosines + roll(x, P/2) * signed_sines``. One call gives q, k and v, so
    that their gradients are joined into that of qkv by one write.

    Args:
        qkv: (B, N, 3, h, P), P even; any strides but the last, which is 1.
        scale: (2, 1, P), of q and of k.
        table: cosines and signed sines, (N, 1, 1, P) each; constants, without a gradient.
        eps: added to the mean square.

    Returns:
        q, k, v (B, N, h, P) in qkv's dtype; v is a view of qkv.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device; the message names it.
    """
    _check_rotate(qkv, scale, table)
    if forms.chosen("norm", qkv.device) == "triton":
        from lingen.kernels.norm_rotate_triton import norm_rotate_triton

        fused: tuple[Tensor, Tensor, Tensor] = norm_rotate_triton(qkv, scale, table, eps)
        return fused
    return norm_rotate_ref(qkv, scale, table, eps=eps)


def norm_rotate_ref(qkv: Tensor, scale: Tensor, table: Rotation, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``norm_rotate`` in pure torch."""
    qk, v = torch.split(qkv, [2, 1], dim=2)  # (B, N, 2, h, P), (B, N, 1, h, P)
    qk = F.rms_norm(qk, qk.shape[-1:], eps=eps) * scale
    cosines, signed_sines = table
    qk = torch.addcmul(qk * cosines, qk.roll(qk.shape[-1] // 2, dims=-1), signed_sines)
    q, k = qk.to(qkv.dtype).unbind(2)
    return q, k, v.squeeze(2)


# ------------------------------------------------------------------------------------ bad input


def _check(name: str, given: Tensor, right: bool, must: str, device: torch.device) -> None:
    """The shape is ``right``, and it holds floating point numbers, with dense channels, on ``device``."""
    if not right or 0 in given.shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; it must be {must}")
    if not given.is_floating_point():
        raise ValueError(f"{name} {tuple(given.shape)} has dtype {given.dtype}; it must be floating point")
    if given.stride(-1) != 1 and given.shape[-1] > 1:
        raise ValueError(f"{name} {tuple(given.shape)} has strides {given.stride()}; the last must be 1")
    if given.device != device:
        raise ValueError(f"{name} {tuple(given.shape)} is on {given.device}; it must be on {device}")


def _check_scanned(y: Tensor, index: ScanIndex) -> None:
    _check("y", y, y.dim() == 4, "(B, M, 2h, P), each at least 1", y.device)
    length, heads, channels = y.shape[1:]
    if heads % 2 or length != index.source.shape[0] or index.tokens < 1:
        raise ValueError(
            f"y has shape {tuple(y.shape)}; it must be (B, M, 2h, P): an even number of heads, and the index's "
            f"M = R + N = {index.reviews} + {index.tokens} positions, N at least 1"
        )
    if y.stride(2) != channels:
        raise ValueError(f"y {tuple(y.shape)} has strides {y.stride()}; the heads of a position must be contiguous")
    for name, table in (("source", index.source), ("place", index.place)):
        if table.shape != (length,) or table.dtype != torch.int32 or table.device != y.device:
            raise ValueError(
                f"index.{name} is {tuple(table.shape)} {table.dtype} on {table.device}; "
                f"it must be (M,) = ({length},) torch.int32 on {y.device}"
            )


def _check_gated(y: Tensor, z: Tensor, weight: Tensor, index: ScanIndex) -> None:
    _check_scanned(y, index)
    width = y.shape[2] // 2 * y.shape[3]  # E
    shape = (y.shape[0], index.tokens, 2 * width if z.shape[-1:] == (2 * width,) else width)
    _check("z", z, z.shape == shape, f"(B, N, d*E), d = 1 or 2, = {shape}", y.device)
    _check("weight", weight, weight.shape == shape[2:], f"(d*E,) = {shape[2:]}", y.device)


def _check_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    _check("x", x, x.dim() == 3, "(B, N, D), each at least 1", x.device)
    shape = (x.shape[0], 1, x.shape[2])
    for name, given in (("shift", shift), ("scale", scale)):
        _check(name, given, given.shape == shape, f"(B, 1, D) = {shape}", x.device)


def _check_rotate(qkv: Tensor, scale: Tensor, table: Rotation) -> None:
    right = qkv.dim() == 5 and qkv.shape[2] == 3 and qkv.shape[-1] % 2 == 0
    _check("qkv", qkv, right, "(B, N, 3, h, P), each at least 1, P even", qkv.device)
    _, tokens, _, _, channels = qkv.shape
    _check("scale", scale, scale.shape == (2, 1, channels), f"(2, 1, P) = {(2, 1, channels)}", qkv.device)
    shape = (tokens, 1, 1, channels)
    for name, given in zip(("table[0]", "table[1]"), table, strict=True):
        _check(name, given, given.shape == shape, f"(N, 1, 1, P) = {shape}", qkv.device)
        if given.requires_grad:
            raise ValueError(f"{name} {tuple(given.shape)} requires a gradient; it must be a constant")
