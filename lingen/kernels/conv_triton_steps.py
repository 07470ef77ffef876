"""The scan's time steps in Triton: the softplus, from natural order into scan order, in both directions.

Shapes: B batch, N tokens in natural order, R reviews, M = R + N scan positions, d projections, h heads a direction.
A program holds a tile of POSITIONS x HEADS of one direction. Offsets cannot wrap: see ``conv_triton``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lingen.kernels.conv_triton import mirror, read, strides
from lingen.kernels.entry import launches
from lingen.kernels.index import ScanIndex

POSITIONS, HEADS = 16, 64  # of a tile
PROGRAMS = 1024  # that share the positions of the bias's gradient: each leaves a row of partial sums


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + e) with e = exp(-|x|), exact for small e too: what rounds 1 + e, its quotient takes back."""
    small = tl.exp(-tl.abs(x))
    rounded = 1 + small
    kept = rounded - 1
    log = tl.where(kept == 0, small, tl.log(rounded) * (small / tl.where(kept == 0, 1, kept)))
    return tl.where(x > 0, x, 0) + log


@triton.jit
def _steps(dt, reviews_dt, bias, source, batch, position, side, head, count, length, dt_batch, dt_stride, dt_side,
           review_batch, review_stride, review_side, H: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(POSITIONS, HEADS): ahead of the softplus."""
    steps = read(dt + batch * dt_batch + side * dt_side, reviews_dt + batch * review_batch + side * review_side,
                  source, position, position < length, side, head, head < H, count, length, dt_stride,
                  review_stride)  # fmt: skip
    return steps.to(WIDE) + tl.load(bias + side * H + head, mask=head < H, other=0.0).to(WIDE)[None, :]


@triton.jit
def _forward(dt, reviews_dt, bias, source, out, count, length, tiles, dt_batch, dt_stride, dt_side, review_batch,
             review_stride, review_side, H: tl.constexpr, BLOCKS: tl.constexpr, POSITIONS: tl.constexpr,
             HEADS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    side, block, tile = program % 2, program // 2 % BLOCKS, program // 2 // BLOCKS
    batch = (tile // tiles).to(tl.int64)
    position, head = tile % tiles * POSITIONS + tl.arange(0, POSITIONS), block * HEADS + tl.arange(0, HEADS)
    steps = _steps(dt, reviews_dt, bias, source, batch, position, side, head, count, length, dt_batch, dt_stride,
                      dt_side, review_batch, review_stride, review_side, H, WIDE)  # fmt: skip
    at = out + (batch * length + position)[:, None] * (2 * H) + side * H + head[None, :]
    tl.store(at, _softplus(steps), mask=(position < length)[:, None] & (head < H)[None, :])


@triton.jit
def _backward(dt, reviews_dt, bias, source, dout, drows, dbiases, count, length, tiles, all_tiles, share, dt_batch,
              dt_stride, dt_side, review_batch, review_stride, review_side, dout_batch, dout_stride, H: tl.constexpr,
              BLOCKS: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """``share`` tiles of one direction, back into the rows that they came from: drows is (B, M, 2, h)."""
    program = tl.program_id(0)
    side, block, strip = program % 2, program // 2 % BLOCKS, program // 2 // BLOCKS
    head = block * HEADS + tl.arange(0, HEADS)
    inside = head < H
    dbias = tl.zeros([POSITIONS, HEADS], dtype=WIDE)
    for tile in range(strip * share, tl.minimum(strip * share + share, all_tiles)):
        batch = (tile // tiles).to(tl.int64)
        position = tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
        mask = (position < length)[:, None] & inside[None, :]
        steps = _steps(dt, reviews_dt, bias, source, batch, position, side, head, count, length, dt_batch,
                            dt_stride, dt_side, review_batch, review_stride, review_side, H, WIDE)  # fmt: skip
        at = dout + batch * dout_batch + position.to(tl.int64)[:, None] * dout_stride + side * H + head[None, :]
        grad = tl.load(at, mask=mask, other=0.0).to(WIDE) * tl.sigmoid(steps)
        at = source + tl.where(side == 0, position, mirror(position, count, length))
        row = tl.load(at, mask=position < length, other=0)
        at = drows + (batch * length + row)[:, None] * (2 * H) + side * H + head[None, :]
        tl.store(at, grad, mask=mask)
        dbias += grad
    tl.store(dbiases + strip.to(tl.int64) * (2 * H) + side * H + head, tl.sum(dbias, axis=0), mask=inside)


class _ScanSteps(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, dt: Tensor, reviews_dt: Tensor, bias: Tensor, index: ScanIndex) -> Tensor:
        ctx.save_for_backward(dt, reviews_dt, bias, index.source)
        (batch, _, _, heads), length = dt.shape, index.source.shape[0]
        out = dt.new_empty(batch, length, 2 * heads, dtype=torch.promote_types(dt.dtype, torch.float32))
        sizes, tiles = _sizes(dt), triton.cdiv(length, POSITIONS)
        _forward[(2 * sizes["BLOCKS"] * batch * tiles,)](
            dt, reviews_dt, bias.contiguous(), index.source, out, reviews_dt.shape[1], length, tiles, *strides(dt),
            *strides(reviews_dt), **sizes,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dt, reviews_dt, bias, source = ctx.saved_tensors
        (batch, _, sides, heads), (count, length) = dt.shape, (reviews_dt.shape[1], source.shape[0])
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        sizes, tiles = _sizes(dt), triton.cdiv(length, POSITIONS)
        share = triton.cdiv(2 * sizes["BLOCKS"] * batch * tiles, PROGRAMS)
        strips = triton.cdiv(batch * tiles, share)
        drows = dout.new_empty(batch, length, 2, heads)
        dbiases = dout.new_empty(strips, 2 * heads)
        _backward[(2 * sizes["BLOCKS"] * strips,)](
            dt, reviews_dt, bias.contiguous(), source, dout, drows, dbiases, count, length, tiles, batch * tiles, share,
            *strides(dt), *strides(reviews_dt), dout.stride(0), dout.stride(1), **sizes,
        )  # fmt: skip
        drows = (drows if sides == 2 else drows.sum(2, keepdim=True)).to(dt.dtype)  # (B, M, d, h)
        return drows[:, count:], drows[:, :count], dbiases.sum(0).to(bias.dtype), None


def _sizes(dt: Tensor) -> dict[str, Any]:
    """The kernels' constants."""
    heads = dt.shape[3]
    block = min(HEADS, max(16, triton.next_power_of_2(heads)))
    return {
        "H": heads,
        "BLOCKS": triton.cdiv(heads, block),
        "POSITIONS": POSITIONS,
        "HEADS": block,
        "WIDE": tl.float64 if dt.dtype == torch.float64 else tl.float32,
    }


@launches
def scan_steps_triton(dt: Tensor, reviews_dt: Tensor, bias: Tensor, index: ScanIndex) -> Tensor:
    """``scan_steps`` without its checks."""
    steps: Tensor = _ScanSteps.apply(dt, reviews_dt, bias, index)
    return steps
