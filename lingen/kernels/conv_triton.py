"""The causal convolution in Triton: reads its projection in natural order, writes in scan order, and back.

Shapes: B batch, N tokens in natural order, R reviews, M = R + N scan positions, d projections, C = E + G channels of
one, k taps. A program holds tiles of POSITIONS x CHANNELS. It loads a tile once a tap, each time a position further
back: all but the first come from the L1 cache.

The order is a permutation, so every row's gradient has one writer and nothing is added atomically; the gradients of
weight and bias are partial sums, summed in a fixed order. So all results are deterministic.

No offset wraps at any length: positions stay below 2^31 (the index holds int32), and rows and batches are widened to
64 bits before they meet a stride. Nor can a launch have too many programs: 2^31 tiles are 2^42 elements.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lingen.kernels.entry import launches
from lingen.kernels.index import ScanIndex

POSITIONS, CHANNELS = 16, 128  # of a tile; 128 channels in bf16 are two cache lines
HELD_POSITIONS = 8  # of a tile of the kernel that holds five sums in its registers
PROGRAMS = 4096  # that share the positions of the weights' gradient: each leaves a row of partial sums


@triton.jit
def mirror(position, reviews, length):
    """The position at which the other direction reads the same row; its own inverse."""
    return tl.where(position < reviews, reviews - 1, reviews + length - 1) - position


@triton.jit
def read(tokens, reviews, source, position, there, side, channel, inside, count, length, token_stride, review_stride):
    """(POSITIONS, CHANNELS): what a direction reads at positions (POSITIONS,); 0 where none is ``there``.

    As two loads, each of what the other leaves out: of a choice between two pointers the compiler cannot tell that
    channels lie side by side, and loads them one by one.
    """
    at = source + tl.where(side == 0, position, mirror(position, count, length))
    row = tl.load(at, mask=there, other=0).to(tl.int64)
    token = tokens + ((row - count) * token_stride)[:, None] + channel[None, :]
    review = reviews + (row * review_stride)[:, None] + channel[None, :]
    of_tokens = tl.load(token, mask=(there & (row >= count))[:, None] & inside[None, :], other=0.0)
    return of_tokens + tl.load(review, mask=(there & (row < count))[:, None] & inside[None, :], other=0.0)


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
def _ago(tap, tokens, reviews, source, position, side, channel, inside, count, length, token_stride, review_stride,
         WIDE: tl.constexpr):  # fmt: skip
    """(POSITIONS, CHANNELS): what was read ``tap`` positions ago, 0 ahead of the first."""
    there = (position >= tap) & (position < length)
    return read(tokens, reviews, source, position - tap, there, side, channel, inside, count, length, token_stride,
                 review_stride).to(WIDE)  # fmt: skip


@triton.jit
def _convolve(tokens, reviews, taps, bias, source, position, side, channel, inside, to, count, length, token_stride,
              review_stride, WIDTH: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(POSITIONS, CHANNELS): the result ahead of the SiLU."""
    total = tl.load(bias + to, mask=inside, other=0.0).to(WIDE)[None, :]
    for tap in tl.static_range(K):
        weight = tl.load(taps + tap * WIDTH + to, mask=inside, other=0.0).to(WIDE)
        total += weight[None, :] * _ago(tap, tokens, reviews, source, position, side, channel, inside, count, length,
                                        token_stride, review_stride, WIDE)  # fmt: skip
    return total


