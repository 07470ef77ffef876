"""The short causal convolution of the MA-branch, in scan order and both directions; its time steps and review tokens.

What Mamba2 (Dao and Gu 2024, section 7.1) does between its input projection and its scan. The projection is read in
natural order and the results are written in scan order, so that no reorder is a step of its own.

Shapes: B batch, N tokens of the grid (T, H, W), R review tokens, M = R + N scan positions, d projections (1: both
directions share one; 2: forwards, backwards), C = E + G channels of a projection (E of x, G of B and C), h heads,
k taps. The ``_ref`` forms are pure torch: they define the truth, and are what trains on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lingen.kernels import forms
from lingen.kernels.index import Grid, ScanIndex, gather_rows

MAX_ELEMENTS = 2**31 - 1  # beyond them torch's depthwise kernels refuse, and some of cuDNN's are wrong


def scan_conv(tokens: Tensor, reviews: Tensor, weight: Tensor, bias: Tensor, index: ScanIndex, *, inner: int) -> Tensor:
    """Causal depthwise convolution over the scan order, bias and SiLU, in both directions.

    Reviews and tokens are one sequence: position m sees m-k+1 to m, and zeros before 0. The backward direction is the
    mirror image of the forward one, part by part (``ScanIndex``), with weights of its own.

    Args:
        tokens: (B, N, d, C) in natural order; any strides but the last, which must be 1.
        reviews: (B, R, d, C) likewise, in natural order of the reviews' grid; R may be 0.
        weight: (2C, k), channels in the order of the result.
        bias: (2C,).
        index: of M = R + N positions.
        inner: E, how many of the C channels are x.

    Returns:
        (B, M, 2C) in the tokens' dtype: [x forwards (E), x backwards (E), BC forwards (G), BC backwards (G)].

    Raises:
        ValueError: an argument has a wrong shape, dtype or stride; the message names it.
    """
    if forms.chosen("conv", tokens.device) == "torch":
        return scan_conv_ref(tokens, reviews, weight, bias, index, inner=inner)
    from lingen.kernels.conv_triton import scan_conv_triton

    _check_conv(tokens, reviews, weight, bias, index, inner)
    return scan_conv_triton(tokens, reviews, weight, bias, index, inner)


def scan_conv_ref(
    tokens: Tensor, reviews: Tensor, weight: Tensor, bias: Tensor, index: ScanIndex, *, inner: int
) -> Tensor:
    """``scan_conv`` in pure torch: the same arguments, result and errors."""
    _check_conv(tokens, reviews, weight, bias, index, inner)
    x = _scan_order(tokens, reviews, index, inner)  # (B, M, 2C)
    slices = x.numel() // MAX_ELEMENTS + 1
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    parts = zip(x.chunk(slices, dim=-1), weight.chunk(slices), bias.chunk(slices), strict=True)
    outputs = [F.silu(_convolve(*part)) for part in parts]
    return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, M, channels), (channels, k), (channels,) -> (B, M, channels).

    As a 2D convolution on channels-last memory, and with the bias outside: on a CPU half the time of ``conv1d``.
    """
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0)).transpose(1, 2).unsqueeze(2)  # (B, channels, 1, M + k - 1)
    y = F.conv2d(padded, weight[:, None, None], groups=x.shape[-1])  # (B, channels, 1, M)
    return y.squeeze(2).transpose(1, 2) + bias


def _scan_order(tokens: Tensor, reviews: Tensor, index: ScanIndex, inner: int) -> Tensor:
    """(B, N, d, C), (B, R, d, C) -> (B, M, 2C): both directions side by side, channels as in ``scan_conv``."""
    rows = torch.cat((reviews, tokens), dim=1)  # (B, M, d, C)
    directions = (
        gather_rows(rows[:, :, 0], index.source, index.place),
        gather_rows(rows[:, :, -1], _mirrored(index.source, index.reviews), _mirror_place(index)),
    )  # (B, M, C) each
    x, groups = zip(*(torch.split(t, [inner, t.shape[-1] - inner], dim=-1) for t in directions), strict=True)
    return torch.cat((*x, *groups), dim=-1)


