"""One sample over several ranks: the heads are exchanged for the tokens (DeepSpeed-Ulysses, Jacobs et al. 2023).

Between the mixers a rank holds a slice of the tokens and all channels. Inside a mixer it holds all tokens and a share
of the heads, so what a mixer does along the sequence, softmax, windows or a scan in any order, needs no change. One
all-to-all leads there and another one back; each moves 1/K of what a gather of the tokens would.

Shapes: B batch, N tokens, K ranks, n = ceil(N / K) tokens of a slice: the last slices end in padding, which is dropped
wherever all tokens come together. "Blocks" (K, B, n, ...) hold one block for each rank, or one from each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lingen.kernels.index import ScanIndex
from lingen.kernels.norm import gate_ref, gated_norm, merge_directions, split_directions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that compute one sample together, in the order of their slices. A group of one exchanges nothing.

    Its exchanges are collectives, forward and backward: all ranks run the same model on arguments of the same shapes.
    """

    group: ProcessGroup | None
    rank: int
    size: int

    def slice_of(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's slice of what all ranks hold whole: N -> n along ``dim``, with zeros where the tokens end."""
        if self.size == 1:
            return x
        tokens, part = x.shape[dim], -(-x.shape[dim] // self.size)
        first = min(self.rank * part, tokens)
        return _lengthened(x.narrow(dim, first, min(part, tokens - first)), dim, part)

    def share_of(self, weight: Tensor, dim: int) -> Tensor:
        """The part of a weight that belongs to this rank's heads: C -> C/K along ``dim``, a view."""
        return weight if self.size == 1 else self.cut(weight, dim)[self.rank]

    def share_of_both(self, weight: Tensor) -> Tensor:
        """The same of a scan's two directions, one behind the other: (2C, ...) -> (2C/K, ...)."""
        return weight if self.size == 1 else self.share_of(torch.unflatten(weight, 0, (2, -1)), 1).flatten(0, 1)

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """All tokens of x (B, n, ...) on every rank: (B, N, ...)."""
        return x if self.size == 1 else self.to_sequence(self.copies(x), tokens)

    def to_heads(self, x: Tensor, tokens: int, dim: int) -> Tensor:
        """A slice with all heads to all N = ``tokens`` with this rank's heads, which lie along ``dim``:
        (B, n, ..., h, ...) -> (B, N, ..., h/K, ...)."""
        return x if self.size == 1 else self.to_sequence(self.cut(x, dim), tokens)

    def to_tokens(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of ``to_heads``: (B, N, ..., h/K, ...) -> (B, n, ..., h, ...)."""
        if self.size == 1:
            return x
        dim %= x.ndim
        return self._to_slices(x).movedim(0, dim).flatten(dim, dim + 1)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks of x (B, N, ...), on every rank."""
        return x if self.size == 1 else self.gather(self._to_slices(x).sum(0), x.shape[1])

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """Blocks of equal parts of ``dim``: (B, n, ..., C, ...) -> (K, B, n, ..., C/K, ...), a view.

        Raises:
            ValueError: the ranks do not divide ``dim``.
        """
        if x.shape[dim] % self.size:
            raise ValueError(f"x has shape {tuple(x.shape)}; dim {dim} must be a multiple of the {self.size} ranks")
        dim %= x.ndim
        return torch.unflatten(x, dim, (self.size, -1)).movedim(dim, 0)

    def copies(self, x: Tensor) -> Tensor:
        """The same block for each rank: (B, n, ...) -> (K, B, n, ...), a view."""
        return x.expand(self.size, *x.shape)

    def to_sequence(self, blocks: Tensor, tokens: int) -> Tensor:
        """Give each rank its block, and lay side by side what the ranks gave: (K, B, n, ...) -> (B, N, ...)."""
        x: Tensor = _exchange(blocks, self.group).transpose(0, 1).flatten(1, 2)  # (B, K*n, ...)
        return x[:, :tokens] if x.shape[1] > tokens else x

    def _to_slices(self, x: Tensor) -> Tensor:
        """Give each rank its slice of the tokens, and get ours from each: (B, N, ...) -> (K, B, n, ...)."""
        whole = _lengthened(x, 1, -(-x.shape[1] // self.size) * self.size)  # (B, K*n, ...)
        received: Tensor = _exchange(self.cut(whole, 1), self.group)
        return received


ALONE = SequenceGroup(None, 0, 1)


def parallelise(model: nn.Module, group: SequenceGroup) -> None:
    """Let ``model`` compute each sample together with the other ranks of ``group``: every module that exchanges has a
    ``sequence``, which is ``ALONE`` until now. From then on all ranks give it the same arguments, and get the same
    velocity; the gradient of a loss is the sum over the ranks, each of which counts the whole loss."""
    for module in model.modules():
        if isinstance(getattr(module, "sequence", None), SequenceGroup):
            module.sequence = group  # type: ignore[assignment]


def norm_of_slice(
    y: Tensor, z: Tensor, weight: Tensor, index: ScanIndex, group: SequenceGroup, *, eps: float
) -> Tensor:
    """``gated_norm`` where a rank has all positions of its heads, and a slice of the tokens of the gate.

    The norm is over all heads: so the directions are read back into natural order and exchanged before it.

    Args:
        y: (B, M, 2h/K, P) in scan order, forward heads first.
        z: (B, n, d*E) in natural order.
        weight: (d*E,).

    Returns:
        (B, n, d*E) in natural order.
    """
    if group.size == 1:
        return gated_norm(y, z, weight, index, eps=eps)
    if z.shape[-1] == group.size * y.shape[2] // 2 * y.shape[3]:
        both = group.to_tokens(merge_directions(y, index).flatten(2), dim=-1)  # (B, n, E)
        return gate_ref(both, z, weight, eps=eps)
    each = group.to_tokens(split_directions(y, index).flatten(3), dim=-1)  # (B, n, 2, E)
    return gate_ref(each, z, weight, eps=eps)


def _lengthened(x: Tensor, dim: int, length: int) -> Tensor:
    """x with zeros behind it, up to ``length`` along ``dim``."""
    missing = length - x.shape[dim]
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim % x.ndim) + (0, missing)) if missing else x


class _AllToAll(torch.autograd.Function):
    """Block i goes to rank i: its own transpose, hence its own gradient."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: ProcessGroup) -> Tensor:
        """(K, ...) -> (K, ...)."""
        ctx.group = group
        return _all_to_all(blocks, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """(K, ...) -> (K, ...)."""
        return _all_to_all(gradient, ctx.group), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _exchange(blocks: Tensor, group: ProcessGroup) -> Tensor:
    received: Tensor = _AllToAll.apply(blocks, group)  # type: ignore[no-untyped-call]
    return received


def _all_to_all(blocks: Tensor, group: ProcessGroup) -> Tensor:
    import torch.distributed as td

    blocks = blocks.contiguous()
    received = torch.empty_like(blocks)
    td.all_to_all_single(received, blocks, group=group)
    return received
