from __future__ import annotations

import pytest
import torch

from lingen.config import EmaConfig
from lingen.ema import Ema
from lingen.engine import Fragment


def fragment(values: list[float]) -> Fragment:
    master = torch.tensor(values)
    return Fragment("weight", (len(values),), 0, master, torch.zeros_like(master), torch.zeros_like(master))


def test_half_of_the_distance_is_left_after_a_half_life() -> None:
    f = fragment([0.0, 0.0])
    ema = Ema([f], EmaConfig(halflife_samples=100, rampup=1.0))
    f.master.copy_(torch.tensor([1.0, -2.0]))
    for step in range(10):  # from 1,000 samples on, the ramp is over
        ema.update(1000 + 10 * (step + 1), 10)
    torch.testing.assert_close(ema.averages["weight"], torch.tensor([0.5, -1.0]))


def test_the_batch_size_does_not_matter() -> None:
    big, small = fragment([0.0]), fragment([0.0])
    config = EmaConfig(halflife_samples=100, rampup=1.0)
    one, many = Ema([big], config), Ema([small], config)
    big.master.fill_(1.0)
    small.master.fill_(1.0)
    one.update(1000, 64)
    for step in range(8):
        many.update(1000 - 64 + 8 * (step + 1), 8)
    torch.testing.assert_close(one.averages["weight"], many.averages["weight"])


@pytest.mark.parametrize(("seen", "halflife"), [(64, 3.2), (1000, 50.0), (10_000_000, 500_000.0)])
def test_the_half_life_ramps_up_with_the_samples(seen: int, halflife: float) -> None:
    ema = Ema([], EmaConfig(halflife_samples=500_000, rampup=0.05))
    assert ema.decay(seen, 64) == pytest.approx(0.5 ** (64 / halflife))


def test_a_restart_forgets() -> None:
    f = fragment([0.0])
    ema = Ema([f], EmaConfig())
    f.master.fill_(4.0)
    assert ema.averages["weight"].item() == 0.0
    ema.restart()
    assert ema.averages["weight"].item() == 4.0


def test_a_rank_may_own_nothing() -> None:
    """A partition may leave some ranks without a parameter, and torch refuses to average an empty list."""
    ema = Ema([], EmaConfig())
    assert ema.averages == {}
    ema.update(64, 64)
    ema.restart()
    assert ema.averages == {}
