"""The scan behind ``selective_scan_ref``: Mamba's recurrence (Gu and Dao 2023, eq. 2) in torch, forward and backward.

Shapes: B batch, L tokens, E channels in G groups of e that share B and C, S state channels a channel. Inside a block:
n chunks of q tokens. States lie as (..., G, S, e), so that the long axis is the last one.

Each channel decays at its own S rates, so a chunk is no matmul as in Mamba2: token after token is elementwise work, one
step for all chunks of a block at once; then the state is carried from chunk to chunk, and what came from before a chunk
is added. Decays are exponents of sums, never quotients, so none is above 1. The walk goes over blocks: cost per token
is flat in L, and so is the memory, for the backward recomputes a block from the state at its start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lingen.kernels.ssd_torch import without_autocast

CHUNK = 16  # tokens
BLOCK_ELEMENTS = {"cpu": 1 << 19}  # of one (B, tokens, G, S, e) tensor: on a CPU it stays near the cache,
BLOCK_ELEMENTS_ELSEWHERE = 1 << 26  # and a GPU wants much work in few launches


def selective_scan_torch(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """``selective_scan_ref`` without its checks: y (B, L, E) in x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups = B.shape[2]
    rates = torch.unflatten(A.to(dtype), 0, (groups, -1)).transpose(1, 2)  # (G, S, e)
    values, steps = (torch.unflatten(t.to(dtype), 2, (groups, -1)) for t in (x, dt))  # (B, L, G, e)
    y = _scan_blocks(values, steps, rates, B.to(dtype), C.to(dtype)).flatten(2)  # (B, L, E)
    return (y if D is None else torch.addcmul(y, values.flatten(2), D.to(dtype))).to(x.dtype)


class _BlockScan(torch.autograd.Function):
    """The walk over blocks; ``_forward_block`` and ``_backward_block`` do the work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        blocks = _blocks(x, A.shape[1])
        y = torch.empty_like(x, memory_format=torch.contiguous_format)  # (B, L, G, e)
        starts = A.new_zeros((len(blocks) + 1, x.shape[0], *A.shape))  # (blocks + 1, B, G, S, e)
        with without_autocast(x.device):
            for k, (ts, q) in enumerate(blocks):
                block = _cut(x[:, ts], dt[:, ts], A, B[:, ts], C[:, ts], q)
                states = _states(block, starts[k])  # (B, n, q, G, S, e)
                starts[k + 1] = states[:, -1, -1]
                y[:, ts] = _dot(block.C, states).flatten(1, 2)
        ctx.save_for_backward(x, dt, A, B, C, starts)
        ctx.blocks = blocks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, starts = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
        dA, d_state = torch.zeros_like(A), torch.zeros_like(starts[0])
        with without_autocast(x.device):
            for k, (ts, q) in reversed(list(enumerate(ctx.blocks))):
                block = _cut(x[:, ts], dt[:, ts], A, B[:, ts], C[:, ts], q)
                grads = _backward_block(block, starts[k], torch.unflatten(dy[:, ts], 1, (-1, q)), d_state)
                dx[:, ts], ddt[:, ts], dB[:, ts], dC[:, ts] = (t.flatten(1, 2) for t in grads[:4])
                dA += grads[4]
                d_state = grads[5]
        return dx, ddt, dA, dB, dC


# A compiler would unroll the walk.
_scan_blocks: Callable[..., Tensor] = torch.compiler.disable(_BlockScan.apply)  # type: ignore[no-untyped-call]


def _blocks(x: Tensor, d_state: int) -> list[tuple[slice, int]]:
    """The tokens of each block with its chunk's length. A ragged tail is a block of one shorter chunk: no padding."""
    batch, length, groups, channels = x.shape
    tokens = BLOCK_ELEMENTS.get(x.device.type, BLOCK_ELEMENTS_ELSEWHERE) // (batch * groups * channels * d_state)
    q = min(CHUNK, max(1, tokens))
    whole, step = length // q * q, max(1, tokens // q) * q
    blocks = [(slice(i, min(i + step, whole)), q) for i in range(0, whole, step)]
    return blocks if whole == length else [*blocks, (slice(whole, length), length - whole)]


