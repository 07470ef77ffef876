"""Curves of quality against cost, compared at equal cost, with intervals over the same resampled prompts.

Shapes: N videos; R resamples; P points of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lingen.evaluation.result import Measured
from lingen.evaluation.statistics import LEVEL, Floats, Interval

RESAMPLES = 1000
REACH = 0.025  # of the uncached FLOPs: so far beyond its ends a curve still stands for its end
LOST = 0.025  # share of resamples without a value, beyond which an end of an interval is unknown


@dataclass(frozen=True)
class Draws:
    """How often each resample draws each video: videos of one prompt together, all random numbers fixed."""

    counts: npt.NDArray[np.int64]  # (R, N)

    @staticmethod
    def of(groups: Sequence[object]) -> Draws:
        """``groups`` names each video's prompt."""
        _, places = np.unique([repr(group) for group in groups], return_inverse=True)
        number = int(places.max()) + 1
        drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
        return Draws(drawn[:, places])

    def means(self, values: Floats) -> Floats:
        """(N,) -> (R,)"""
        found: Floats = self.counts @ values / self.counts.sum(1)
        return found

    def interval(self, value: float, again: Floats) -> Interval:
        """From the estimate and what the resamples (R,) make of it; without ends where too many say nothing."""
        known = again[~np.isnan(again)]
        if np.isnan(value) or len(known) < (1 - LOST) * len(again):
            return Interval(value, None, None)
        low, high = np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Line:
    """A curve in one metric: the points' cost, as a share of the uncached FLOPs, and their quality, ascending in cost.
    The first row is of all videos, the other R of the resamples."""

    cost: Floats  # (1 + R, P)
    quality: Floats  # (1 + R, P)

    def at(self, cost: Floats) -> Floats:
        """The quality at these costs (1 + R,), between the points on a straight line; nan where the curve does not
        reach as far."""
        first = cost[0]
        if not self.cost[0, 0] - REACH <= first <= self.cost[0, -1] + REACH:
            return np.full(len(cost), np.nan)
        return np.array([np.interp(x, xs, ys) for x, xs, ys in zip(cost, self.cost, self.quality, strict=True)])

    def cheapest(self, quality: float) -> Floats:
        """The least cost at which the curve comes to this quality (1 + R,); nan where it never does. A curve whose
        cheapest point is good enough is not followed beyond it."""
        return np.array([_cheapest(xs, ys, quality) for xs, ys in zip(self.cost, self.quality, strict=True)])


def _cheapest(cost: Floats, quality: Floats, wanted: float) -> float:
    good = np.flatnonzero(quality >= wanted)
    if not len(good):
        return float("nan")
    first = good[0]
    if not first:
        return float(cost[0])
    (x0, x1), (y0, y1) = cost[first - 1 : first + 1], quality[first - 1 : first + 1]
    return float(x0 + (wanted - y0) / (y1 - y0) * (x1 - x0))


def with_all(values: Floats, draws: Draws) -> Floats:
    """The mean of (N,) values over all videos and over each resample: (1 + R,)."""
    return np.concatenate([[values.mean()], draws.means(values)])


def cost_of(one: Measured, base: Measured, draws: Draws) -> Floats:
    """Its share of the baseline's FLOPs: (1 + R,)."""
    return with_all(one.values["flops"], draws) / with_all(base.values["flops"], draws)


def line(points: Sequence[Measured], base: Measured, key: str, draws: Draws) -> Line:
    """The curve through some runs in one metric. The baseline ends it where it has the metric too: against itself it
    has no PSNR."""
    ends = [base] if key in base.values else []
    runs = [one for one in (*points, *ends) if key in one.values]
    cost = np.stack([cost_of(one, base, draws) for one in runs], 1)
    quality = np.stack([with_all(one.values[key], draws) for one in runs], 1)
    order = np.argsort(cost[0], kind="stable")
    return Line(np.sort(cost, 1), quality[:, order])


def over(one: Measured, points: Sequence[Measured], base: Measured, key: str, draws: Draws) -> Interval:
    """How much better a run is than a curve at the run's own cost; no number where the curve has no such cost."""
    there = line(points, base, key, draws).at(cost_of(one, base, draws))
    found = with_all(one.values[key], draws) - there
    return draws.interval(float(found[0]), found[1:])


def between(one: Measured, other: Measured, key: str, draws: Draws) -> Interval:
    """How much better one run is than another, video by video."""
    found = with_all(one.values[key] - other.values[key], draws)
    return draws.interval(float(found[0]), found[1:])
