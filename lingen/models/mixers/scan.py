"""In which order a layer reads the token grid (LinGen, "Rotary-Major Scan", and what its ablation compares with it).

An order is a table of positions, by which the convolution and the norm around the scan read: whatever the curve,
nothing is reordered in memory.

Shapes: (T, H, W) token grid of N tokens in natural order (W fastest), R review tokens, M = R + N; n1, n2, n3 the grid's
sides from the axis that the scan walks slowest to the one that it walks fastest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lingen.kernels.conv import review_grid, review_tokens
from lingen.kernels.index import Grid, ScanIndex

if TYPE_CHECKING:
    from lingen.model_config import Scan

AXES: tuple[Grid, ...] = (  # 0 = T, 1 = H, 2 = W, from the slowest to the fastest
    (0, 1, 2),  # spatial row-major: rows of a frame, frame after frame
    (0, 2, 1),  # spatial column-major: columns of a frame, frame after frame
    (1, 2, 0),  # temporal row-major: a place through time, then along its row
    (2, 1, 0),  # temporal column-major: a place through time, then along its column
)
Curve = Literal["rows", "snake", "hilbert"]
CURVES: dict[Scan, Curve] = {"rotary": "rows", "fixed": "rows", "zigzag": "snake", "hilbert": "hilbert"}


@dataclass(frozen=True)
class ScanOrder:
    """A curve and the axes, slowest first, that it runs along."""

    curve: Curve
    axes: Grid


def scan_order(scan: Scan, layer: int) -> ScanOrder:
    """The order of a layer: neighbours rotate through the four ``AXES``, unless the scan is fixed ("without RMS")."""
    return ScanOrder(CURVES[scan], AXES[0 if scan == "fixed" else layer % len(AXES)])


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled model would make the table anew at each call
@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table first made while sampling must serve training too
def scan_index(order: ScanOrder, grid: Grid, review_pool: Grid | None, device: torch.device) -> ScanIndex:
    """Where the scan reads: the review tokens along the curve of their own grid, then the tokens.

    Args:
        review_pool: (T, H, W) tokens that a review token averages; None: there are none.
    """
    tokens = walk(order, grid)  # (N,)
    reviews = tokens[:0] if review_pool is None else walk(order, review_grid(grid, review_pool))  # (R,)
    source = torch.cat((reviews, len(reviews) + tokens))  # (M,)
    place = torch.empty_like(source)
    place[source] = torch.arange(len(source), device="cpu")
    return ScanIndex(source.int().to(device), place.int().to(device), len(reviews))


def overview(x: Tensor, grid: Grid, review_pool: Grid | None) -> Tensor:
    """The review tokens of x (B, N, ...), as many as ``scan_index`` puts ahead: (B, R, ...) in natural order."""
    return x[:, :0] if review_pool is None else review_tokens(x, grid, review_pool)


def scan_length(grid: Grid, review_pool: Grid | None) -> int:
    """M: the tokens of a grid and its review tokens."""
    return math.prod(grid) + (0 if review_pool is None else math.prod(review_grid(grid, review_pool)))


def walk(order: ScanOrder, grid: Grid) -> Tensor:
    """The rows of a grid's tokens in the order of the scan: (N,) int64 on the CPU."""
    rows = torch.arange(math.prod(grid), device="cpu").view(grid).permute(order.axes)  # (n1, n2, n3)
    if order.curve == "snake":
        rows = _snake(rows)
    elif order.curve == "hilbert":
        return rows.flatten()[_hilbert_keys(rows.shape).argsort()]
    return rows.flatten()


def _snake(rows: Tensor) -> Tensor:
    """(n1, n2, n3) -> the same, every second plane and line turned round, so that each step goes to a neighbour."""
    rows = rows.clone(memory_format=torch.contiguous_format)
    rows[1::2] = rows[1::2].flip(1)
    lines = rows.view(-1, rows.shape[2])  # (n1 * n2, n3), one sequence of lines over all planes
    lines[1::2] = lines[1::2].flip(1)
    return rows


def _hilbert_keys(sides: tuple[int, ...]) -> Tensor:
    """How far along a Hilbert curve each token lies: (n1 * n2 * n3,) int64.

    The curve fills the smallest cube of a power of two that holds the grid, and is read where it meets the grid. Axes
    of one token take no part, so that an image gets the curve of a square. After Skilling, "Programming the Hilbert
    curve" (2004): each coordinate's bits are turned and mirrored into the frame of the sub-cube that the bits above
    them chose, then Gray-decoded; the key interleaves what is left.
    """
    x = [axis.flatten() for axis in torch.meshgrid(*(torch.arange(n, device="cpu") for n in sides), indexing="ij")]
    x = [axis for axis, side in zip(x, sides, strict=True) if side > 1] or x[:1]
    bits = max(1, (max(sides) - 1).bit_length())
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1  # the bits below
        for i in range(len(x)):
            mirror = (x[i] >> bit & 1).bool()
            change = torch.where(mirror, low, (x[0] ^ x[i]) & low)  # mirrors the first axis, or swaps it with this one
            x[0] = x[0] ^ change
            x[i] = x[i] ^ change.masked_fill(mirror, 0)
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    gray = torch.zeros_like(x[0])
    for bit in range(1, bits):
        gray ^= (x[-1] >> bit & 1) * ((1 << bit) - 1)
    key = torch.zeros_like(gray)
    for bit in reversed(range(bits)):
        for axis in x:
            key = key << 1 | (axis ^ gray) >> bit & 1
    return key
