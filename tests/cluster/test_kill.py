"""Killed at random moments, also amid a save, two ranks go on bit for bit; and with one rank for a while, closely."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import common
from tests.cluster.plain import Ranks, moment, victims

MODEL = "model=dit"  # the quicker one; test_slurm.py has both


def train(words: list[str]) -> None:
    with Ranks(words) as ranks:
        codes, output = ranks.wait()
    assert codes == [0, 0], output


@pytest.fixture(scope="module")
def undisturbed(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("plain")
    train(common.words(world, runs, "undisturbed", MODEL))
    return runs / "undisturbed"


def test_killed_at_random_moments_it_goes_on_bit_for_bit(undisturbed: Path, world: Any) -> None:
    words, run = common.words(world, undisturbed.parent, "killed", MODEL), undisturbed.parent / "killed"
    chance = random.Random(0)
    for saving in (False, True, True):
        with Ranks(words) as ranks:
            alive = moment(ranks, run, chance, saving=saving)
            ranks.kill(*victims(chance))
            codes, output = ranks.wait()
        assert alive and 0 not in codes, output
    train(words)
    assert not common.differences(run, undisturbed)


def test_one_rank_for_a_while_changes_the_losses_by_rounding(undisturbed: Path, world: Any) -> None:
    words, run = common.words(world, undisturbed.parent, "elastic", MODEL), undisturbed.parent / "elastic"
    for world_size in (2, 1):
        with Ranks(words, world_size) as ranks:
            ranks.run_until(run, common.step(run) + common.STEPS // 2)
            ranks.kill(*range(world_size))
            codes, output = ranks.wait()
        assert 0 not in codes, output
    train(words)
    ours, theirs = common.history(run), common.history(undisturbed)
    assert [record[:4] for record in ours] == [record[:4] for record in theirs]
    for (*where, loss, _), (*_, loss_, _) in zip((r[:6] for r in ours), (r[:6] for r in theirs), strict=True):
        assert loss == (loss_ if loss_ is None else pytest.approx(loss_, rel=1e-5)), where
