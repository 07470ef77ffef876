"""The gated norm behind the scan, and its directions added or apart, in Triton: no reorder is written anywhere.

Shapes: B batch, N tokens in natural order, R reviews, M = R + N scan positions, h heads of P channels a direction,
E = h*P, d 1 or 2 gates. A row is the E channels of one token; with d = 2 ("SEPARATE"), of one direction, its ``side``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lingen.kernels import norm_launch
from lingen.kernels.entry import launches
from lingen.kernels.index import ScanIndex


@triton.jit
def _positions(place, token, tokens, reviews, side, SEPARATE: tl.constexpr):
    """Where the forward and the backward direction hold a token: p = place[R + n] and its mirror M - 1 - (p - R).

    SEPARATE: where direction ``side`` holds it, twice.
    """
    forward = tl.load(place + reviews + token).to(tl.int64)
    backward = tokens + 2 * reviews - 1 - forward
    if SEPARATE:
        forward = tl.where(side == 0, forward, backward)
        backward = forward
    return forward, backward


@triton.jit
def _gated_forward(y, z, weight, out, place, tokens, reviews, eps, y_batch, y_position, z_batch, z_token,
                   E: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    row, side, sides = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, token, row = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64), row.to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < E
    first, second = _positions(place, token, tokens, reviews, side, SEPARATE)
    y += batch * y_batch
    value = tl.load(y + first * y_position + side * E + channel, mask=inside, other=0.0).to(WIDE)
    if not SEPARATE:
        value += tl.load(y + second * y_position + E + channel, mask=inside, other=0.0).to(WIDE)
    gate = tl.load(z + batch * z_batch + token * z_token + side * E + channel, mask=inside, other=0.0).to(WIDE)
    value *= gate * tl.sigmoid(gate)
    value *= 1 / tl.sqrt(tl.sum(value * value) / E + eps)
    value *= tl.load(weight + side * E + channel, mask=inside, other=0.0).to(WIDE)
    tl.store(out + (row * sides + side) * E + channel, value, mask=inside)


@triton.jit
def _gated_backward(y, z, weight, dout, dy, dz, dweights, place, rows, count, tokens, reviews, eps, y_batch,
                    y_position, z_batch, z_token, E: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr,
                    WIDE: tl.constexpr):  # fmt: skip
    """The next ``count`` rows of each program; it leaves its sum over them in its row of dweights."""
    program, side, sides = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channel = tl.arange(0, BLOCK)
    inside = channel < E
    scale = tl.load(weight + side * E + channel, mask=inside, other=0.0).to(WIDE)
    dscale = tl.zeros([BLOCK], dtype=WIDE)
    for i in range(tl.minimum(count, rows - program * count)):
        row = program * count + i
        batch, token, row = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64), row.to(tl.int64)
        first, second = _positions(place, token, tokens, reviews, side, SEPARATE)
        from_ = y + batch * y_batch + side * E + channel
        value = tl.load(from_ + first * y_position, mask=inside, other=0.0).to(WIDE)
        if not SEPARATE:
            value += tl.load(from_ + E + second * y_position, mask=inside, other=0.0).to(WIDE)
        gate = tl.load(z + batch * z_batch + token * z_token + side * E + channel, mask=inside, other=0.0).to(WIDE)
        grad = tl.load(dout + (row * sides + side) * E + channel, mask=inside, other=0.0).to(WIDE)
        sigmoid = tl.sigmoid(gate)
        gated = value * gate * sigmoid
        inverse = 1 / tl.sqrt(tl.sum(gated * gated) / E + eps)
        dscale += grad * gated * inverse
        grad *= scale
        mean = tl.sum(grad * gated) / E  # needs no inverse: both sums are one pass over the row
        dgated = (grad - gated * (inverse * inverse * mean)) * inverse
        dvalue = dgated * gate * sigmoid
        to = dy + batch * (tokens + reviews) * 2 * E + side * E + channel
        tl.store(to + first * 2 * E, dvalue, mask=inside)
        if not SEPARATE:
            tl.store(to + E + second * 2 * E, dvalue, mask=inside)
        dgate = dgated * value * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(dz + (row * sides + side) * E + channel, dgate, mask=inside)
    tl.store(dweights + (program.to(tl.int64) * sides + side) * E + channel, dscale, mask=inside)


@triton.jit
def _unscan_forward(y, out, place, tokens, reviews, y_batch, y_position, E: tl.constexpr, SEPARATE: tl.constexpr,
                    BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    row, side, sides = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, token, row = (row // tokens).to(tl.int64), row % tokens, row.to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < E
    first, second = _positions(place, token, tokens, reviews, side, SEPARATE)
    from_ = y + batch * y_batch + side * E + channel
    value = tl.load(from_ + first * y_position, mask=inside, other=0.0).to(WIDE)
    if not SEPARATE:
        value += tl.load(from_ + E + second * y_position, mask=inside, other=0.0).to(WIDE)
    tl.store(out + (row * sides + side) * E + channel, value, mask=inside)


@triton.jit
def _unscan_backward(dout, dy, place, tokens, reviews, E: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr,
                     WIDE: tl.constexpr):  # fmt: skip
    row, side, sides = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, token, row = (row // tokens).to(tl.int64), row % tokens, row.to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < E
    first, second = _positions(place, token, tokens, reviews, side, SEPARATE)
    grad = tl.load(dout + (row * sides + side) * E + channel, mask=inside, other=0.0)
    to = dy + batch * (tokens + reviews) * 2 * E + side * E + channel
    tl.store(to + first * 2 * E, grad, mask=inside)
    if not SEPARATE:
        tl.store(to + E + second * 2 * E, grad, mask=inside)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, place: Tensor, reviews: int, eps: float) -> Tensor:
        out = y.new_empty(z.shape)  # (B, N, d*E)
        batch, tokens, width = z.shape[0], z.shape[1], y.shape[2] // 2 * y.shape[3]
        sides = z.shape[2] // width
        strides = (y.stride(0), y.stride(1), z.stride(0), z.stride(1))
        _gated_forward[batch * tokens, sides](
            y, z, weight, out, place, tokens, reviews, eps, *strides,
            E=width, SEPARATE=sides == 2, **norm_launch.options(y, width),
        )  # fmt: skip
        ctx.save_for_backward(y, z, weight, place)
        ctx.reviews, ctx.eps = reviews, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, place = ctx.saved_tensors
        batch, tokens, width = z.shape[0], z.shape[1], y.shape[2] // 2 * y.shape[3]
        sides = z.shape[2] // width
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)  # (B, M, 2h, P)
        dy[:, : ctx.reviews] = 0  # positions below R hold reviews, which nothing here reads
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)  # (B, N, d*E)
        count, programs = norm_launch.shares(batch * tokens)
        dweights = y.new_empty((programs, sides * width), dtype=norm_launch.wide(y))
        strides = (y.stride(0), y.stride(1), z.stride(0), z.stride(1))
        _gated_backward[programs, sides](
            y, z, weight, dout.contiguous(), dy, dz, dweights, place, batch * tokens, count, tokens, ctx.reviews,
            ctx.eps, *strides, E=width, SEPARATE=sides == 2, **norm_launch.options(y, width),
        )  # fmt: skip
        return dy, dz, dweights.sum(0).to(weight.dtype), None, None, None


class _Unscan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, place: Tensor, reviews: int, sides: int) -> Tensor:
        batch, length, heads, channels = y.shape
        tokens, width = length - reviews, heads // 2 * channels
        out = y.new_empty((batch, tokens, sides, heads // 2, channels))  # (B, N, d, h, P)
        _unscan_forward[batch * tokens, sides](
            y, out, place, tokens, reviews, y.stride(0), y.stride(1),
            E=width, SEPARATE=sides == 2, **norm_launch.options(y, width),
        )  # fmt: skip
        ctx.save_for_backward(place)
        ctx.reviews = reviews
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        batch, tokens, sides, heads, channels = dout.shape
        dy = dout.new_empty((batch, ctx.reviews + tokens, 2 * heads, channels))  # (B, M, 2h, P)
        dy[:, : ctx.reviews] = 0  # positions below R hold reviews, which nothing here reads
        width = heads * channels
        _unscan_backward[batch * tokens, sides](
            dout.contiguous(), dy, place, tokens, ctx.reviews,
            E=width, SEPARATE=sides == 2, **norm_launch.options(dout, width),
        )  # fmt: skip
        return dy, None, None, None


@launches
def gated_norm_triton(y: Tensor, z: Tensor, weight: Tensor, index: ScanIndex, eps: float) -> Tensor:
    """``lingen.kernels.norm.gated_norm`` without its checks."""
    out: Tensor = _GatedNorm.apply(y, z, weight, index.place, index.reviews, eps)
    return out


@launches
def merge_directions_triton(y: Tensor, index: ScanIndex) -> Tensor:
    """``lingen.kernels.norm.merge_directions`` without its checks."""
    out: Tensor = _Unscan.apply(y, index.place, index.reviews, 1).squeeze(2)
    return out


@launches
def split_directions_triton(y: Tensor, index: ScanIndex) -> Tensor:
    """``lingen.kernels.norm.split_directions`` without its checks."""
    out: Tensor = _Unscan.apply(y, index.place, index.reviews, 2)
    return out
