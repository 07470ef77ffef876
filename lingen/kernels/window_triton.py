"""Attention inside windows in Triton: q, k and v are read where they lie; nothing is rolled, padded or copied.

A program holds one block of a window's tokens and one head, and walks over the window's other tokens with the softmax
kept on line (FlashAttention, Dao et al. 2022). Every row of a result and of a gradient is written by one program, once.

Shapes: B batch, N tokens in natural order, h heads of P channels, G windows of n tokens each. A place is a token's
number inside its window, a row its number on the grid.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lingen.kernels.entry import launches
from lingen.kernels.window import Tiling

MAX_CHANNELS = 128
MAX_WINDOW = 2**20  # tokens; _rows is exact so far
FORWARD_BLOCKS = (128, 64)  # tokens of a program, and of one of its steps
BACKWARD_BLOCKS = (64, 64)
FULL_PRECISION_BLOCKS = (16, 16)  # fp32 is multiplied without tensor cores, in unrolled code: larger blocks spill
VARYING = ["windows", "heads", "blocks", "grid_h", "grid_w", "tokens"]  # with the bucket: not worth a compilation each
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _rows(place, first, side_h, side_w, grid_h, grid_w):
    """The rows of places in a window, as 64-bit numbers; of places behind its end, rows that must not be touched.

    Quotients by way of floats, exact for places below 2^20: a GPU divides integers in some twenty instructions.
    """
    line = ((place.to(tl.float32) + 0.5) * (1.0 / side_w)).to(tl.int32)
    t = ((line.to(tl.float32) + 0.5) * (1.0 / side_h)).to(tl.int32)
    return (first + (t * grid_h + line - t * side_h) * grid_w + place - line * side_w).to(tl.int64)


@triton.jit
def _read(x, rows, row_stride, inside, P: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCK, WIDTH) of a head; zeros outside."""
    channel = tl.arange(0, WIDTH)[None, :]
    return tl.load(x + rows[:, None] * row_stride + channel, mask=inside[:, None] & (channel < P), other=0.0)


