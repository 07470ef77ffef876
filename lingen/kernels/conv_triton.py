"""The causal convolution in Triton: reads its projection in natural order, writes in scan order, and back.

Shapes: B batch, N tokens in natural order, R reviews, M = R + N scan positions, d projections, C = E + G channels of
one, k taps. A program holds a tile of POSITIONS x CHANNELS; taps lie on a third axis, so that a tile and what each of
its positions sees are one load, most of it from the L1 cache.

A row has one reader a tap and direction, and one place to put its gradient, so nothing is added atomically; the
weights' gradients are sums of partial sums in a fixed order. Positions are below 2^31 (the index holds int32); rows
and batches are widened to 64 bits before they meet a stride, so no offset wraps at any length. A program covers its
own part of the result, so programs do not outnumber elements: 2^31 of them would have to write over 2^31 tiles.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lingen.kernels.index import ScanIndex

POSITIONS, CHANNELS = 16, 128  # of a tile; 128 channels in bf16 are two full cache lines
PROGRAMS = 4096  # that share the positions of the weights' gradient: each leaves a row of partial sums


@triton.jit
def _mirror(position, reviews, length):
    """The position at which the other direction reads the same row; its own inverse."""
    return tl.where(position < reviews, reviews - 1, reviews + length - 1) - position


@triton.jit
def _read(tokens, reviews, row, there, channel, inside, count, token_stride, review_stride):
    """(..., CHANNELS): these rows (...,) of [reviews, tokens]; ``count`` of them are reviews.

    As two loads, each of what the other leaves out: of a choice between two pointers the compiler cannot tell that
    channels lie side by side, and loads them one by one.
    """
    wide, last = row.to(tl.int64), tl.expand_dims(channel, 0)
    token = tokens + tl.expand_dims((wide - count) * token_stride, -1) + last
    review = reviews + tl.expand_dims(wide * review_stride, -1) + last
    inside = tl.expand_dims(inside, 0)
    of_tokens = tl.load(token, mask=tl.expand_dims(there & (row >= count), -1) & inside, other=0.0)
    return of_tokens + tl.load(review, mask=tl.expand_dims(there & (row < count), -1) & inside, other=0.0)


@triton.jit
def _channels(block, side, E: tl.constexpr, G: tl.constexpr, CHANNELS: tl.constexpr):
    """A block of a projection's channels, all of x or all of B and C: which, whether there, and where in the result."""
    X_BLOCKS: tl.constexpr = (E + CHANNELS - 1) // CHANNELS
    of_x = block < X_BLOCKS
    channel = tl.where(of_x, block * CHANNELS, E + (block - X_BLOCKS) * CHANNELS) + tl.arange(0, CHANNELS)
    return channel, channel < tl.where(of_x, E, E + G), channel + tl.where(of_x, side * E, E + side * G)


