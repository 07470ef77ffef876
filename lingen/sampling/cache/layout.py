"""How the rows and the tokens of a forward lie, and sums over them that all agree about.

Shapes: B samples; R rows of the batch: B, or 2B where each sample has a row with its text and one with the negative
text (rows i and B + i); N tokens, n of them on this rank; D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lingen.kernels.index import Grid
from lingen.models.parallel import SequenceGroup


def index_of(rows: Sequence[int], device: torch.device) -> Tensor:
    """Rows as an index on the device, by a copy that does not wait for what the device has still to do."""
    return torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)


@dataclass(frozen=True)
class Layout:
    """Of one forward."""

    samples: int  # B
    rows: int  # R
    grid: Grid  # (T, H, W) of all N tokens, in natural order
    group: SequenceGroup  # the ranks that compute each sample together

    @property
    def tokens_here(self) -> slice:
        """Those of this rank's n that are tokens: behind them the last ranks have padding."""
        tokens, ranks = math.prod(self.grid), self.group.size
        part = -(-tokens // ranks)
        return slice(0, max(0, min(part, tokens - self.group.rank * part)))

    def rows_of(self, samples: Sequence[int]) -> list[int]:
        """The rows of these samples: a sample's pair is never parted."""
        return [half + sample for half in range(0, self.rows, self.samples) for sample in samples]

    def totals(self, sums: Tensor) -> Tensor:
        """Sums of this rank, by row, to those of each sample: (..., R) -> (..., B), the same on all ranks.

        Pairs are added up, and so are the ranks: where there are several, by one all-reduce of so many scalars.
        """
        sums = torch.unflatten(sums, -1, (-1, self.samples)).sum(-2)  # (..., B)
        if self.group.size > 1:
            import torch.distributed as td

            sums = sums.contiguous()
            td.all_reduce(sums, group=self.group.group)
        return sums
