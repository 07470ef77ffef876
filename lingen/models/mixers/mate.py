"""MATE, the mixer that makes a LinGen of the backbone: MA-branch + TE-branch (LinGen, "MATE").

Shapes: B batch, N tokens of the grid (T, H, W), D d_model.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from lingen.kernels.index import Grid
from lingen.models.block import Mixer


class Mate(nn.Module):
    """The sum of both branches on the same input: Mamba for the whole video, windows for what is adjacent.

    Args:
        ma, te: the branches; None: without it (LinGen, ablation table). One of them at least is there.
    """

    def __init__(self, ma: Mixer | None, te: Mixer | None) -> None:
        super().__init__()
        if ma is None and te is None:
            raise ValueError("a MATE without MA-branch and TE-branch mixes nothing")
        self.ma, self.te = ma, te

    @property
    def branches(self) -> dict[str, Mixer]:
        """Those that are there, "ma" and "te", in the order in which they are summed."""
        return {name: branch for name, branch in (("ma", self.ma), ("te", self.te)) if branch is not None}

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return reduce(torch.add, [branch(x, grid) for branch in self.branches.values()])  # (B, N, D)

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample."""
        return sum(branch.flops(grid) for branch in self.branches.values())