@triton.jit
def _write(x, value, rows, row_stride, inside, P: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of ``_read``."""
    channel = tl.arange(0, WIDTH)[None, :]
    value = value.to(x.dtype.element_ty)
    tl.store(x + rows[:, None] * row_stride + channel, value, mask=inside[:, None] & (channel < P))


@triton.jit
def _program(boxes, windows, heads, blocks):
    """Sample, head and block of this program, and its window: first row, sides along H and W, tokens n.

    Heads are the fastest: programs that run side by side read what lies side by side.
    """
    program = tl.program_id(0)
    window = program // (heads * blocks)
    box = boxes + window % windows * 4
    side_h, side_w = tl.load(box + 2), tl.load(box + 3)
    count = tl.load(box + 1) * side_h * side_w
    head, block = program % heads, program // heads % blocks
    return (window // windows).to(tl.int64), head.to(tl.int64), block, tl.load(box), side_h, side_w, count


@triton.jit(do_not_specialize=VARYING)
def _window_forward(q, k, v, out, lse, boxes, windows, heads, blocks, grid_h, grid_w, tokens, scale,
                    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
                    P: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """OWN queries see the keys of their window, STEP at a time. lse (B, h, N): log2 of the sum of exp2(scores)."""
    batch, head, block, first, side_h, side_w, count = _program(boxes, windows, heads, blocks)
    place = block * OWN + tl.arange(0, OWN)
    rows, inside = _rows(place, first, side_h, side_w, grid_h, grid_w), place < count
    query = _read(q + batch * q_batch + head * q_head, rows, q_row, inside, P, WIDTH)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    largest = tl.full([OWN], float("-inf"), dtype=tl.float32)
    total = tl.zeros([OWN], dtype=tl.float32)
    seen = tl.zeros([OWN, WIDTH], dtype=tl.float32)
    for start in range(0, tl.where(block * OWN < count, count, 0), STEP):
        others = start + tl.arange(0, STEP)
        there, known = _rows(others, first, side_h, side_w, grid_h, grid_w), others < count
        key = _read(k, there, k_row, known, P, WIDTH)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(known[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        value = _read(v, there, v_row, known, P, WIDTH)
        seen = seen * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        largest = larger
    _write(out + (batch * tokens * heads + head) * P, seen / total[:, None], rows, heads * P, inside, P, WIDTH)
    tl.store(lse + (batch * heads + head) * tokens + rows, largest + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _window_backward_queries(q, k, v, out, dout, dq, lse, delta, boxes, windows, heads, blocks, grid_h, grid_w,
                             tokens, scale, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
                             dout_batch, dout_row, dout_head,
                             P: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """The gradient of OWN queries; it leaves delta (B, h, N) = sum of out * dout for ``_window_backward_keys``."""
    batch, head, block, first, side_h, side_w, count = _program(boxes, windows, heads, blocks)
    place = block * OWN + tl.arange(0, OWN)
    rows, inside = _rows(place, first, side_h, side_w, grid_h, grid_w), place < count
    query = _read(q + batch * q_batch + head * q_head, rows, q_row, inside, P, WIDTH)
    grad = _read(dout + batch * dout_batch + head * dout_head, rows, dout_row, inside, P, WIDTH)
    dense = (batch * tokens * heads + head) * P  # where the head lies in what is contiguous
    seen = _read(out + dense, rows, heads * P, inside, P, WIDTH)
    line = (batch * heads + head) * tokens
    log_sum = tl.load(lse + line + rows, mask=inside, other=0.0)
    mean = tl.sum(seen.to(tl.float32) * grad.to(tl.float32), axis=1)
    tl.store(delta + line + rows, mean, mask=inside)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    dquery = tl.zeros([OWN, WIDTH], dtype=tl.float32)
    for start in range(0, tl.where(block * OWN < count, count, 0), STEP):
        others = start + tl.arange(0, STEP)
        there, known = _rows(others, first, side_h, side_w, grid_h, grid_w), others < count
        key = _read(k, there, k_row, known, P, WIDTH)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        weights = tl.where(known[None, :], tl.exp2(scores - log_sum[:, None]), 0.0)
        value = _read(v, there, v_row, known, P, WIDTH)
        dweights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        dscores = weights * (dweights - mean[:, None])
        dquery += tl.dot(dscores.to(key.dtype), key, input_precision="ieee")
    _write(dq + dense, dquery * (scale * LN_2), rows, heads * P, inside, P, WIDTH)


@triton.jit(do_not_specialize=VARYING)
def _window_backward_keys(q, k, v, dout, dk, dv, lse, delta, boxes, windows, heads, blocks, grid_h, grid_w,
                          tokens, scale, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
                          dout_batch, dout_row, dout_head,
                          P: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """The gradients of OWN keys and values, from the queries of their window."""
    batch, head, block, first, side_h, side_w, count = _program(boxes, windows, heads, blocks)
    place = block * OWN + tl.arange(0, OWN)
    rows, inside = _rows(place, first, side_h, side_w, grid_h, grid_w), place < count
    key = _read(k + batch * k_batch + head * k_head, rows, k_row, inside, P, WIDTH)
    value = _read(v + batch * v_batch + head * v_head, rows, v_row, inside, P, WIDTH)
    q += batch * q_batch + head * q_head
    dout += batch * dout_batch + head * dout_head
    line = (batch * heads + head) * tokens
    dkey = tl.zeros([OWN, WIDTH], dtype=tl.float32)
    dvalue = tl.zeros([OWN, WIDTH], dtype=tl.float32)
    for start in range(0, tl.where(block * OWN < count, count, 0), STEP):
        others = start + tl.arange(0, STEP)
        there, known = _rows(others, first, side_h, side_w, grid_h, grid_w), others < count
        query = _read(q, there, q_row, known, P, WIDTH)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale  # (OWN, STEP): keys by queries
        log_sum = tl.load(lse + line + there, mask=known, other=0.0)
        weights = tl.exp2(scores - log_sum[None, :])  # behind the window's end 1, for queries whose gradient is zeros
        grad = _read(dout, there, dout_row, known, P, WIDTH)
        dvalue += tl.dot(weights.to(grad.dtype), grad, input_precision="ieee")
        mean = tl.load(delta + line + there, mask=known, other=0.0)
        dscores = weights * (tl.dot(value, tl.trans(grad), input_precision="ieee") - mean[None, :])
        dkey += tl.dot(dscores.to(query.dtype), query, input_precision="ieee")
    dense = (batch * tokens * heads + head) * P
    _write(dk + dense, dkey * (scale * LN_2), rows, heads * P, inside, P, WIDTH)
    _write(dv + dense, dvalue, rows, heads * P, inside, P, WIDTH)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> Tensor:
        batch, tokens, heads, _ = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # (B, N, h, P)
        lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
        grid, arguments, options = _launch(q, tiling, FORWARD_BLOCKS)
        _window_forward[grid](q, k, v, out, lse, *arguments, *_strides(q, k, v), **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiling = tiling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout.stride(3) != 1:
            dout = dout.contiguous()
        dq, dk, dv = (torch.empty_like(out) for _ in range(3))  # (B, N, h, P) each
        delta = torch.empty_like(lse)
        grid, arguments, options = _launch(q, ctx.tiling, BACKWARD_BLOCKS)
        arguments = (lse, delta, *arguments, *_strides(q, k, v, dout))
        _window_backward_queries[grid](q, k, v, out, dout, dq, *arguments, **options)
        _window_backward_keys[grid](q, k, v, dout, dk, dv, *arguments, **options)
        return dq, dk, dv, None


@launches
def window_attention_triton(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> Tensor:
    """``lingen.kernels.window.window_attention`` without its checks but these.

    Raises:
        ValueError: a number of channels or size of window that the kernels do not take.
    """
    if q.shape[3] > MAX_CHANNELS:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; kernels.window=triton takes P up to {MAX_CHANNELS}; "
            "set kernels.window=torch"
        )
    if math.prod(tiling.size) > MAX_WINDOW:
        raise ValueError(f"tiling has windows of {tiling.size}; kernels.window=triton takes up to {MAX_WINDOW} tokens")
    out: Tensor = _WindowAttention.apply(q, k, v, tiling)
    return out


def _launch(q: Tensor, tiling: Tiling, blocks: tuple[int, int]) -> tuple[tuple[int], tuple[Any, ...], dict[str, int]]:
    """Number of programs, the arguments that all kernels share, and their options."""
    batch, tokens, heads, channels = q.shape
    boxes, longest = _boxes(tiling, q.device)
    blocks = FULL_PRECISION_BLOCKS if q.dtype == torch.float32 else blocks
    own, step = (max(16, min(block, triton.next_power_of_2(longest))) for block in blocks)
    width = max(16, triton.next_power_of_2(channels))
    count = triton.cdiv(longest, own)
    arguments = (boxes, len(boxes), heads, count, *tiling.grid[1:], tokens, LOG2_E * channels**-0.5)
    warps = min(max(own * width // 1024, 4), 8)  # so that no kernel spills registers, on Hopper
    options = {"P": channels, "WIDTH": width, "OWN": own, "STEP": step, "num_warps": warps, "num_stages": 2}
    return (batch * len(boxes) * heads * count,), arguments, options


@lru_cache(maxsize=32)
def _boxes(tiling: Tiling, device: torch.device) -> tuple[Tensor, int]:
    """(G, 4) int32: the first row of every window and its sides (t, h, w); and the tokens n of the largest."""
    axes = []
    for axis in range(3):
        sides = [side for windows, side in tiling.runs(axis) for _ in range(windows)]
        axes.append(list(zip(itertools.accumulate([0, *sides]), sides, strict=False)))
    _, height, width = tiling.grid
    boxes = [
        ((t * height + h) * width + w, side_t, side_h, side_w)
        for (t, side_t), (h, side_h), (w, side_w) in itertools.product(*axes)
    ]
    longest = max(side_t * side_h * side_w for _, side_t, side_h, side_w in boxes)
    return torch.tensor(boxes, dtype=torch.int32, device=device), longest


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of sample, row and head of each (B, N, h, P)."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])
