"""Killed at random moments, also amid a save, two ranks go on bit for bit; and one rank alone, closely."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import common
from tests.cluster.plain import Ranks, moment, victims

MODEL = "model=dit"  # the quicker one; test_slurm.py has both


def train(words: list[str], world: int = 2) -> None:
    with Ranks(words, world) as ranks:
        codes, output = ranks.wait()
    assert codes == [0] * world, output


@pytest.fixture(scope="module")
def undisturbed(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("plain")
    train(common.words(world, runs, "undisturbed", MODEL))
    return runs / "undisturbed"


def test_killed_at_random_moments_it_goes_on_bit_for_bit(undisturbed: Path, world: Any) -> None:
    words, run = common.words(world, undisturbed.parent, "killed", MODEL), undisturbed.parent / "killed"
    chance = random.Random(0)
    for saving in (False, True):
        with Ranks(words) as ranks:
            alive = moment(ranks, run, chance, saving=saving)
            ranks.kill(*victims(chance))
            codes, output = ranks.wait()
        assert alive and 0 not in codes, output
    train(words)
    assert not common.differences(run, undisturbed)


def test_the_other_rank_may_stay_away(undisturbed: Path, world: Any) -> None:
    """Begun by two and finished by one: the losses differ by rounding alone."""
    words, run = common.words(world, undisturbed.parent, "elastic", MODEL), undisturbed.parent / "elastic"
    with Ranks(words) as ranks:
        ranks.run_until(run, common.STEPS // 2)
        ranks.kill(0, 1)
        codes, output = ranks.wait()
    assert 0 not in codes, output
    train(words, world=1)
    ours, theirs = common.records(run), common.records(undisturbed)
    assert [common.moment_of(record) for record in ours] == [common.moment_of(record) for record in theirs]
    for here, there in zip(ours, theirs, strict=True):
        if there["kind"] != "transfer":
            assert here["loss"] == pytest.approx(there["loss"], rel=1e-5), common.moment_of(here)
