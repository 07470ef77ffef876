"""What the trial compares."""

from __future__ import annotations

from collections import Counter

import pytest

from lingen.cache_config import read_cache
from lingen.trial.settings import SKIPS
from lingen.trial.variants import controls, derangement, even, fitted, given


@pytest.mark.parametrize("budget", ["core", "all"])
@pytest.mark.parametrize("steps", [6, 8, 30, 50])
def test_every_variant_can_be_had_and_has_a_name_of_its_own(budget: str, steps: int) -> None:
    skips, every = SKIPS[budget], budget == "all"
    ways = given(steps, 2 * steps, skips, 0.97, every=every)
    names = [way.variant.name for way in ways]
    assert len(names) == len(set(names))
    caches = [way.variant.cache for way in ways if way.variant.cache is not None]
    for cache in [*caches, *(one.cache for one in fitted(steps, skips, 0.5, every=every))]:
        read_cache(cache)
    assert all(way.share > 0 for way in ways)
    assert any(way.alone for way in ways) == every


def test_even_schedules_have_as_many_calls_as_they_should() -> None:
    for steps in (6, 8, 30):
        for computed in range(4, steps + 1):
            for first in (1, 3):
                schedule = even(steps, computed, first)
                assert schedule.count("1") == computed and len(schedule) == steps
                assert schedule.startswith("1" * first) and schedule[-1] == "1"
    gaps = [len(gap) for gap in even(30, 11).split("1")]
    assert max(gaps) == 2


def test_a_derangement_moves_everybody() -> None:
    for count in (2, 3, 8, 256):
        places = derangement(count)
        assert sorted(places) == list(range(count)) and all(i != place for i, place in enumerate(places))
    assert derangement(8) == derangement(8)


def test_controls_shuffle_schedules_and_take_the_commonest() -> None:
    schedules = ["110", "101", "110"]
    shuffled, common = controls("adacache-50", schedules, 3, every=True)
    assert (shuffled.name, common.name) == ("shuffled-50", "commonest-50")
    assert isinstance(shuffled.cache, dict) and isinstance(common.cache, dict)
    assert Counter(shuffled.cache["schedules"]) == Counter(schedules) and common.cache["schedules"] == ["110"]
