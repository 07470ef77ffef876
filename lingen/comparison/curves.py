"""A loss curve within one stage, and the few measurements that everything else is made of.

Shapes: N records of one stage. A curve never spans a transfer, so nothing here can mix two stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.float64]

AXES = ("samples", "tokens", "flops", "hours")


@dataclass(frozen=True)
class Curve:
    """Losses of one stage in the order of training, each with the counts at which it was measured."""

    counts: dict[str, Array]  # axis -> (N,), never falling; they run on across stages
    loss: Array  # (N,)

    def __len__(self) -> int:
        return len(self.loss)

    def at(self, i: int) -> dict[str, float]:
        """The counts of record ``i``."""
        return {axis: float(self.counts[axis][i]) for axis in AXES}


@dataclass(frozen=True)
class Crossing:
    """Where a curve reaches a level: what it cost since ``start``, and the two records that bracket it."""

    cost: dict[str, float]  # axis -> count since the start of the stage, interpolated between the two records
    between: tuple[float, float]  # samples since the start of the stage


def window_of(curve: Curve, smoothing: int) -> int:
    """Records in the smoothing window: ``smoothing``, but at most a fifth of a short stage."""
    return max(1, min(smoothing, len(curve) // 5))


def default_smoothing(curves: Iterable[Curve]) -> int:
    """Records in the window where nobody asks for a number: 2% of the longest stage, and 15 at least."""
    return max(15, max((len(curve) for curve in curves), default=0) // 50)


def window_mean(curve: Curve, smoothing: int) -> Curve:
    """Mean over each full window of the stage, placed at the window's mean counts: (N,) -> (N - window + 1,).

    No window is padded or cut short, so the line starts half a window after a transfer and ends half a window before
    the next, and no value of another stage enters it.
    """
    if not len(curve):
        return curve
    window = window_of(curve, smoothing)
    counts = {axis: sliding_window_view(x, window).mean(-1) for axis, x in curve.counts.items()}
    return Curve(counts, sliding_window_view(curve.loss, window).mean(-1))


def standard_error(values: Array) -> float:
    """Of the mean of ``values`` (N,), taking them as independent; 0 for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def first_at_or_below(curve: Curve, level: float, start: dict[str, float]) -> Crossing | None:
    """Where the curve is first at or below ``level``; None where it never is."""
    hits = np.flatnonzero(curve.loss <= level)
    return _crossing(curve, int(hits[0]), level, start) if len(hits) else None


def below_for_good(curve: Curve, level: float, start: dict[str, float]) -> Crossing | None:
    """From where on every record of the stage is below ``level``; None where the last one is not."""
    misses = np.flatnonzero(curve.loss >= level)
    i = int(misses[-1]) + 1 if len(misses) else 0
    return _crossing(curve, i, level, start) if i < len(curve) else None


def _crossing(curve: Curve, i: int, level: float, start: dict[str, float]) -> Crossing:
    """Record ``i`` is the first on the far side of ``level``; interpolate from the one before it, if there is one."""
    if i == 0:
        here = {axis: value - start[axis] for axis, value in curve.at(0).items()}
        return Crossing(here, (here["samples"], here["samples"]))
    above, below = float(curve.loss[i - 1]), float(curve.loss[i])
    part = (above - level) / (above - below)
    low, high = curve.at(i - 1), curve.at(i)
    cost = {axis: low[axis] + part * (high[axis] - low[axis]) - start[axis] for axis in AXES}
    return Crossing(cost, (low["samples"] - start["samples"], high["samples"] - start["samples"]))


def wobble(curve: Curve) -> float | None:
    """Spread of neighbouring records around their trend, in loss; None for fewer than nine records.

    Each record of the stage's second half (where the curve is no longer steep) is held against the straight line
    between its neighbours. The robust standard deviation of what is left over is what a difference between two runs
    has to exceed clearly before it says anything. It knows nothing of other seeds.
    """
    x, y = curve.counts["samples"][len(curve) // 2 :], curve.loss[len(curve) // 2 :]
    if len(y) < 5:
        return None
    part = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])  # (N-2,) how far between its neighbours a record lies
    residual = y[1:-1] - ((1 - part) * y[:-2] + part * y[2:])
    unit = residual / np.sqrt(1 + part**2 + (1 - part) ** 2)  # of the variance of one record
    return float(np.median(np.abs(unit)) / 0.6745)  # 0.6745: median of |z| of a normal