@triton.jit
def _tile(tile, tiles, reviews, side, POSITIONS: tl.constexpr):
    """The positions of a tile. Backwards the tiles come in such an order that what one reads the forward program beside
    it reads too, and the L2 cache serves one of them."""
    tile = tl.where(side == 0, tile, (tiles + reviews // POSITIONS - tile) % tiles)
    return tile * POSITIONS + tl.arange(0, POSITIONS)


@triton.jit
def _taps(weight, channel, inside, K: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr):
    """(TAPS, 1, CHANNELS): what a channel's input, tap positions ago, is multiplied with; 0 where there is no tap."""
    tap = tl.arange(0, TAPS)[:, None, None]
    at = weight + channel[None, None, :] * K + (K - 1 - tap)
    return tl.load(at, mask=(tap < K) & inside[None, None, :], other=0.0).to(WIDE)


@triton.jit
def _window(tokens, reviews, source, position, side, channel, inside, count, length, token_stride, review_stride,
            K: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(TAPS, POSITIONS, CHANNELS): what each position sees, 0, 1, ... TAPS - 1 positions ago."""
    tap = tl.arange(0, TAPS)[:, None]
    seen = position[None, :] - tap
    there = (seen >= 0) & (position < length)[None, :] & (tap < K)
    row = tl.load(source + tl.where(side == 0, seen, _mirror(seen, count, length)), mask=there, other=0)
    return _read(tokens, reviews, row, there, channel, inside, count, token_stride, review_stride).to(WIDE)


@triton.jit
def _forward(tokens, reviews, weight, bias, source, out, count, length, tiles, token_batch, token_stride, token_side,
             review_batch, review_stride, review_side, E: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
             TAPS: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    """One tile of one direction."""
    program = tl.program_id(0)
    side, block, tile = program % 2, program // 2 % BLOCKS, program // 2 // BLOCKS
    batch = (tile // tiles).to(tl.int64)
    position = _tile(tile % tiles, tiles, count, side, POSITIONS)
    channel, inside, to = _channels(block, side, E, G, CHANNELS)
    seen = _window(tokens + batch * token_batch + side * token_side, reviews + batch * review_batch
                   + side * review_side, source, position, side, channel, inside, count, length, token_stride,
                   review_stride, K, TAPS, WIDE)  # fmt: skip
    before = tl.sum(seen * _taps(weight, to, inside, K, TAPS, WIDE), axis=0)
    before += tl.load(bias + to, mask=inside, other=0.0).to(WIDE)[None, :]
    at = out + (batch * length + position)[:, None] * (2 * (E + G)) + to[None, :]
    tl.store(at, before * tl.sigmoid(before), mask=(position < length)[:, None] & inside[None, :])


@triton.jit
def _before_gradient(tokens, reviews, weight, bias, source, dout, dbefore, dweights, dbiases, count, length, tiles,
                     all_tiles, share, token_batch, token_stride, token_side, review_batch, review_stride, review_side,
                     dout_batch, dout_stride, E: tl.constexpr, G: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr,
                     BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
                     WIDE: tl.constexpr):  # fmt: skip
    """The gradient ahead of the SiLU, over ``share`` tiles of one direction; their sums for weight and bias."""
    program = tl.program_id(0)
    side, block, strip = program % 2, program // 2 % BLOCKS, program // 2 // BLOCKS
    channel, inside, to = _channels(block, side, E, G, CHANNELS)
    taps = _taps(weight, to, inside, K, TAPS, WIDE)
    shift = tl.load(bias + to, mask=inside, other=0.0).to(WIDE)[None, :]
    dweight = tl.zeros([TAPS, POSITIONS, CHANNELS], dtype=WIDE)
    dbias = tl.zeros([POSITIONS, CHANNELS], dtype=WIDE)
    for tile in range(strip * share, tl.minimum(strip * share + share, all_tiles)):
        batch = (tile // tiles).to(tl.int64)
        position = _tile(tile % tiles, tiles, count, side, POSITIONS)
        seen = _window(tokens + batch * token_batch + side * token_side, reviews + batch * review_batch
                       + side * review_side, source, position, side, channel, inside, count, length, token_stride,
                       review_stride, K, TAPS, WIDE)  # fmt: skip
        before = tl.sum(seen * taps, axis=0) + shift
        sigmoid = tl.sigmoid(before)
        mask = (position < length)[:, None] & inside[None, :]
        row = position.to(tl.int64)[:, None]
        grad = tl.load(dout + batch * dout_batch + row * dout_stride + to[None, :], mask=mask, other=0.0).to(WIDE)
        grad *= sigmoid * (1 + before * (1 - sigmoid))
        tl.store(dbefore + (batch * length + row) * (2 * (E + G)) + to[None, :], grad, mask=mask)
        dweight += seen * grad[None, :, :]
        dbias += grad
    tap = tl.arange(0, TAPS)[:, None]
    at = dweights + (strip.to(tl.int64) * K + K - 1 - tap) * (2 * (E + G)) + to[None, :]
    tl.store(at, tl.sum(dweight, axis=1), mask=(tap < K) & inside[None, :])
    tl.store(dbiases + strip.to(tl.int64) * (2 * (E + G)) + to, tl.sum(dbias, axis=0), mask=inside)


@triton.jit
def _seen_by(dbefore, weight, position, side, block, length, E: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
             TAPS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(POSITIONS, CHANNELS): the gradient of a direction's input, from the k positions that saw it."""
    _, inside, to = _channels(block, side, E, G, CHANNELS)
    tap = tl.arange(0, TAPS)[:, None]
    by = position[None, :] + tap
    there = (by >= 0) & (by < length) & (tap < K)
    at = dbefore + by.to(tl.int64)[:, :, None] * (2 * (E + G)) + to[None, None, :]
    grad = tl.load(at, mask=there[:, :, None] & inside[None, None, :], other=0.0).to(WIDE)
    return tl.sum(grad * _taps(weight, to, inside, K, TAPS, WIDE), axis=0)


@triton.jit
def _input_gradient(dbefore, weight, source, dtokens, dreviews, count, length, tiles, E: tl.constexpr, G: tl.constexpr,
                    K: tl.constexpr, TAPS: tl.constexpr, SIDES: tl.constexpr, BLOCKS: tl.constexpr,
                    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The gradient of the rows that the forward direction reads at a tile's positions; each has one writer."""
    program = tl.program_id(0)
    side, block, tile = program % SIDES, program // SIDES % BLOCKS, program // SIDES // BLOCKS
    batch = (tile // tiles).to(tl.int64)
    position = tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
    mirrored = _mirror(position, count, length)
    dbefore += batch * length * (2 * (E + G))
    if SIDES == 1:
        grad = _seen_by(dbefore, weight, position, 0, block, length, E, G, K, TAPS, CHANNELS, WIDE)
        grad += _seen_by(dbefore, weight, mirrored, 1, block, length, E, G, K, TAPS, CHANNELS, WIDE)
    else:
        own = tl.where(side == 0, position, mirrored)
        grad = _seen_by(dbefore, weight, own, side, block, length, E, G, K, TAPS, CHANNELS, WIDE)
    STRIDE: tl.constexpr = SIDES * (E + G)
    row = tl.load(source + position, mask=position < length, other=0)
    dtokens += batch * (length - count) * STRIDE + side * (E + G)
    dreviews += batch * count * STRIDE + side * (E + G)
    channel, inside, _ = _channels(block, side, E, G, CHANNELS)
    there, wide = position < length, row.to(tl.int64)
    at = dreviews + (wide * STRIDE)[:, None] + channel[None, :]
    tl.store(at, grad, mask=(there & (row < count))[:, None] & inside[None, :])
    at = dtokens + ((wide - count) * STRIDE)[:, None] + channel[None, :]
    tl.store(at, grad, mask=(there & (row >= count))[:, None] & inside[None, :])


class _ScanConv(torch.autograd.Function):
    """Keeps the inputs alone: the backward computes again what is ahead of the SiLU."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, reviews: Tensor, weight: Tensor, bias: Tensor, index: ScanIndex, inner: int
    ) -> Tensor:
        ctx.save_for_backward(tokens, reviews, weight, bias, index.source)
        ctx.inner = inner
        (batch, _, _, channels), length = tokens.shape, index.source.shape[0]
        out = tokens.new_empty(batch, length, 2 * channels)
        sizes = _sizes(tokens, weight, inner)
        tiles = triton.cdiv(length, sizes["POSITIONS"])
        _forward[(2 * sizes["BLOCKS"] * batch * tiles,)](
            tokens, reviews, weight.contiguous(), bias.contiguous(), index.source, out, reviews.shape[1], length,
            tiles, *strides(tokens), *strides(reviews), **sizes,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tokens, reviews, weight, bias, source = ctx.saved_tensors
        (batch, _, sides, channels), (count, length) = tokens.shape, (reviews.shape[1], source.shape[0])
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        weight, bias = weight.contiguous(), bias.contiguous()
        sizes = _sizes(tokens, weight, ctx.inner)
        tiles = triton.cdiv(length, sizes["POSITIONS"])
        share = triton.cdiv(2 * sizes["BLOCKS"] * batch * tiles, PROGRAMS)
        strips = triton.cdiv(batch * tiles, share)
        dbefore = tokens.new_empty(batch, length, 2 * channels)
        wide = torch.promote_types(tokens.dtype, torch.float32)
        dweights = tokens.new_empty(strips, weight.shape[1], 2 * channels, dtype=wide)
        dbiases = tokens.new_empty(strips, 2 * channels, dtype=wide)
        _before_gradient[(2 * sizes["BLOCKS"] * strips,)](
            tokens, reviews, weight, bias, source, dout, dbefore, dweights, dbiases, count, length, tiles,
            batch * tiles, share, *strides(tokens), *strides(reviews), dout.stride(0), dout.stride(1), **sizes,
        )  # fmt: skip
        dtokens = tokens.new_empty(tokens.shape)
        dreviews = reviews.new_empty(reviews.shape)
        _input_gradient[(sides * sizes["BLOCKS"] * batch * tiles,)](
            dbefore, weight, source, dtokens, dreviews, count, length, tiles, SIDES=sides, **sizes
        )
        return dtokens, dreviews, dweights.sum(0).t().to(weight.dtype), dbiases.sum(0).to(bias.dtype), None, None


def strides(rows: Tensor) -> tuple[int, int, int]:
    """Of (B, rows, d, C): from batch to batch, from row to row, and from the forward projection to the backward one."""
    return rows.stride(0), rows.stride(1), rows.stride(2) if rows.shape[2] == 2 else 0


def _sizes(tokens: Tensor, weight: Tensor, inner: int) -> dict[str, Any]:
    """The kernels' constants."""
    groups, taps = tokens.shape[3] - inner, weight.shape[1]
    block = min(CHANNELS, max(16, triton.next_power_of_2(max(inner, groups))))
    return {
        "E": inner,
        "G": groups,
        "K": taps,
        "TAPS": triton.next_power_of_2(taps),
        "BLOCKS": triton.cdiv(inner, block) + triton.cdiv(groups, block),
        "POSITIONS": POSITIONS,
        "CHANNELS": block,
        "WIDE": tl.float64 if tokens.dtype == torch.float64 else tl.float32,
    }


@torch.compiler.disable  # type: ignore[untyped-decorator]
def scan_conv_triton(
    tokens: Tensor, reviews: Tensor, weight: Tensor, bias: Tensor, index: ScanIndex, inner: int
) -> Tensor:
    """``scan_conv`` without its checks."""
    out: Tensor = _ScanConv.apply(tokens, reviews, weight, bias, index, inner)
    return out
