"""Means that say how far to trust them.

Videos of one prompt resemble each other, so the bootstrap draws prompts, not videos (Davison and Hinkley 1997, section
3.8), and a difference of two runs is taken video by video before it is averaged. All random numbers are fixed.

Shapes: N videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 4000
LEVEL = 0.95  # of all intervals
Z = 1.959963984540054  # a standard normal lies within +-Z with that probability
WORST = 0.05  # share of the videos


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval of 95%; None where there is but one prompt, which says nothing of others."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """One metric of one run."""

    mean: Interval
    spread: float  # standard deviation over videos; 0 of a single one
    worst: float  # mean of the worst 5%, one video at least
    count: int


def summarize(values: Floats, groups: Sequence[object], *, higher_is_better: bool, yes_or_no: bool = False) -> Summary:
    """Mean, spread and worst of (N,) values, which are 1 and 0 alone where ``yes_or_no``; ``groups`` names each video's
    prompt."""
    most = max(1, math.ceil(WORST * len(values)))
    ordered = np.sort(values)
    worst = ordered[:most] if higher_is_better else ordered[-most:]
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    mean = mean_interval(values, groups)
    if yes_or_no and mean.low is not None and spread == 0:
        # All right or all wrong: no resample differs, but other prompts might.
        prompts = len(set(groups))
        mean = wilson(prompts if values[0] else 0, prompts)
    return Summary(mean, spread, float(worst.mean()), len(values))


def mean_interval(values: Floats, groups: Sequence[object]) -> Interval:
    """The mean of (N,) values."""
    return ratio_interval(values, np.ones_like(values), groups)


def ratio_interval(above: Floats, below: Floats, groups: Sequence[object]) -> Interval:
    """The ratio of two sums over the same videos, (N,) each: how much faster one run was than another, say."""
    value = float(above.sum() / below.sum())
    _, places = np.unique([repr(group) for group in groups], return_inverse=True)
    number = int(places.max()) + 1
    if number < 2:
        return Interval(value, None, None)
    sums = [np.bincount(places, part, number) for part in (above, below)]  # (prompts,) each
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)  # how often each prompt
    ratios = (drawn @ sums[0]) / (drawn @ sums[1])  # (resamples,)
    low, high = np.quantile(ratios, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(value, float(low), float(high))


def wilson(wins: int, votes: int) -> Interval:
    """The share of wins among votes with Wilson's score interval (1927); without votes anything is possible."""
    if not votes:
        return Interval(0.5, 0.0, 1.0)
    share = wins / votes
    middle = (share + Z**2 / (2 * votes)) / (1 + Z**2 / votes)
    half = Z / (1 + Z**2 / votes) * math.sqrt(share * (1 - share) / votes + Z**2 / (4 * votes**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))
