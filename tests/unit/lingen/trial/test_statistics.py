"""Curves at equal cost, and ranks, on numbers whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data.checks import travel
from data.synthetic import render_clip
from lingen.evaluation.result import Measured
from lingen.trial.motion import rank_correlation
from lingen.trial.statistics import Draws, Line, between, line, over

VIDEOS = 40
DRAWS = Draws.of(range(VIDEOS))


def run(flops: float, psnr: Any) -> Measured:
    values = {"flops": np.full(VIDEOS, flops), "psnr": np.broadcast_to(np.asarray(psnr, float), VIDEOS)}
    return Measured(None, values, {}, {}, {})  # type: ignore[arg-type]


def test_a_curve_is_read_between_its_points() -> None:
    base = Measured(None, {"flops": np.full(VIDEOS, 100.0)}, {}, {}, {})  # type: ignore[arg-type]
    noise = np.random.default_rng(1).normal(0, 1, VIDEOS)
    curve = [run(60, 30 + noise), run(40, 20 + noise)]
    better = over(run(50, 26 + noise), curve, base, "psnr", DRAWS)
    assert better.value == pytest.approx(1.0) and better.low == pytest.approx(1.0)  # the noise is shared: paired
    assert np.isnan(over(run(90, 26), curve, base, "psnr", DRAWS).value)  # nothing there to compare with
    assert over(run(61, 30), curve, base, "psnr", DRAWS).value == pytest.approx(-noise.mean())
    apart = between(run(50, 26 + noise), run(50, 25), "psnr", DRAWS)
    assert apart.low is not None and apart.high is not None and apart.low < 1 + noise.mean() < apart.high
    read = line(curve, base, "psnr", DRAWS)
    assert read.cost.shape == (1001, 2) and read.cost[0].tolist() == [0.4, 0.6]


def test_the_cheapest_that_is_good_enough_is_found() -> None:
    cost, quality = np.array([[0.3, 0.5, 0.7]] * 3), np.array([[20, 30, 25.0], [28, 30, 31], [10, 20, 26]])
    found = Line(cost, quality).cheapest(27)
    assert found[0] == pytest.approx(0.44) and found[1] == 0.3 and np.isnan(found[2])


def test_resamples_draw_whole_prompts() -> None:
    counts = Draws.of(["a", "b", "a", "c"]).counts
    assert (counts[:, 0] == counts[:, 2]).all() and (counts[:, 0] != counts[:, 1]).any()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()


def test_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=VIDEOS)
    assert rank_correlation(a, np.exp(a), range(VIDEOS)).value == pytest.approx(1)
    b = np.where(np.arange(VIDEOS) < 3, np.nan, -a)
    found = rank_correlation(a, b, range(VIDEOS))
    assert found.value == pytest.approx(-1) and found.low == pytest.approx(-1)
    ties = rank_correlation(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 3, 4]), range(4))
    assert ties.value == pytest.approx(0.948683298)  # as scipy.stats.spearmanr has it


def test_travel_is_the_speed_of_the_shape() -> None:
    moving, still = (
        next(clip for clip, text in (render_clip(0, n, frames=17, size=64) for n in range(60)) if word in text)
        for word in ("moving left", "standing still")
    )
    assert 0.35 / 17 < travel(moving) < 0.55 / 16  # 0.7 to 1 of half the screen, in 16 steps
    assert travel(still) < 0.002
    assert np.isnan(travel(np.full((5, 64, 64, 3), 90, np.uint8)))
