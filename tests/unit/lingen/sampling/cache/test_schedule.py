"""Schedules that are given are what is computed, of each sample its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lingen.cache_config import read_cache
from lingen.errors import UserError
from tests.caches import STEPS, generate, model, schedules, start

SEEDS = [0, 3, 1]
GIVEN = ["11111111", "10010011", "10101001"]


def run_of(given: list[str], name: str = "dit", **more: Any) -> Any:
    return start(model(name), {"policy": "schedule", "schedules": given, **more})


@pytest.mark.parametrize("name", ["dit", "lingen"])
def test_each_sample_has_its_schedule_and_its_flops(name: str) -> None:
    run = run_of(GIVEN, name)
    together = generate(run.forward, SEEDS)
    assert schedules(run) == [[call == "1" for call in schedule] for schedule in GIVEN]
    flops = run.summary().sample_flops
    for place, (seed, schedule) in enumerate(zip(SEEDS, GIVEN, strict=True)):
        alone = run_of([schedule], name)
        assert torch.allclose(generate(alone.forward, [seed])[0], together[place], atol=1e-5)
        assert alone.summary().sample_flops == [flops[place]]
    assert run.summary().executed_flops == sum(flops) and flops[0] > flops[1]
    assert run.summary().full_flops == 3 * flops[0]


def test_adacache_is_what_its_own_schedules_make() -> None:
    """Bit for bit: so shuffled schedules differ from it by the shuffling alone."""
    adacache = start(model("dit"), {"policy": "adacache", "codebook": [[0.3, 3], [0.42, 2]]})
    expected = generate(adacache.forward, SEEDS)
    given = ["".join("01"[computed] for computed in schedule) for schedule in schedules(adacache)]
    assert len(set(given)) > 1
    assert torch.equal(generate(run_of(given).forward, SEEDS), expected)


def test_one_schedule_is_for_all() -> None:
    run = run_of(["10110101"])
    generate(run.forward, SEEDS)
    assert schedules(run) == [[call == "1" for call in "10110101"]] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["101", "111"], f"schedules are of 3 calls; this generation has {STEPS}"),
        (["10110101", "101"], "have \\[3, 8\\]"),
        (["01110101"], "should match"),
        ([], "at least 1"),
    ],
)
def test_a_wrong_schedule_is_said(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_of(given)


def test_too_few_schedules_are_said() -> None:
    with pytest.raises(UserError, match="2 schedules for 3 videos"):
        generate(run_of(GIVEN[:2]).forward, SEEDS)


def test_some_samples_have_their_schedules() -> None:
    config: Any = read_cache({"policy": "schedule", "schedules": GIVEN})
    assert config.of([2, 0]).schedules == (GIVEN[2], GIVEN[0])
    one: Any = read_cache({"policy": "schedule", "schedules": GIVEN[:1]})
    assert one.of([2, 0]) == one
