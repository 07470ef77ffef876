"""MATE, the mixer that makes a LinGen of the backbone: MA-branch + TE-branch (LinGen, "MATE").

Shapes: B batch, N tokens of the grid (T, H, W), D d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lingen.kernels.index import Grid
from lingen.models.mixers.mamba2 import BidirectionalMamba2
from lingen.models.mixers.scan import scan_order
from lingen.models.mixers.window import WindowAttention


class Mate(nn.Module):
    """The sum of both branches on the same input: Mamba2 for the whole video, windows for what is adjacent.

    Args:
        ma, te: the branches.
        layer: its index decides the scan order.
        review_pool: (T, H, W) tokens that a review token averages.
    """

    def __init__(self, ma: BidirectionalMamba2, te: WindowAttention, *, layer: int, review_pool: Grid) -> None:
        super().__init__()
        self.ma, self.te = ma, te
        self.order = scan_order(layer)
        self.review_pool = self.order.sides(review_pool)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        scanned = self.order.scan(torch.unflatten(x, 1, grid))  # (B, n1, n2, n3, D)
        ma = self.order.unscan(self.ma(scanned, self.review_pool)).flatten(1, 3)  # (B, N, D)
        mixed: Tensor = ma + self.te(x, grid)  # (B, N, D)
        return mixed

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample."""
        return self.ma.flops(self.order.sides(grid), self.review_pool) + self.te.flops(grid)
