"""How much a residual changed, and how much moves in it, as a few sums a row; also where ranks share the rows.

The sums are taken in fp32 along the channels and in fp64 along the tokens, so they hold in any dtype. Each rank sums
what it holds, and ``Layout.totals`` adds the ranks up: an all-reduce of these scalars is all that a decision needs.
Motion alone compares tokens with others that another rank may hold. Those, at most ``stride`` frames a rank, are sent
to it, so that ranks find what one alone finds; the residual is never gathered.

Shapes: R rows, N tokens of the grid (T, H, W) in natural order, D channels; n tokens of a rank's slice, whose end may
be padding; S strides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lingen.sampling.cache.layout import Layout


def change_sums(old: Tensor, new: Tensor, layout: Layout) -> Tensor:
    """``|old - new|`` and ``|old|``, L1, of this rank's tokens: two residuals (R, n, D) -> (2, R) fp64."""
    here = layout.tokens_here
    return torch.stack([_l1(old[:, here] - new[:, here]), _l1(old[:, here])]).sum(-1)


def motion_sums(x: Tensor, strides: tuple[int, ...], layout: Layout) -> Tensor:
    """For each stride i, ``|x[i:] - x[:-i]|`` along latent frames and ``|x[i:]| + |x[:-i]|``, L1, of the pairs whose
    later token is this rank's: a residual (R, n, D) -> (2S, R) fp64; zeros where there are not so many frames."""
    x = x[:, layout.tokens_here]
    held, tokens, group = x.shape[1], math.prod(layout.grid), layout.group
    first = group.rank * -(-tokens // group.size)  # of this rank's tokens, in the grid
    norms = _l1(x)  # (R, n)
    place = first + torch.arange(held, device=x.device)
    sums = []
    for stride in strides:
        shift = stride * layout.grid[1] * layout.grid[2]  # from a token to the one so many frames later
        apart = _l1(x[:, shift:] - x[:, : max(held - shift, 0)]).sum(1)  # (R,), of pairs that both lie here
        if group.size > 1:
            earlier = _from_other_ranks(x, shift, layout)  # (R, h, D)
            begin = max(shift - first, 0)  # the first token here that has one
            apart = apart + _l1(x[:, begin : begin + earlier.shape[1]] - earlier).sum(1)
        met = (place >= shift).to(norms.dtype) + (place < tokens - shift).to(norms.dtype)  # (n,): as later, as earlier
        sums += [apart, (norms * met).sum(1)]
    return torch.stack(sums)


def _l1(x: Tensor) -> Tensor:
    """(R, n, D) -> (R, n) fp64, of sums in fp32."""
    norms = x.abs().sum(-1, dtype=torch.float32)  # on a CPU nine times as fast as vector_norm of order 1
    return norms.double()


def _from_other_ranks(x: Tensor, shift: int, layout: Layout) -> Tensor:
    """The tokens ``shift`` before this rank's that lie in other slices, in order: (R, n, D) -> (R, h, D)."""
    import torch.distributed as td

    tokens, group = math.prod(layout.grid), layout.group
    part = -(-tokens // group.size)
    slices = [(min(rank * part, tokens), min(rank * part + part, tokens)) for rank in range(group.size)]

    def met(of: int, by: int) -> tuple[int, int]:
        """Which tokens of rank ``of``'s slice lie ``shift`` before those of rank ``by``: begin and end in the grid."""
        begin, end = slices[of]
        first, last = max(slices[by][0] - shift, begin), min(slices[by][1] - shift, end)
        return (first, max(first, last)) if of != by else (begin, begin)

    mine = slices[group.rank][0]
    sent = [met(group.rank, by) for by in range(group.size)]
    received = [met(of, group.rank) for of in range(group.size)]
    rows = x.transpose(0, 1)  # (n, R, D)
    given = torch.cat([rows[begin - mine : end - mine] for begin, end in sent])
    got = given.new_empty((sum(end - begin for begin, end in received), *rows.shape[1:]))
    td.all_to_all_single(
        got, given.contiguous(), [e - b for b, e in received], [e - b for b, e in sent], group=group.group
    )
    return got.transpose(0, 1)