class _Block(NamedTuple):
    """A block cut into chunks."""

    x: Tensor  # (B, n, q, G, 1, e)
    dt: Tensor  # (B, n, q, G, 1, e)
    A: Tensor  # (G, S, e)
    B: Tensor  # (B, n, q, G, S, 1)
    C: Tensor  # (B, n, q, G, S, 1)
    decay: Tensor  # (B, n, q, G, S, e): exp(dt A), from the token before
    cum: Tensor  # (B, n, q, G, 1, e): the sum of dt over the chunk's tokens up to and with this one


def _cut(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, q: int) -> _Block:
    """x and dt (B, T, G, e), A (G, S, e), B and C (B, T, G, S), T a multiple of q."""
    x, dt = (torch.unflatten(t, 1, (-1, q)).unsqueeze(4) for t in (x, dt))
    B, C = (torch.unflatten(t, 1, (-1, q)).unsqueeze(5) for t in (B, C))
    return _Block(x, dt, A, B, C, torch.mul(dt, A).exp_(), dt.cumsum(2))


def _states(block: _Block, state: Tensor) -> Tensor:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t`` from ``state`` (B, G, S, e) on: every h_t, (B, n, q, G, S, e)."""
    states = (block.dt * block.x) * block.B
    for j in range(1, states.shape[2]):
        states[:, :, j].addcmul_(block.decay[:, :, j], states[:, :, j - 1])
    before = torch.mul(block.cum, block.A).exp_()  # of the state at the chunk's start
    for k in range(states.shape[1]):
        states[:, k].addcmul_(before[:, k], state.unsqueeze(1))
        state = states[:, k, -1]
    return states


def _backward_block(block: _Block, state: Tensor, dy: Tensor, d_state: Tensor) -> tuple[Tensor, ...]:
    """From dy (B, n, q, G, e) and the gradient of the state after the block: of x, dt, B, C, A and the state before.

    The decay's gradient is dh_t * exp(dt_t A) h_{t-1}, and the second factor is h_t less what token t wrote.
    """
    states = _states(block, state)
    dC = torch.mul(states, dy.unsqueeze(4)).sum(5)  # (B, n, q, G, S)
    d_states = block.C * dy.unsqueeze(4)  # (B, n, q, G, S, e)
    for j in reversed(range(states.shape[2] - 1)):
        d_states[:, :, j].addcmul_(block.decay[:, :, j + 1], d_states[:, :, j + 1])
    after = torch.mul(block.cum[:, :, -1:] - block.cum, block.A).exp_()  # to the state at the chunk's end
    for k in reversed(range(states.shape[1])):
        d_states[:, k].addcmul_(after[:, k], d_state.unsqueeze(1))
        d_state = block.decay[:, k, 0] * d_states[:, k, 0]
    steps, values = block.dt.squeeze(4), block.x.squeeze(4)  # (B, n, q, G, e)
    written = block.dt * block.x  # (B, n, q, G, 1, e)
    d_written = _dot(block.B, d_states)  # (B, n, q, G, e)
    dB = torch.mul(d_states, written).sum(5)
    d_exponents = states.addcmul_(written, block.B, value=-1).mul_(d_states)  # (B, n, q, G, S, e)
    ddt = torch.addcmul((d_exponents * block.A).sum(4), d_written, values)
    dA = torch.mul(d_exponents, block.dt).sum((0, 1, 2))
    return d_written * steps, ddt, dB, dC, dA, d_state


def _dot(weights: Tensor, states: Tensor) -> Tensor:
    """Sum over the state's channels: (B, n, q, G, S, 1), (B, n, q, G, S, e) -> (B, n, q, G, e)."""
    return torch.matmul(weights.mT, states).squeeze(4)
