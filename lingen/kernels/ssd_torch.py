"""The chunked scan behind ``ssd_ref``: Mamba2's SSD (Dao and Gu 2024, section 6) in torch, forward and backward.

Shapes: B batch, L tokens, H heads, P channels a head, G groups of heads that share B and C, N state channels a head.
Inside a block of one group: n chunks of q tokens, h = H/G heads. States lie as (B, N, h, P), so that one matmul serves
all heads of a group and B and C are never repeated.

A chunk is dense algebra on its q tokens; a state is carried between chunks. The walk goes over blocks of a few chunks
whose working set stays in the cache: cost per token, and memory beyond inputs and outputs, are flat in L. The backward
is written out and recomputes a block from the state at its start, so no (q, q) matrix is kept. On one CPU core both
take 0.8 of the time of autograd through the same forward, and 0.6 where that is checkpointed block by block; at 64k
tokens of 16 heads they need 0.7 GiB beyond the inputs where autograd needs 4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 17  # of one (B, tokens, h, P) tensor: 512 KiB in fp32, the best of 2^16 to 2^20
MIN_EXPONENT = -80.0  # e^-80 is lost in rounding anyway; below it exp is slow, and soon come denormals


def scan_torch(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """``ssd_ref`` without its checks: y (B, L, H, P) in x's dtype and the final states (B, H, P, N) in fp32 or fp64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if initial is None:
        initial = x.new_zeros((x.shape[0], *x.shape[2:], B.shape[3]), dtype=dtype)
    if D is not None:
        D = D.to(dtype).view(x.shape[2], -1)  # (H, 1) or (H, P)
    state = initial.to(dtype).permute(0, 3, 1, 2)  # (B, N, H, P)
    y, state = _scan_blocks(x, dt.to(dtype), A.to(dtype), B, C, D, state, chunk_size)
    return y.to(x.dtype), state.permute(0, 2, 3, 1).contiguous()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside, matmuls keep their dtype; the meta device has no autocast to switch off."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


