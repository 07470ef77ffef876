"""LayerNorm and adaLN's modulation in Triton: x is read once and written once, in each direction.

Shapes: B batch, N tokens, D channels. A row is the D channels of one token.
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


@triton.jit
def _normalize(x, channel, eps, D: tl.constexpr, WIDE: tl.constexpr):
    """A row of unit variance around zero, and the factor that made it so."""
    inside = channel < D
    value = tl.load(x + channel, mask=inside, other=0.0).to(WIDE)
    value = tl.where(inside, value - tl.sum(value) / D, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(value * value) / D + eps)
    return value * inverse, inverse


@triton.jit
def _modulate_forward(x, shift, scale, out, tokens, eps, x_batch, x_token, shift_batch, scale_batch,
                      D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    batch, token, row = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64), row.to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    unit, _ = _normalize(x + batch * x_batch + token * x_token, channel, eps, D, WIDE)
    add = tl.load(shift + batch * shift_batch + channel, mask=inside, other=0.0).to(WIDE)
    factor = 1 + tl.load(scale + batch * scale_batch + channel, mask=inside, other=0.0).to(WIDE)
    tl.store(out + row * D + channel, unit * factor + add, mask=inside)


@triton.jit
def _modulate_backward(x, scale, dout, dx, sums, tokens, count, eps, x_batch, x_token, scale_batch, dout_batch,
                       dout_token, programs, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The next ``count`` rows of one sample a program; it leaves its sums for dshift and dscale in its rows of sums."""
    program = tl.program_id(0)
    batch, start, program = (program // programs).to(tl.int64), program % programs * count, program.to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    factor = 1 + tl.load(scale + batch * scale_batch + channel, mask=inside, other=0.0).to(WIDE)
    dshift = tl.zeros([BLOCK], dtype=WIDE)
    dscale = tl.zeros([BLOCK], dtype=WIDE)
    for i in range(tl.minimum(count, tokens - start)):
        token = (start + i).to(tl.int64)
        unit, inverse = _normalize(x + batch * x_batch + token * x_token, channel, eps, D, WIDE)
        grad = tl.load(dout + batch * dout_batch + token * dout_token + channel, mask=inside, other=0.0).to(WIDE)
        dshift += grad
        dscale += grad * unit
        grad *= factor
        value = (grad - tl.sum(grad) / D - unit * (tl.sum(grad * unit) / D)) * inverse
        tl.store(dx + (batch * tokens + token) * D + channel, value, mask=inside)
    tl.store(sums + program * 2 * D + channel, dshift, mask=inside)
    tl.store(sums + program * 2 * D + D + channel, dscale, mask=inside)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        batch, tokens, width = x.shape
        out = torch.empty_like(x, memory_format=torch.contiguous_format)  # (B, N, D)
        strides = (x.stride(0), x.stride(1), shift.stride(0), scale.stride(0))
        _modulate_forward[(batch * tokens,)](
            x, shift, scale, out, tokens, eps, *strides, D=width, **norm_launch.options(x, width)
        )
        ctx.save_for_backward(x, scale)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        batch, tokens, width = x.shape
        dout = norm_launch.dense(dout)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)  # (B, N, D)
        count, programs = norm_launch.shares(tokens, triton.cdiv(norm_launch.PROGRAMS, batch))
        sums = x.new_empty((batch, programs, 2, width), dtype=norm_launch.wide(x))
        strides = (x.stride(0), x.stride(1), scale.stride(0), dout.stride(0), dout.stride(1))
        _modulate_backward[(batch * programs,)](
            x, scale, dout, dx, sums, tokens, count, ctx.eps, *strides, programs,
            D=width, **norm_launch.options(x, width),
        )  # fmt: skip
        dshift, dscale = sums.sum(1).split(1, dim=1)  # (B, 1, D) each
        return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None


@launches
def modulate_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``lingen.kernels.norm.modulate`` without its checks."""
    out: Tensor = _Modulate.apply(x, shift, scale, eps)
    return out
