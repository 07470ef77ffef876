"""Rotary-Major Scan: the four orders in which neighbouring layers flatten the token grid (LinGen, "Rotary-Major Scan").

An order is a permutation of the axes (T, H, W), so it costs a reshape. Shapes: B batch, (T, H, W) token grid,
(n1, n2, n3) the same in scan order, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lingen.kernels.index import Grid


@dataclass(frozen=True)
class ScanOrder:
    """``axes``: the axes 0 = T, 1 = H, 2 = W, from the slowest to the fastest."""

    name: str
    axes: tuple[int, int, int]

    def scan(self, x: Tensor) -> Tensor:
        """(B, T, H, W, D) -> (B, n1, n2, n3, D), a view; flattened, n3 varies fastest."""
        return x.permute(0, *(1 + axis for axis in self.axes), 4)

    def unscan(self, x: Tensor) -> Tensor:
        """The inverse: (B, n1, n2, n3, D) -> (B, T, H, W, D), a view."""
        return x.permute(0, *(1 + self.axes.index(axis) for axis in range(3)), 4)

    def sides(self, box: Grid) -> Grid:
        """The sides (T, H, W) of a box, in scan order."""
        return box[self.axes[0]], box[self.axes[1]], box[self.axes[2]]


SCAN_ORDERS = (
    ScanOrder("spatial row-major", (0, 1, 2)),  # W fastest, then H, then T: rows of a frame, frame after frame
    ScanOrder("spatial column-major", (0, 2, 1)),  # H fastest, then W, then T: columns of a frame, frame after frame
    ScanOrder("temporal row-major", (1, 2, 0)),  # T fastest, then W, then H: a place through time, then along its row
    ScanOrder("temporal column-major", (2, 1, 0)),  # T fastest, then H, then W: ... then along its column
)


def scan_order(layer: int) -> ScanOrder:
    """The order of a layer: neighbours rotate through the four."""
    return SCAN_ORDERS[layer % len(SCAN_ORDERS)]
