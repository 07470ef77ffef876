"""Intervals cover what they should, and are the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from lingen.evaluation.statistics import mean_interval, ratio_interval, summarize, wilson


def test_a_summary_by_hand() -> None:
    values = np.arange(40, dtype=float)
    up, down = (summarize(values, range(40), higher_is_better=better) for better in (True, False))
    assert up.mean.value == 19.5 and up.count == 40
    assert up.spread == pytest.approx(np.sqrt(40 * 41 / 12))
    assert up.worst == 0.5 and down.worst == 38.5  # the mean of two of forty
    alone = summarize(np.array([3.0]), ["x"], higher_is_better=True)
    assert (alone.mean.low, alone.mean.high, alone.spread, alone.worst) == (None, None, 0, 3)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(150):
        found = mean_interval(rng.normal(5, 2, 50), range(50))
        assert found.low is not None and found.high is not None
        covered += found.low < 5 < found.high
        widths.append(found.high - found.low)
    assert 0.89 <= covered / 150 <= 0.985
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / 50**0.5, rel=0.05)


def test_videos_of_one_prompt_count_as_one() -> None:
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(10), 20)
    values = rng.normal(0, 1, 10)[prompts] + rng.normal(0, 0.01, 200)
    naive, honest = mean_interval(values, range(200)), mean_interval(values, prompts.tolist())
    assert naive.high is not None and naive.low is not None and honest.high is not None and honest.low is not None
    assert honest.high - honest.low > 3 * (naive.high - naive.low)
    assert honest == mean_interval(values, prompts.tolist())


def test_a_ratio_is_of_sums() -> None:
    above, below = np.array([10.0, 30.0, 50.0]), np.array([5.0, 10.0, 30.0])
    found = ratio_interval(above, below, "abc")
    assert found.value == 2 and found.low == pytest.approx(50 / 30, abs=0.2) and found.high == pytest.approx(3, abs=0.1)
    twice = ratio_interval(2 * below, below, "abc")
    assert (twice.value, twice.low, twice.high) == (2, 2, 2)


def test_all_right_is_not_certain() -> None:
    right = summarize(np.ones(20), range(20), higher_is_better=True, yes_or_no=True).mean
    assert right.value == 1 and right.low == pytest.approx(0.8389, abs=1e-4) and right.high == 1
    wrong = summarize(np.zeros(20), range(20), higher_is_better=True, yes_or_no=True).mean
    assert wrong.low == 0 and wrong.high == pytest.approx(1 - 0.8389, abs=1e-4)
    same = summarize(np.ones(20), range(20), higher_is_better=True).mean  # an SSIM of 1 is no share of videos
    assert (same.low, same.high) == (1, 1)


def test_wilson_by_its_equation() -> None:
    """The ends are where a share p lies z standard errors from what was seen."""
    for wins, votes in ((0, 7), (3, 10), (50, 100), (7, 7)):
        found = wilson(wins, votes)
        assert found.low is not None and found.high is not None
        for end in (found.low, found.high):
            if 1e-9 < end < 1 - 1e-9:
                assert abs(wins / votes - end) == pytest.approx(1.96 * (end * (1 - end) / votes) ** 0.5, rel=1e-4)
    assert (wilson(0, 7).low, wilson(7, 7).high) == (pytest.approx(0), pytest.approx(1))
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0, 1)