class _BlockScan(torch.autograd.Function):
    """The walk over groups and blocks; ``_forward_block`` and ``_backward_block`` do the work."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        blocks = _blocks(x.shape, B.shape[2], chunk)
        y = torch.empty_like(x, dtype=dt.dtype, memory_format=torch.contiguous_format)  # (B, L, H, P)
        starts = state.new_empty((len(blocks) + 1, *state.shape))  # the last one is the final state
        starts[0] = state
        with without_autocast(x.device):
            for g, hs in _groups(x.shape[2], B.shape[2]):
                for k, (ts, q) in enumerate(blocks):
                    block = _cut(x[:, ts, hs], dt[:, ts, hs], A[hs], B[:, ts, g], C[:, ts, g], q)
                    starts[k + 1][:, :, hs] = _forward_block(block, starts[k][:, :, hs], y[:, ts, hs])
                    if D is not None:
                        y[:, ts, hs].addcmul_(x[:, ts, hs], D[hs])
        ctx.save_for_backward(x, dt, A, B, C, D, y, starts)
        ctx.blocks = blocks
        return y, starts[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, y, starts = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
        dA, dD = torch.zeros_like(A), None if D is None else torch.zeros_like(D)
        d_state = d_state.contiguous().clone()
        with without_autocast(x.device):
            for g, hs in _groups(x.shape[2], B.shape[2]):
                for k, (ts, q) in reversed(list(enumerate(ctx.blocks))):
                    block = _cut(x[:, ts, hs], dt[:, ts, hs], A[hs], B[:, ts, g], C[:, ts, g], q)
                    skip = None if D is None else D[hs]
                    grads = _backward_block(
                        block, skip, starts[k][:, :, hs], y[:, ts, hs], dy[:, ts, hs], d_state[:, :, hs]
                    )
                    dx[:, ts, hs], ddt[:, ts, hs], dB[:, ts, g], dC[:, ts, g] = grads.x, grads.dt, grads.B, grads.C
                    d_state[:, :, hs] = grads.state
                    dA[hs] += grads.A
                    if dD is not None and grads.D is not None:
                        dD[hs] += grads.D
        return dx, ddt, dA, dB, dC, dD, d_state, None


# A compiler would unroll the walk.
_scan_blocks: Callable[..., tuple[Tensor, Tensor]] = torch.compiler.disable(_BlockScan.apply)  # type: ignore[no-untyped-call]


def _groups(heads: int, groups: int) -> Iterator[tuple[int, slice]]:
    """Each group with its heads."""
    per_group = heads // groups
    return ((g, slice(g * per_group, (g + 1) * per_group)) for g in range(groups))


def _blocks(x_shape: torch.Size, groups: int, chunk: int) -> list[tuple[slice, int]]:
    """The tokens of each block with its chunk's length. A ragged tail is a block of one shorter chunk: no padding."""
    batch, length, heads, head_dim = x_shape
    chunks = max(1, BLOCK_ELEMENTS // (batch * chunk * heads // groups * max(head_dim, chunk)))
    whole = length // chunk * chunk
    blocks = [(slice(i, min(i + chunks * chunk, whole)), chunk) for i in range(0, whole, chunks * chunk)]
    return blocks if whole == length else [*blocks, (slice(whole, length), length - whole)]


class _Block(NamedTuple):
    """A block of one group, cut into chunks. cum_i is the sum of dt A over the chunk's tokens up to and with i."""

    x: Tensor  # (B, n, q, h, P)
    dt: Tensor  # (B, n, q, h, 1)
    A: Tensor  # (h,)
    B: Tensor  # (B*n, q, N)
    C: Tensor  # (B*n, q, N)
    between: Tensor  # (B, n, h, q, q): exp(cum_i - cum_j), from token j to i >= j; 1 where i < j
    head: Tensor  # (B, n, q, h, 1): exp(cum_i), from the chunk's start to token i
    tail: Tensor  # (B, n, q, h, 1): exp(cum_q - cum_j), from token j to the chunk's end
    through: Tensor  # (B, n, 1, h, 1): exp(cum_q), from the chunk's start to its end


def _cut(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, q: int) -> _Block:
    """x (B, T, h, P), dt (B, T, h), A (h,), B and C (B, T, N), T a multiple of q."""
    dt = _chunked(dt, q)  # (B, n, q, h)
    cum = (dt * A).transpose(2, 3).contiguous().cumsum(-1)  # (B, n, h, q)
    between = _exp(cum.unsqueeze(-1) - cum.unsqueeze(-2))
    head = _exp(cum).transpose(2, 3).unsqueeze(-1)
    return _Block(
        x=_chunked(x, q),
        dt=dt.unsqueeze(-1),
        A=A,
        B=B.to(dt.dtype).reshape(-1, q, B.shape[-1]),
        C=C.to(dt.dtype).reshape(-1, q, C.shape[-1]),
        between=between,
        head=head,
        tail=between[..., -1, :].clone().transpose(2, 3).unsqueeze(-1),  # between is overwritten
        through=head[:, :, -1:],
    )


def _chunked(x: Tensor, q: int) -> Tensor:
    """(B, T, ...) -> (B, n, q, ...), a view."""
    return x.view(x.shape[0], -1, q, *x.shape[2:])


def _exp(exponent: Tensor) -> Tensor:
    """In place, the exponents clamped to at most 0 (differences against the causal order are not) and at least -80."""
    return exponent.clamp_(MIN_EXPONENT, 0.0).exp_()


def _forward_block(block: _Block, state: Tensor, y: Tensor) -> Tensor:
    """Writes y (B, T, h, P), without the skip; returns the state after the block (B, N, h, P)."""
    q, P = block.x.shape[2], block.x.shape[4]
    scores = torch.bmm(block.C, block.B.mT).tril_()  # (B*n, q, q)
    mixing = block.between.mul_(scores.view(*block.x.shape[:2], 1, q, q)).view(-1, q, q)  # (B*n*h, q, q)
    inside = torch.bmm(mixing, _by_head(block.x, block.dt).view(-1, q, P))  # (B*n*h, q, P)
    states = _states(block, _flat(block.x * (block.dt * block.tail)), state)  # (B, n+1, N, h, P)
    before = torch.bmm(block.C, _flat(states[:, :-1]))  # (B*n, q, h*P), what the chunk reads from the state
    inside_t, before_t = inside.view(*block.between.shape[:4], P).transpose(2, 3), before.view(block.x.shape)
    torch.addcmul(inside_t, before_t, block.head, out=_chunked(y, q))
    return states[:, -1]


class _Grads(NamedTuple):
    """The gradients of a block's inputs, shaped as they are before the cut."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    state: Tensor


def _backward_block(block: _Block, D: Tensor | None, state: Tensor, y: Tensor, dy: Tensor, d_state: Tensor) -> _Grads:
    """From dy (B, T, h, P) and the gradient of the state after the block (B, N, h, P).

    The decays' gradient takes no (q, q) sum: a decay at token k scales what the tokens i >= k read and the chunk passes
    on, of what the tokens j < k wrote. So d cum_i = <dy_i, y_i> - <u_i, du_i> with u = dt x, and <S, dS> of the chunk's
    end state on top at its last token; and d(dt A)_k is the sum of d cum_i over i >= k.
    """
    x, dt, q = block.x, block.dt, block.x.shape[2]
    batch, n, _, h, P = x.shape
    y, dy = _chunked(y, q), _chunked(dy, q)  # (B, n, q, h, P)
    dy_h = dy.transpose(2, 3).reshape(-1, q, P)  # (B*n*h, q, P)
    # Inside the chunks.
    d_mixing = torch.bmm(dy_h, _by_head(x, dt).view(-1, q, P).mT).view(block.between.shape)  # (B, n, h, q, q)
    d_scores = d_mixing.mul_(block.between).sum(2).view(-1, q, q).tril_()  # (B*n, q, q)
    scores = torch.bmm(block.C, block.B.mT).tril_().view(batch, n, 1, q, q)
    mixing = block.between.mul_(scores).view(-1, q, q)
    du_h = torch.bmm(mixing.mT, dy_h).view(batch, n, h, q, P)
    # Through the states, one more than chunks.
    written, read = _flat(x * (dt * block.tail)), _flat(dy * block.head)  # (B*n, q, h*P)
    states = _states(block, written, state)  # (B, n+1, N, h, P)
    d_states = _carry(torch.bmm(block.C.mT, read).view(batch, n, -1, h, P), block.through, d_state, reverse=True)
    before, d_after = _flat(states[:, :-1]), _flat(d_states[:, 1:])  # (B*n, N, h*P)
    du = torch.addcmul(du_h.transpose(2, 3), torch.bmm(block.B, d_after).view(x.shape), block.tail)  # (B, n, q, h, P)
    dC = torch.bmm(read, before.mT).baddbmm_(d_scores, block.B)  # (B*n, q, N)
    dB = torch.bmm(written, d_after.mT).baddbmm_(d_scores.mT, block.C)
    # The decays.
    x_du = (x * du).sum(-1)  # (B, n, q, h)
    d_cum = (dy * y).sum(-1) - x_du * dt.squeeze(-1)
    d_cum[:, :, -1] += (states[:, 1:] * d_states[:, 1:]).sum((2, 4))
    dx, dD = du.mul_(dt), None
    if D is not None:
        x_dy = x * dy
        d_cum -= (x_dy * D).sum(-1)  # y holds the skip, which no decay touches
        dx, dD = dx.addcmul_(dy, D), x_dy.sum_to_size(D.shape)
    d_decay = d_cum.flip(2).cumsum(2).flip(2)
    return _Grads(
        x=dx.flatten(1, 2),
        dt=torch.addcmul(x_du, d_decay, block.A).flatten(1, 2),
        A=(d_decay * dt.squeeze(-1)).sum((0, 1, 2)),
        B=dB.view(batch, n * q, -1),
        C=dC.view(batch, n * q, -1),
        D=dD,
        state=d_states[:, 0],
    )


def _by_head(x: Tensor, dt: Tensor) -> Tensor:
    """dt x as (B, n, h, q, P), contiguous, in one pass."""
    out = dt.new_empty((*x.shape[:2], x.shape[3], x.shape[2], x.shape[4]))
    return torch.mul(x.transpose(2, 3), dt.transpose(2, 3), out=out)


def _flat(x: Tensor) -> Tensor:
    """(B, n, r, h, P) -> (B*n, r, h*P), the rows of a matmul that serves all heads."""
    return x.reshape(-1, x.shape[2], x.shape[3] * x.shape[4])


def _states(block: _Block, written: Tensor, state: Tensor) -> Tensor:
    """The state at each chunk's start, and after the last one: (B, n+1, N, h, P)."""
    new = torch.bmm(block.B.mT, written)  # (B*n, N, h*P)
    return _carry(new.view(*block.x.shape[:2], -1, *block.x.shape[3:]), block.through, state)


def _carry(new: Tensor, through: Tensor, state: Tensor, *, reverse: bool = False) -> Tensor:
    """``s[k+1] = through[k] s[k] + new[k]`` from ``s[0] = state``; reversed, ``s[k]`` from ``s[k+1]``."""
    batch, n = new.shape[:2]
    states = new.new_empty((batch, n + 1, *new.shape[2:]))
    states[:, n if reverse else 0] = state
    at, news, decays = states.unbind(1), new.unbind(1), through.unbind(1)
    for k in reversed(range(n)) if reverse else range(n):
        source, target = (k + 1, k) if reverse else (k, k + 1)
        torch.addcmul(news[k], decays[k], at[source], out=at[target])
    return states
