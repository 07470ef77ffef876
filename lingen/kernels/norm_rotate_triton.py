"""The RMS norm and rotation of queries and keys in Triton: read in place from qkv, its gradient written once.

Shapes: B batch, N tokens, h heads of P channels. A row is the (h, P) channels of one token of q or of k, held as its
lower and its upper half of each head, which the rotation pairs.
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
def _normalize(x, low, inside, eps, P: tl.constexpr, WIDE: tl.constexpr):
    """Both halves of the heads at ``x + low``, of unit RMS a head, and the factor (HEADS, 1) that made them so."""
    a = tl.load(x + low, mask=inside, other=0.0).to(WIDE)
    b = tl.load(x + low + P // 2, mask=inside, other=0.0).to(WIDE)
    inverse = 1 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / P + eps)[:, None]
    return a * inverse, b * inverse, inverse


@triton.jit
def _halves(row, channel, P: tl.constexpr, WIDE: tl.constexpr):
    """Both halves of the P numbers at ``row``, (1, BLOCK) each."""
    inside = channel < P // 2
    low = tl.load(row + channel, mask=inside, other=0.0).to(WIDE)
    high = tl.load(row + P // 2 + channel, mask=inside, other=0.0).to(WIDE)
    return low[None, :], high[None, :]


@triton.jit
def _rotate_forward(x, scale, cosines, sines, out, tokens, eps, x_batch, x_token, x_head, H: tl.constexpr,
                    P: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    batch, token, row = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64), row.to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, BLOCK)
    inside = (head < H) & (channel < P // 2)[None, :]
    a, b, _ = _normalize(x + batch * x_batch + token * x_token, head * x_head + channel[None, :], inside, eps, P, WIDE)
    scale_a, scale_b = _halves(scale, channel, P, WIDE)
    cos_a, cos_b = _halves(cosines + token * P, channel, P, WIDE)
    sin_a, sin_b = _halves(sines + token * P, channel, P, WIDE)
    a *= scale_a
    b *= scale_b
    to = out + (row * H + head) * P + channel[None, :]
    tl.store(to, a * cos_a + b * sin_a, mask=inside)
    tl.store(to + P // 2, b * cos_b + a * sin_b, mask=inside)


@triton.jit
def _rotate_backward(x, scale, cosines, sines, dout, dx, dscales, rows, count, tokens, eps, x_batch, x_token, x_head,
                     dout_batch, dout_token, dout_head, dx_token, H: tl.constexpr, P: tl.constexpr,
                     HEADS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The next ``count`` rows of each program; it leaves its sum over them and the heads in its row of dscales."""
    program = tl.program_id(0)
    head, channel = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, BLOCK)
    inside = (head < H) & (channel < P // 2)[None, :]
    scale_a, scale_b = _halves(scale, channel, P, WIDE)
    dscale_a = tl.zeros([HEADS, BLOCK], dtype=WIDE)
    dscale_b = tl.zeros([HEADS, BLOCK], dtype=WIDE)
    for i in range(tl.minimum(count, rows - program * count)):
        row = program * count + i
        batch, token, row = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64), row.to(tl.int64)
        low = head * x_head + channel[None, :]
        a, b, inverse = _normalize(x + batch * x_batch + token * x_token, low, inside, eps, P, WIDE)
        cos_a, cos_b = _halves(cosines + token * P, channel, P, WIDE)
        sin_a, sin_b = _halves(sines + token * P, channel, P, WIDE)
        from_ = dout + batch * dout_batch + token * dout_token + head * dout_head + channel[None, :]
        grad_a = tl.load(from_, mask=inside, other=0.0).to(WIDE)
        grad_b = tl.load(from_ + P // 2, mask=inside, other=0.0).to(WIDE)
        turned_a = grad_a * cos_a + grad_b * sin_b
        turned_b = grad_b * cos_b + grad_a * sin_a
        dscale_a += turned_a * a
        dscale_b += turned_b * b
        turned_a *= scale_a
        turned_b *= scale_b
        mean = (tl.sum(turned_a * a + turned_b * b, axis=1) / P)[:, None]
        to = dx + row * dx_token + head * P + channel[None, :]
        tl.store(to, (turned_a - a * mean) * inverse, mask=inside)
        tl.store(to + P // 2, (turned_b - b * mean) * inverse, mask=inside)
    half = channel < P // 2
    dscales += program.to(tl.int64) * P
    tl.store(dscales + channel, tl.sum(dscale_a, axis=0), mask=half)
    tl.store(dscales + P // 2 + channel, tl.sum(dscale_b, axis=0), mask=half)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, scale: Tensor, cosines: Tensor, sines: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv.unbind(2)[:2]]
        for x, s, out in zip(qkv.unbind(2), scale, outputs, strict=False):  # q and k: (B, N, h, P), (1, P)
            _rotate_forward[(x.shape[0] * x.shape[1],)](
                x, s, cosines, sines, out, x.shape[1], eps, *x.stride()[:3], **_options(x)
            )
        ctx.save_for_backward(qkv, scale, cosines, sines)
        ctx.eps = eps
        return outputs[0], outputs[1], qkv[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, scale, cosines, sines = ctx.saved_tensors
        batch, tokens, _, _, channels = qkv.shape
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)  # (B, N, 3, h, P)
        dqkv[:, :, 2] = grads[2]
        count, programs = norm_launch.shares(batch * tokens)
        sums = qkv.new_empty((2, programs, channels), dtype=norm_launch.wide(qkv))
        for i in range(2):
            x, dx, dout = qkv[:, :, i], dqkv[:, :, i], norm_launch.dense(grads[i])  # (B, N, h, P)
            _rotate_backward[(programs,)](
                x, scale[i], cosines, sines, dout, dx, sums[i], batch * tokens, count, tokens, ctx.eps,
                *x.stride()[:3], *dout.stride()[:3], dx.stride(1), **_options(x),
            )  # fmt: skip
        return dqkv, sums.sum(1, keepdim=True).to(scale.dtype), None, None, None


def _options(x: Tensor) -> dict[str, object]:
    """x (B, N, h, P)."""
    heads, channels = x.shape[2:]
    block = triton.next_power_of_2(channels // 2)
    padded = triton.next_power_of_2(heads)
    shared = norm_launch.options(x, 2 * block * padded)
    return shared | {"H": heads, "P": channels, "HEADS": padded, "BLOCK": block}


@launches
def norm_rotate_triton(
    qkv: Tensor, scale: Tensor, table: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``lingen.kernels.norm.norm_rotate`` without its checks."""
    cosines, sines = (values.contiguous() for values in table)
    outputs: tuple[Tensor, Tensor, Tensor] = _NormRotate.apply(qkv, scale, cosines, sines, eps)
    return outputs
