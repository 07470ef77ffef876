"""Where a layer's scan reads and where its results go: the one table that takes the place of every reorder.

Shapes: N tokens of the grid (T, H, W) in natural order (W fastest), R review tokens, M = R + N scan positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class ScanIndex:
    """A permutation of [reviews, tokens], review rows 0..R-1 and then token rows, that maps each part onto itself.

    The forward direction reads row ``source[m]`` at position m. The backward direction is its mirror image, part by
    part: it reads row ``source[R - 1 - m]`` at m < R, and row ``source[M - 1 - (m - R)]`` at m >= R.
    """

    source: Tensor  # (M,) int32: the row that the forward direction reads at each position
    place: Tensor  # (M,) int32: the inverse, the forward position at which each row is read
    reviews: int  # R

    @property
    def tokens(self) -> int:
        """N."""
        return self.source.shape[0] - self.reviews


def gather_rows(x: Tensor, forward_index: Tensor, inverse_index: Tensor) -> Tensor:
    """``x[:, forward_index]`` for a permutation of x's rows, whose gradient is a gather too, not a scatter.

    Args:
        x: (B, L, ...).
        forward_index: (L,) int32 or int64, a permutation of 0..L-1.
        inverse_index: (L,), its inverse: ``inverse_index[forward_index[i]] == i``.

    Returns:
        (B, L, ...), contiguous.
    """
    gathered: Tensor = _GatherRows.apply(x, forward_index, inverse_index)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_index: Tensor, inverse_index: Tensor) -> Tensor:
        ctx.save_for_backward(forward_index, inverse_index)
        return x.index_select(1, forward_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        forward_index, inverse_index = ctx.saved_tensors
        return gather_rows(grad, inverse_index, forward_index), None, None