def _mirrored(source: Tensor, reviews: int) -> Tensor:
    """The rows that the backward direction reads: each part of ``source`` (M,) from its end."""
    return torch.cat((source[:reviews].flip(0), source[reviews:].flip(0)))


def _mirror_place(index: ScanIndex) -> Tensor:
    """The inverse of ``_mirrored``, (M,): at which backward position each row is read."""
    place, reviews, length = index.place, index.reviews, index.place.shape[0]
    return torch.cat((reviews - 1 - place[:reviews], reviews + length - 1 - place[reviews:]))


def scan_steps(dt: Tensor, reviews_dt: Tensor, bias: Tensor, index: ScanIndex) -> Tensor:
    """The scan's time steps, softplus(dt + bias), gathered into scan order in both directions.

    Args:
        dt: (B, N, d, h) in natural order; any strides but the last, which must be 1.
        reviews_dt: (B, R, d, h) likewise.
        bias: (2h,), the forward heads first.
        index: of M = R + N positions.

    Returns:
        (B, M, 2h), the forward heads first; fp32, or fp64 where dt is fp64.

    Raises:
        ValueError: an argument has a wrong shape, dtype or stride; the message names it.
    """
    if forms.chosen("conv", dt.device) == "torch":
        return scan_steps_ref(dt, reviews_dt, bias, index)
    from lingen.kernels.conv_triton import scan_steps_triton

    _check_rows("dt", dt, "reviews_dt", reviews_dt, index)
    _check_parameter("bias", bias, (2 * dt.shape[3],), dt)
    return scan_steps_triton(dt, reviews_dt, bias, index)


def scan_steps_ref(dt: Tensor, reviews_dt: Tensor, bias: Tensor, index: ScanIndex) -> Tensor:
    """``scan_steps`` in pure torch: the same arguments, result and errors."""
    _check_rows("dt", dt, "reviews_dt", reviews_dt, index)
    _check_parameter("bias", bias, (2 * dt.shape[3],), dt)
    dtype = torch.promote_types(dt.dtype, torch.float32)
    gathered = _scan_order(dt, reviews_dt, index, dt.shape[3])  # (B, M, 2h)
    return F.softplus(gathered.to(dtype) + bias.to(dtype))


