"""MoReg's motion score beside what really moves: how well it ranks videos, call by call.

Shapes: N videos; K calls at which there is a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.checks import travel
from data.synthetic import DIRECTIONS, parse_caption
from lingen.adacache_config import AdaCacheConfig
from lingen.calibration import Ground, Told
from lingen.evaluation.folder import SampledRun
from lingen.evaluation.statistics import Floats, Interval
from lingen.sampling.cache.adacache import FixedPolicy, adacache_policies
from lingen.trial.statistics import Draws
from lingen.trial.variants import WINDOW


@dataclass(frozen=True)
class Scores:
    """MoReg's motion r (arXiv 2411.02397, equation 7) with every call computed."""

    calls: list[int]  # K, counted from 1
    values: Floats  # (N, K)

    def in_window(self, steps: int) -> Floats:
        """The mean over the published window: (N,)."""
        inside = [WINDOW[0] * steps <= call <= WINDOW[1] * steps for call in self.calls]
        values: Floats = self.values[:, inside or slice(None)].mean(1)
        return values

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {"calls": self.calls, "values": self.values.tolist()}


def motion_scores(ground: Ground, told: Told) -> Scores:
    """Sample the videos of ``ground`` without skipping, and keep every call's score."""
    every = {"policy": "adacache", "codebook": [], "moreg": {"window": [1, ground.calls]}, "guards": {"last": 0}}
    config = AdaCacheConfig.model_validate(every)
    told("motion scores", len(ground.prompts))
    rows, calls = list[list[float]](), list[int]()
    for policies in ground.measure(lambda: adacache_policies(config, ground.pipeline.model, ground.calls)):
        policy = next(iter(policies.values()))
        assert isinstance(policy, FixedPolicy)
        for sample in policy.measured:
            calls = [one.call for one in sample]
            rows.append([float("nan") if one.motion is None else one.motion for one in sample])
        told(None, len(policy.measured))
    return Scores(calls, np.array(rows))


@dataclass(frozen=True)
class Truth:
    """What moves in the videos, (N,) each."""

    speed: Floats  # of the shape's middle, in shares of the screen a frame; nan where there is no shape to be seen
    asked: Floats  # 1 where the caption asks the shape to go somewhere, 0 where not
    change: Floats  # mean difference of neighbouring frames, of 255: whatever moves, the background too


def true_motion(run: SampledRun) -> Truth:
    """Of a run's videos."""
    rows = []
    for number, video in enumerate(run.file.videos):
        pixels = run.pixels(number)  # (3, F, H, W)
        change = float((pixels[:, 1:].float() - pixels[:, :-1].float()).abs().mean())
        rows.append((travel(pixels.numpy()), float(parse_caption(video.prompt).motion in DIRECTIONS), change))
    speed, asked, change_ = np.array(rows).T
    return Truth(speed, asked, change_)


def rank_correlation(a: Floats, b: Floats, groups: Sequence[object]) -> Interval:
    """Spearman's, of the videos where both are known, with its bootstrap interval."""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    value = _spearman(a, b)
    draws = Draws.of([group for group, here in zip(groups, known, strict=True) if here])
    again = [_spearman(np.repeat(a, times), np.repeat(b, times)) for times in draws.counts]
    return draws.interval(value, np.array(again))


def _spearman(a: Floats, b: Floats) -> float:
    if len(a) < 3:
        return float("nan")
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / size if size else float("nan")


def _ranks(values: Floats) -> Floats:
    """Equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[place]
    return ranks
