"""The short causal convolution of the MA-branch, in scan order and both directions; its time steps and review tokens.

What Mamba2 (Dao and Gu 2024, section 7.1) does between its input projection and its scan. The projection is read in
natural order and the results are written in scan order, so that no reorder is a step of its own.

Shapes: B batch, N tokens of the grid (T, H, W), R review tokens, M = R + N scan positions, d projections (1: both
directions share one; 2: forwards, backwards), C = E + G channels of a projection (E of x, G of B and C), h heads,
k taps. The ``_ref`` forms are pure torch: they define the truth, and are what trains on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lingen.kernels import forms
from lingen.kernels.index import Grid, ScanIndex

MAX_ELEMENTS = 2**31 - 1  # beyond them torch's depthwise kernels refuse, and some of cuDNN's are wrong
BLOCK_ELEMENTS = 1 << 18  # of one (B, positions, channels) tensor of a block: 1 MiB in fp32


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
    out: Tensor = scan_conv_triton(tokens, reviews, weight, bias, index, inner)
    return out


def scan_conv_ref(
    tokens: Tensor, reviews: Tensor, weight: Tensor, bias: Tensor, index: ScanIndex, *, inner: int
) -> Tensor:
    """``scan_conv`` in pure torch: the same arguments, result and errors."""
    _check_conv(tokens, reviews, weight, bias, index, inner)
    return F.silu(_ScanConv.apply(tokens, reviews, weight, bias, index, inner))  # type: ignore[no-untyped-call]


class _ScanConv(torch.autograd.Function):
    """The gather into scan order, convolution and bias. Both gradients are written out: of an index_select torch makes
    a scatter, and its depthwise weight gradient takes a CPU seven times what ``_weight_gradient`` does."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, reviews: Tensor, weight: Tensor, bias: Tensor, index: ScanIndex, inner: int
    ) -> Tensor:
        x = _gather(tokens, reviews, index, inner, ahead=weight.shape[1] - 1)  # (B, k-1 + M, 2C)
        ctx.save_for_backward(x, weight, index.source, index.place)
        ctx.reviews, ctx.directions, ctx.inner, ctx.bias_dtype = index.reviews, tokens.shape[2], inner, bias.dtype
        return _depthwise(x, weight.to(x.dtype), bias.to(x.dtype), padding=0)  # (B, M, 2C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, source, place = ctx.saved_tensors
        ahead = weight.shape[1] - 1
        # Position m was seen by m to m+k-1: the same convolution, of what follows and with the taps mirrored.
        d_x = _depthwise(grad, weight.flip(1).to(x.dtype), None, padding=ahead)[:, ahead:]  # (B, M, 2C)
        d_tokens, d_reviews = _gather_back(d_x, ScanIndex(source, place, ctx.reviews), ctx.directions, ctx.inner)
        d_weight = _weight_gradient(x, grad, ahead + 1).to(weight.dtype)
        d_bias = grad.sum((0, 1), dtype=_accumulator(grad)).to(ctx.bias_dtype)
        return d_tokens, d_reviews, d_weight, d_bias, None, None


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """x (B, length, channels), weight (channels, k), bias (channels,) -> (B, length - k + 1 + 2 padding, channels).

    As a 2D convolution on channels-last memory: on a CPU half the time of ``conv1d``. In slices of the channels where
    one tensor would pass ``MAX_ELEMENTS`` (68 s of 512p at 4B does).
    """
    x = x.transpose(1, 2).unsqueeze(2)  # (B, channels, 1, length)
    size = max(1, MAX_ELEMENTS // (x.shape[0] * (x.shape[3] + 2 * padding)))  # channels of a slice
    outputs = []
    for start in range(0, x.shape[1], size):
        at = slice(start, start + size)
        taps, shift = weight[at, None, None], None if bias is None else bias[at]
        outputs.append(F.conv2d(x[:, at], taps, shift, padding=(0, padding), groups=taps.shape[0]))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)  # (B, channels, 1, length - k + 1 + 2 padding)
    return y.squeeze(2).transpose(1, 2)