@triton.jit
def _forward(tokens, reviews, taps, bias, source, out, count, length, tiles, token_batch, token_stride, token_side,
             review_batch, review_stride, review_side, E: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
             BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """One tile of one direction."""
    WIDTH: tl.constexpr = 2 * (E + G)
    program = tl.program_id(0)
    side, block, tile = program % 2, program // 2 % BLOCKS, program // 2 // BLOCKS
    batch = (tile // tiles).to(tl.int64)
    position = _tile(tile % tiles, tiles, count, side, POSITIONS)
    channel, inside, to = _channels(block, side, E, G, CHANNELS)
    before = _convolve(tokens + batch * token_batch + side * token_side, reviews + batch * review_batch
                       + side * review_side, taps, bias, source, position, side, channel, inside, to, count, length,
                       token_stride, review_stride, WIDTH, K, WIDE)  # fmt: skip
    at = out + (batch * length + position)[:, None] * WIDTH + to[None, :]
    tl.store(at, before * tl.sigmoid(before), mask=(position < length)[:, None] & inside[None, :])


@triton.jit
def _before_gradient(tokens, reviews, taps, bias, source, dout, dbefore, dtaps, dbiases, count, length, tiles,
                     all_tiles, share, token_batch, token_stride, token_side, review_batch, review_stride, review_side,
                     dout_batch, dout_stride, FIRST: tl.constexpr, E: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
                     BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
                     WIDE: tl.constexpr):  # fmt: skip
    """The gradient ahead of the SiLU, over ``share`` tiles of one direction; its sums for the bias and for four taps.

    Four, from ``FIRST`` on, because Triton has no lists: more taps take more launches.
    """
    WIDTH: tl.constexpr = 2 * (E + G)
    program = tl.program_id(0)
    side, block, strip = program % 2, program // 2 % BLOCKS, program // 2 // BLOCKS
    channel, inside, to = _channels(block, side, E, G, CHANNELS)
    dbias = tl.zeros([POSITIONS, CHANNELS], dtype=WIDE)
    dtap0, dtap1, dtap2, dtap3 = dbias, dbias, dbias, dbias
    for tile in range(strip * share, tl.minimum(strip * share + share, all_tiles)):
        batch = (tile // tiles).to(tl.int64)
        position = _tile(tile % tiles, tiles, count, side, POSITIONS)
        own_tokens = tokens + batch * token_batch + side * token_side
        own_reviews = reviews + batch * review_batch + side * review_side
        before = _convolve(own_tokens, own_reviews, taps, bias, source, position, side, channel, inside, to, count,
                           length, token_stride, review_stride, WIDTH, K, WIDE)  # fmt: skip
        sigmoid = tl.sigmoid(before)
        mask = (position < length)[:, None] & inside[None, :]
        row = position.to(tl.int64)[:, None]
        grad = tl.load(dout + batch * dout_batch + row * dout_stride + to[None, :], mask=mask, other=0.0).to(WIDE)
        grad *= sigmoid * (1 + before * (1 - sigmoid))
        tl.store(dbefore + (batch * length + row) * WIDTH + to[None, :], grad, mask=mask)
        dbias += grad
        dtap0 += grad * _ago(FIRST, own_tokens, own_reviews, source, position, side, channel, inside, count, length,
                             token_stride, review_stride, WIDE)  # fmt: skip
        if FIRST + 1 < K:
            dtap1 += grad * _ago(FIRST + 1, own_tokens, own_reviews, source, position, side, channel, inside, count,
                                 length, token_stride, review_stride, WIDE)  # fmt: skip
        if FIRST + 2 < K:
            dtap2 += grad * _ago(FIRST + 2, own_tokens, own_reviews, source, position, side, channel, inside, count,
                                 length, token_stride, review_stride, WIDE)  # fmt: skip
        if FIRST + 3 < K:
            dtap3 += grad * _ago(FIRST + 3, own_tokens, own_reviews, source, position, side, channel, inside, count,
                                 length, token_stride, review_stride, WIDE)  # fmt: skip
    tl.store(dbiases + strip.to(tl.int64) * WIDTH + to, tl.sum(dbias, axis=0), mask=inside)
    at = dtaps + (strip.to(tl.int64) * K + FIRST) * WIDTH + to
    tl.store(at, tl.sum(dtap0, axis=0), mask=inside)
    tl.store(at + WIDTH, tl.sum(dtap1, axis=0), mask=inside & (FIRST + 1 < K))
    tl.store(at + 2 * WIDTH, tl.sum(dtap2, axis=0), mask=inside & (FIRST + 2 < K))
    tl.store(at + 3 * WIDTH, tl.sum(dtap3, axis=0), mask=inside & (FIRST + 3 < K))


@triton.jit
def _seen_by(dbefore, taps, position, side, block, length, E: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
             CHANNELS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(POSITIONS, CHANNELS): the gradient of what a direction read at a position, from the k positions that saw it."""
    WIDTH: tl.constexpr = 2 * (E + G)
    _, inside, to = _channels(block, side, E, G, CHANNELS)
    total = tl.zeros([position.shape[0], CHANNELS], dtype=WIDE)
    for tap in tl.static_range(K):
        weight = tl.load(taps + tap * WIDTH + to, mask=inside, other=0.0).to(WIDE)
        by = position + tap
        at = dbefore + by.to(tl.int64)[:, None] * WIDTH + to[None, :]
        there = (position >= 0) & (by < length)
        total += weight[None, :] * tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(WIDE)
    return total


@triton.jit
def _input_gradient(dbefore, taps, source, dtokens, dreviews, count, length, tiles, E: tl.constexpr, G: tl.constexpr,
                    K: tl.constexpr, SIDES: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr,
                    CHANNELS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The gradient of the rows that the forward direction reads at a tile's positions; each has one writer."""
    STRIDE: tl.constexpr = SIDES * (E + G)
    program = tl.program_id(0)
    side, block, tile = program % SIDES, program // SIDES % BLOCKS, program // SIDES // BLOCKS
    batch = (tile // tiles).to(tl.int64)
    position = tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
    mirrored = mirror(position, count, length)
    dbefore += batch * length * (2 * (E + G))
    if SIDES == 1:
        grad = _seen_by(dbefore, taps, position, 0, block, length, E, G, K, CHANNELS, WIDE)
        grad += _seen_by(dbefore, taps, mirrored, 1, block, length, E, G, K, CHANNELS, WIDE)
    else:
        own = tl.where(side == 0, position, mirrored)
        grad = _seen_by(dbefore, taps, own, side, block, length, E, G, K, CHANNELS, WIDE)
    there = position < length
    row = tl.load(source + position, mask=there, other=0).to(tl.int64)
    channel, inside, _ = _channels(block, side, E, G, CHANNELS)
    token = dtokens + (batch * (length - count) + row - count) * STRIDE + side * (E + G)
    review = dreviews + (batch * count + row) * STRIDE + side * (E + G)
    tl.store(token[:, None] + channel[None, :], grad, mask=(there & (row >= count))[:, None] & inside[None, :])
    tl.store(review[:, None] + channel[None, :], grad, mask=(there & (row < count))[:, None] & inside[None, :])


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
        tiles = triton.cdiv(length, POSITIONS)
        _forward[(2 * sizes["BLOCKS"] * batch * tiles,)](
            tokens, reviews, _by_age(weight), bias.contiguous(), index.source, out, reviews.shape[1], length,
            tiles, *strides(tokens), *strides(reviews), POSITIONS=POSITIONS, **sizes,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tokens, reviews, weight, bias, source = ctx.saved_tensors
        (batch, _, sides, channels), (count, length) = tokens.shape, (reviews.shape[1], source.shape[0])
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        taps, bias = _by_age(weight), bias.contiguous()
        sizes = _sizes(tokens, weight, ctx.inner)
        tiles = triton.cdiv(length, HELD_POSITIONS)
        share = triton.cdiv(2 * sizes["BLOCKS"] * batch * tiles, PROGRAMS)
        strips = triton.cdiv(batch * tiles, share)
        dbefore = tokens.new_empty(batch, length, 2 * channels)
        wide = torch.promote_types(tokens.dtype, torch.float32)
        dtaps = tokens.new_empty(strips, *taps.shape, dtype=wide)  # (strips, k, 2C)
        dbiases = tokens.new_empty(strips, 2 * channels, dtype=wide)
        for first in range(0, taps.shape[0], 4):
            _before_gradient[(2 * sizes["BLOCKS"] * strips,)](
                tokens, reviews, taps, bias, source, dout, dbefore, dtaps, dbiases, count, length, tiles,
                batch * tiles, share, *strides(tokens), *strides(reviews), dout.stride(0), dout.stride(1),
                FIRST=first, POSITIONS=HELD_POSITIONS, **sizes,
            )  # fmt: skip
        dtokens = tokens.new_empty(tokens.shape)
        dreviews = reviews.new_empty(reviews.shape)
        tiles = triton.cdiv(length, POSITIONS)
        _input_gradient[(sides * sizes["BLOCKS"] * batch * tiles,)](
            dbefore, taps, source, dtokens, dreviews, count, length, tiles, SIDES=sides, POSITIONS=POSITIONS, **sizes
        )
        return dtokens, dreviews, dtaps.sum(0).flip(0).t().to(weight.dtype), dbiases.sum(0).to(bias.dtype), None, None


def _by_age(weight: Tensor) -> Tensor:
    """(2C, k) -> (k, 2C): what is multiplied with the input of 0, 1, ... k-1 positions ago."""
    return weight.flip(1).t().contiguous()


def strides(rows: Tensor) -> tuple[int, int, int]:
    """Of (B, rows, d, C): from batch to batch, from row to row, and from the forward projection to the backward one."""
    return rows.stride(0), rows.stride(1), rows.stride(2) if rows.shape[2] == 2 else 0


def _sizes(tokens: Tensor, weight: Tensor, inner: int) -> dict[str, Any]:
    """The kernels' constants."""
    groups = tokens.shape[3] - inner
    block = min(CHANNELS, max(16, triton.next_power_of_2(max(inner, groups))))
    return {
        "E": inner,
        "G": groups,
        "K": weight.shape[1],
        "BLOCKS": triton.cdiv(inner, block) + triton.cdiv(groups, block),
        "CHANNELS": block,
        "WIDE": tl.float64 if tokens.dtype == torch.float64 else tl.float32,
    }


@launches
def scan_conv_triton(
    tokens: Tensor, reviews: Tensor, weight: Tensor, bias: Tensor, index: ScanIndex, inner: int
) -> Tensor:
    """``scan_conv`` without its checks."""
    out: Tensor = _ScanConv.apply(tokens, reviews, weight, bias, index, inner)
    return out
