"""Review tokens in Triton: the mean of each box of tokens, read out of the projection where it lies.

Shapes: B batch, N tokens of the grid (T, H, W), R review tokens of the grid (t, h, w), d projections of C channels.
A program holds a tile of ROWS x CHANNELS. Rows and batches are widened to 64 bits before they meet a stride, and a
program covers its own part of a tensor, so that neither offsets nor programs pass 2^31 at any length.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lingen.kernels.entry import launches
from lingen.kernels.index import Grid

ROWS, CHANNELS = 8, 128  # of a tile
TOGETHER = 8  # tokens of a box that are loaded at once


@triton.jit
def _begin(ROWS: tl.constexpr, CHANNELS: tl.constexpr, rows, D: tl.constexpr, C: tl.constexpr):
    """A program's batch, rows (ROWS,), projection and channels (CHANNELS,)."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    block, side, tile = program % BLOCKS, program // BLOCKS % D, program // (BLOCKS * D)
    tiles = tl.cdiv(rows, ROWS)
    row = tile % tiles * ROWS + tl.arange(0, ROWS)
    return (tile // tiles).to(tl.int64), row, side, block * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def _box(row, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
         PW: tl.constexpr):  # fmt: skip
    """The first token of a review's box on each axis, and how many tokens it has (rows past the last: 1)."""
    h: tl.constexpr = (H + PH - 1) // PH
    w: tl.constexpr = (W + PW - 1) // PW
    t0, h0, w0 = row // (h * w) * PT, row // w % h * PH, row % w * PW
    count = tl.minimum(T - t0, PT) * tl.minimum(H - h0, PH) * tl.minimum(W - w0, PW)
    return t0, h0, w0, tl.maximum(count, 1)


@triton.jit
def _pool(x, out, rows, x_batch, x_stride, x_side, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
          PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
          CHANNELS: tl.constexpr, TOGETHER: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A tile of reviews; ``TOGETHER`` tokens of each box are under way at a time."""
    batch, row, side, channel = _begin(ROWS, CHANNELS, rows, D, C)
    t0, h0, w0, count = _box(row, T, H, W, PT, PH, PW)
    x += batch * x_batch + side * x_side
    total = tl.zeros([ROWS, CHANNELS], dtype=WIDE)
    for first in range(0, PT * PH * PW, TOGETHER):
        for i in tl.static_range(TOGETHER):
            t, h, w = t0 + (first + i) // (PH * PW), h0 + (first + i) // PW % PH, w0 + (first + i) % PW
            there = (row < rows) & (first + i < PT * PH * PW) & (t < T) & (h < H) & (w < W)
            at = x + (((t * H + h) * W + w).to(tl.int64) * x_stride)[:, None] + channel[None, :]
            total += tl.load(at, mask=there[:, None] & (channel < C)[None, :], other=0.0).to(WIDE)
    at = out + ((batch * rows + row) * D + side)[:, None] * C + channel[None, :]
    mean = total / count.to(WIDE)[:, None]
    tl.store(at, mean, mask=(row < rows)[:, None] & (channel < C)[None, :])


@triton.jit
def _spread(dout, dx, rows, dout_batch, dout_stride, dout_side, T: tl.constexpr, H: tl.constexpr,
            W: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
            ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A tile of tokens: each takes its share of the gradient of its box."""
    h: tl.constexpr = (H + PH - 1) // PH
    w: tl.constexpr = (W + PW - 1) // PW
    batch, row, side, channel = _begin(ROWS, CHANNELS, rows, D, C)
    review = (row // (H * W) // PT * h + row // W % H // PH) * w + row % W // PW
    _, _, _, count = _box(review, T, H, W, PT, PH, PW)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    at = dout + batch * dout_batch + side * dout_side + (review.to(tl.int64) * dout_stride)[:, None] + channel[None, :]
    grad = tl.load(at, mask=mask, other=0.0).to(WIDE) / count.to(WIDE)[:, None]
    tl.store(dx + ((batch * rows + row) * D + side)[:, None] * C + channel[None, :], grad, mask=mask)


class _Reviews(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, pool: Grid) -> Tensor:
        ctx.grid, ctx.pool, ctx.tokens = grid, pool, x.shape[1]
        batch, _, sides, channels = x.shape
        reviews = math.prod(triton.cdiv(n, side) for n, side in zip(grid, pool, strict=True))
        out = x.new_empty(batch, reviews, sides, channels)
        sizes = _sizes(x, grid, pool)
        _pool[(_programs(out, sizes),)](x, out, reviews, *x.stride()[:3], TOGETHER=TOGETHER, **sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        dx = dout.new_empty(dout.shape[0], ctx.tokens, *dout.shape[2:])
        sizes = _sizes(dout, ctx.grid, ctx.pool)
        _spread[(_programs(dx, sizes),)](dout, dx, ctx.tokens, *dout.stride()[:3], **sizes)
        return dx, None, None


def _sizes(x: Tensor, grid: Grid, pool: Grid) -> dict[str, Any]:
    """The kernels' constants."""
    return {
        **dict(zip(("T", "H", "W"), grid, strict=True)),
        **dict(zip(("PT", "PH", "PW"), map(min, pool, grid), strict=True)),  # a box holds no more than the grid does
        "D": x.shape[2],
        "C": x.shape[3],
        "ROWS": ROWS,
        "CHANNELS": min(CHANNELS, max(16, triton.next_power_of_2(x.shape[3]))),
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }


def _programs(rows: Tensor, sizes: dict[str, Any]) -> int:
    """How many tiles cover rows (B, rows, d, C)."""
    batch, count, sides, channels = rows.shape
    tiles = triton.cdiv(count, sizes["ROWS"]) * triton.cdiv(channels, sizes["CHANNELS"])
    return int(batch * sides * tiles)


@launches
def review_tokens_triton(x: Tensor, grid: Grid, pool: Grid) -> Tensor:
    """``review_tokens`` without its checks."""
    batch, tokens, *rest = x.shape
    reviews: Tensor = _Reviews.apply(x.reshape(batch, tokens, -1, rest[-1]), grid, pool)
    return reviews.view(batch, -1, *rest)