def _weight_gradient(x: Tensor, grad: Tensor, taps: int) -> Tensor:
    """The inputs x (B, k-1 + M, channels) and the gradient of the results (B, M, channels) -> (channels, k).

    In blocks of positions that stay in the cache.
    """
    batch, length, channels = grad.shape
    total = torch.zeros(taps, channels, dtype=_accumulator(x), device=x.device)
    rows = max(1, BLOCK_ELEMENTS // (batch * channels))
    for start, part in zip(range(0, length, rows), torch.split(grad, rows, dim=1), strict=True):
        part = part.to(total.dtype)
        for tap in range(taps):
            total[tap] += (part * x[:, start + tap : start + tap + part.shape[1]]).sum((0, 1))
    return total.t()


class _BothDirections(torch.autograd.Function):
    """``_gather`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, reviews: Tensor, index: ScanIndex, inner: int) -> Tensor:
        ctx.save_for_backward(index.source, index.place)
        ctx.reviews, ctx.directions, ctx.inner = index.reviews, tokens.shape[2], inner
        return _gather(tokens, reviews, index, inner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, place = ctx.saved_tensors
        index = ScanIndex(source, place, ctx.reviews)
        return *_gather_back(grad, index, ctx.directions, ctx.inner), None, None


def _gather(tokens: Tensor, reviews: Tensor, index: ScanIndex, inner: int, ahead: int = 0) -> Tensor:
    """(B, N, d, C), (B, R, d, C) -> (B, ahead + M, 2C): both directions side by side, ``ahead`` rows of zeros first."""
    R, backward = index.reviews, _mirrored(index.source, index.reviews)
    out = tokens.new_empty(tokens.shape[0], ahead + index.source.shape[0], 2 * tokens.shape[3])
    out[:, :ahead] = 0
    for direction, source in ((0, index.source), (-1, backward)):
        for channels, to in _channels(tokens.shape[3], inner, direction):
            for rows, order, at in ((reviews, source[:R], ahead), (tokens, source[R:] - R, ahead + R)):
                into = out[:, at : at + rows.shape[1], to]
                torch.index_select(rows[:, :, direction, channels], 1, order, out=into)
    return out


def _gather_back(grad: Tensor, index: ScanIndex, directions: int, inner: int) -> tuple[Tensor, Tensor]:
    """The gradient of ``_gather``'s result (B, M, 2C) -> those of tokens (B, N, d, C) and reviews (B, R, d, C)."""
    (batch, _, channels), R = grad.shape, index.reviews
    d_tokens = grad.new_empty(batch, index.tokens, directions, channels // 2)
    d_reviews = grad.new_empty(batch, R, directions, channels // 2)
    for direction, place in ((0, index.place), (-1, _mirror_place(index))):
        for to, at in _channels(channels // 2, inner, direction):
            for rows, order in ((d_reviews, place[:R]), (d_tokens, place[R:])):
                into = rows[:, :, direction, to]
                if direction == 0 or directions == 2:
                    torch.index_select(grad[..., at], 1, order, out=into)
                else:
                    into += grad[..., at].index_select(1, order)
    return d_tokens, d_reviews


def _channels(channels: int, inner: int, direction: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a direction's x, and its B and C, lie among a projection's channels, and where in the result."""
    groups, side = channels - inner, abs(direction)
    x = slice(side * inner, (side + 1) * inner)
    bc = slice(2 * inner + side * groups, 2 * inner + (side + 1) * groups)
    return (slice(0, inner), x), (slice(inner, channels), bc)


def _mirrored(source: Tensor, reviews: int) -> Tensor:
    """The rows that the backward direction reads: each part of ``source`` (M,) from its end."""
    return torch.cat((source[:reviews].flip(0), source[reviews:].flip(0)))


def _mirror_place(index: ScanIndex) -> Tensor:
    """The inverse of ``_mirrored``, (M,): at which backward position each row is read."""
    place, reviews, length = index.place, index.reviews, index.place.shape[0]
    return torch.cat((reviews - 1 - place[:reviews], reviews + length - 1 - place[reviews:]))


def _accumulator(x: Tensor) -> torch.dtype:
    """What sums over x are kept in: fp32, or fp64 where x is fp64."""
    return torch.promote_types(x.dtype, torch.float32)


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
    from lingen.kernels.conv_triton_steps import scan_steps_triton

    _check_rows("dt", dt, "reviews_dt", reviews_dt, index)
    _check_parameter("bias", bias, (2 * dt.shape[3],), dt)
    steps: Tensor = scan_steps_triton(dt, reviews_dt, bias, index)
    return steps


def scan_steps_ref(dt: Tensor, reviews_dt: Tensor, bias: Tensor, index: ScanIndex) -> Tensor:
    """``scan_steps`` in pure torch: the same arguments, result and errors."""
    _check_rows("dt", dt, "reviews_dt", reviews_dt, index)
    _check_parameter("bias", bias, (2 * dt.shape[3],), dt)
    dtype = _accumulator(dt)
    steps: Tensor = _BothDirections.apply(dt, reviews_dt, index, dt.shape[3])  # type: ignore[no-untyped-call]
    return F.softplus(steps.to(dtype) + bias.to(dtype))  # (B, M, 2h)


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
    reviews: Tensor = review_tokens_triton(x, grid, pool)
    return reviews


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
    x = x.permute(0, 2, 3, 1).reshape(batch, -1, *rest)
    return x.contiguous()  # (B, R, ...); where sides are 1, pooling may have chosen another layout


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
    for each, rows in (("index.source", index.source), ("index.place", index.place)):
        if rows.dtype != torch.int32 or not rows.is_contiguous() or rows.device != tokens.device:
            raise ValueError(
                f"{each} {tuple(rows.shape)} is {rows.dtype} on {rows.device} with strides {rows.stride()}; it must be "
                f"contiguous torch.int32 on {tokens.device}"
            )
    expected = (batch, index.reviews, directions, channels)
    if reviews.shape != expected:
        raise ValueError(f"{reviews_name} has shape {tuple(reviews.shape)}; it must be {expected}")
    if reviews.dtype != tokens.dtype or reviews.device != tokens.device:
        raise ValueError(
            f"{reviews_name} {expected} is {reviews.dtype} on {reviews.device}; it must be as {name} is, "
            f"{tokens.dtype} on {tokens.device}"
        )
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