def review_grid(grid: Grid, pool: Grid) -> Grid:
    """The grid of the review tokens: how many boxes of ``pool`` cover each axis."""
    return tuple(-(-n // side) for n, side in zip(grid, pool, strict=True))  # type: ignore[return-value]


def review_tokens(x: Tensor, grid: Grid, pool: Grid) -> Tensor:
    """An overview of the video: its tokens averaged over boxes of ``pool`` (LinGen, "review tokens").

    Boxes at the far edges may hold fewer tokens, and average those.

    Args:
        x: (B, N, ...) in natural order of ``grid``; any strides but the last, which must be 1.
        grid, pool: (T, H, W).

    Returns:
        (B, R, ...) in natural order of ``review_grid(grid, pool)``.

    Raises:
        ValueError: an argument has a wrong shape, dtype or stride; the message names it.
    """
    if forms.chosen("conv", x.device) == "torch":
        return review_tokens_ref(x, grid, pool)
    from lingen.kernels.review_triton import review_tokens_triton

    _check_reviews(x, grid, pool)
    return review_tokens_triton(x, grid, pool)


def review_tokens_ref(x: Tensor, grid: Grid, pool: Grid) -> Tensor:
    """``review_tokens`` in pure torch: the same arguments, result and errors.

    Two 2D poolings on channels-last views: several times faster than one in 3D, and the same, since both the boxes and
    their sizes are products over the axes.
    """
    _check_reviews(x, grid, pool)
    (batch, _, *rest), (T, H, W) = x.shape, grid
    x = x.reshape(batch, T, H * W, math.prod(rest)).permute(0, 3, 1, 2)  # (B, C, T, H*W)
    x = F.avg_pool2d(x, (pool[0], 1), ceil_mode=True)  # (B, C, t, H*W)
    x = x.permute(0, 2, 3, 1).reshape(-1, H, W, math.prod(rest)).permute(0, 3, 1, 2)  # (B*t, C, H, W)
    x = F.avg_pool2d(x, pool[1:], ceil_mode=True)  # (B*t, C, h, w)
    return x.permute(0, 2, 3, 1).reshape(batch, -1, *rest)  # (B, R, ...)


def _check_conv(tokens: Tensor, reviews: Tensor, weight: Tensor, bias: Tensor, index: ScanIndex, inner: int) -> None:
    _check_rows("tokens", tokens, "reviews", reviews, index)
    channels = tokens.shape[3]
    if not 1 <= inner <= channels:
        raise ValueError(f"inner={inner} must be 1 to C={channels}, the channels of tokens {tuple(tokens.shape)}")
    if weight.dim() != 2 or weight.shape[0] != 2 * channels or not weight.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (2C={2 * channels}, k), k at least 1")
    _check_parameter("weight", weight, tuple(weight.shape), tokens)
    _check_parameter("bias", bias, (2 * channels,), tokens)


def _check_rows(name: str, tokens: Tensor, reviews_name: str, reviews: Tensor, index: ScanIndex) -> None:
    """Both (B, rows, d, C), and as many rows as the index has."""
    if tokens.dim() != 4 or 0 in tokens.shape or tokens.shape[2] > 2:
        raise ValueError(
            f"{name} has shape {tuple(tokens.shape)}; it must be (B, N, d, C), each at least 1, d at most 2"
        )
    batch, count, directions, channels = tokens.shape
    if index.source.shape != (index.reviews + count,) or index.place.shape != index.source.shape:
        raise ValueError(
            f"index has {tuple(index.source.shape)} and {tuple(index.place.shape)} rows, {index.reviews} of them "
            f"reviews; it must have as many tokens as {name} {tuple(tokens.shape)}"
        )
    if index.source.dtype != torch.int32 or index.place.dtype != torch.int32:
        raise ValueError(f"index has dtypes {index.source.dtype} and {index.place.dtype}; they must be torch.int32")
    expected = (batch, index.reviews, directions, channels)
    if reviews.shape != expected:
        raise ValueError(f"{reviews_name} has shape {tuple(reviews.shape)}; it must be {expected}")
    if reviews.dtype != tokens.dtype:
        raise ValueError(f"{reviews_name} has dtype {reviews.dtype}; it must be that of {name}, {tokens.dtype}")
    for each, tensor in ((name, tokens), (reviews_name, reviews)):
        _check_layout(each, tensor)


def _check_layout(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} {tuple(tensor.shape)} has dtype {tensor.dtype}; it must be floating point")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}; the last must be 1")


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if parameter.shape != shape:
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}; it must be {shape}")
    if not parameter.is_floating_point():
        raise ValueError(f"{name} {shape} has dtype {parameter.dtype}; it must be floating point")
    if parameter.device != like.device:
        raise ValueError(f"{name} {shape} is on {parameter.device}; it must be on {like.device}")


def _check_reviews(x: Tensor, grid: Grid, pool: Grid) -> None:
    for name, sides in (("grid", grid), ("pool", pool)):
        if len(sides) != 3 or min(sides) < 1:
            raise ValueError(f"{name}={sides} must be three sides (T, H, W), each at least 1")
    if x.dim() < 3 or 0 in x.shape or x.shape[1] != math.prod(grid):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be (B, N, ...), each at least 1, with the N={math.prod(grid)} "
            f"tokens of grid {grid}"
        )
    _check_layout("x", x)
