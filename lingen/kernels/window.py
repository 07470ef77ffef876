"""Attention inside the windows of TESA, the temporal Swin attention of LinGen's TE-branch: one seam.

Windows do not grow with the grid, so their cost is linear in the tokens. A window that the edge of the grid cuts holds
the tokens that are left of it, and nothing else: there is no padding, and no mask to hide it. (Swin rolls the grid
round and masks; what comes out is the same, and costs more.)

Shapes: B batch, N tokens of the grid (T, H, W) in natural order, h heads of P channels; n tokens of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lingen.kernels import forms
from lingen.kernels.attention import sdpa
from lingen.kernels.index import Grid
from lingen.kernels.layout import check_qkv

Run = tuple[int, int]  # windows side by side along an axis, and the tokens of each


@dataclass(frozen=True)
class Tiling:
    """How windows lie on a token grid: ``size`` tokens an axis, the first whole one ``shift`` tokens from the edge.

    What lies in front of the shift is a window of its own, and so is what is left behind the last whole one.
    """

    grid: Grid
    size: Grid
    shift: Grid

    @property
    def count(self) -> Grid:
        """Windows along each axis, those that an edge cuts included."""
        return tuple(sum(windows for windows, _ in self.runs(axis)) for axis in range(3))  # type: ignore[return-value]

    def runs(self, axis: int) -> list[Run]:
        """The windows along an axis, in order; at most three runs, none empty."""
        n, size, shift = self.grid[axis], self.size[axis], self.shift[axis]
        whole, rest = divmod(n - shift, size)
        return [(windows, side) for windows, side in ((1, shift), (whole, size), (1, rest)) if windows and side]

    def pairs(self) -> int:
        """Pairs of tokens (i, j) that one window holds, i = j included: a window of n tokens has n^2."""
        return math.prod(sum(windows * side**2 for windows, side in self.runs(axis)) for axis in range(3))


def tile(grid: Grid, window: Grid, shifted: bool) -> Tiling:
    """The fewest windows of at most ``window`` tokens an axis that cover the grid, as equal as can be.

    Where ``window`` does not divide the grid the size is evened out, so that no token has far fewer neighbours than the
    others: 5 frames under windows of 4 make 3 + 2, not 4 + 1. ``shifted`` moves the windows by half their size (Swin,
    section 3.2), so that neighbours which one layer parts meet in the next; one that holds a whole axis stays there.
    """
    count = [-(-n // limit) for n, limit in zip(grid, window, strict=True)]
    size = [-(-n // windows) for n, windows in zip(grid, count, strict=True)]
    shift = [side // 2 if shifted and windows > 1 else 0 for side, windows in zip(size, count, strict=True)]
    return Tiling(grid, tuple(size), tuple(shift))  # type: ignore[arg-type]


def window_attention(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> Tensor:
    """Softmax attention of each token to the tokens of its window, scores scaled by P**-0.5.

    Args:
        q, k, v: (B, N, h, P), rotated by their positions on the grid; views of one buffer are fine.
        tiling: where the windows lie.

    Returns:
        (B, N, h, P), contiguous.

    Raises:
        ValueError: an argument has a wrong shape, dtype or layout; the message names it.
    """
    _check(q, k, v, tiling)
    if forms.chosen("window", q.device, q.dtype) == "torch":
        return window_attention_ref(q, k, v, tiling)
    from lingen.kernels.window_triton import window_attention_triton

    seen: Tensor = window_attention_triton(q, k, v, tiling)
    return seen


def window_attention_ref(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> Tensor:
    """``window_attention`` in pure torch: windows of the same sides together, at most 3 x 3 x 3 kinds of them."""
    q, k, v = (torch.unflatten(x, 1, tiling.grid) for x in (q, k, v))  # (B, T, H, W, h, P) each
    return _attend((q, k, v), tiling, ()).flatten(1, 3)  # (B, N, h, P)


def _attend(qkv: tuple[Tensor, ...], tiling: Tiling, runs: tuple[Run, ...]) -> Tensor:
    """Cut q, k, v (B, T, H, W, h, P) into runs of equal windows, axis by axis; ``runs`` are those of the axes done."""
    axis = len(runs)
    if axis == 3:
        return _attend_equal(qkv, runs)
    lengths = [windows * side for windows, side in tiling.runs(axis)]
    parts = zip(*(torch.split(x, lengths, dim=1 + axis) for x in qkv), strict=True)
    seen = [_attend(part, tiling, (*runs, run)) for part, run in zip(parts, tiling.runs(axis), strict=True)]
    return torch.cat(seen, dim=1 + axis) if len(seen) > 1 else seen[0]


def _attend_equal(qkv: tuple[Tensor, ...], runs: tuple[Run, ...]) -> Tensor:
    """q, k, v (B, T', H', W', h, P), a box that windows of one size fill: one attention in all of them."""
    shape, ((count_t, t), (count_h, h), (count_w, w)) = qkv[0].shape, runs
    sides = (shape[0], count_t, t, count_h, h, count_w, w, *shape[4:])
    windows = (x.reshape(sides).permute(0, 1, 3, 5, 7, 2, 4, 6, 8) for x in qkv)  # (B, G's sides, h, n's sides, P)
    q, k, v = (x.reshape(-1, shape[4], t * h * w, shape[5]) for x in windows)  # (B*G, h, n, P)
    seen = sdpa(q, k, v)  # (B*G, h, n, P)
    seen = seen.reshape(shape[0], count_t, count_h, count_w, shape[4], t, h, w, shape[5])
    return seen.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(shape)  # (B, T', H', W', h, P)


def _check(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> None:
    check_qkv(q, k, v)
    tokens = math.prod(tiling.grid)
    if q.shape[1] != tokens:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; it must have the N = {tokens} tokens of the grid {tiling.grid}"
        )
