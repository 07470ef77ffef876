from __future__ import annotations

import json
import math
import random

import pytest

from lingen.guard import Guard
from lingen.operation_config import GuardConfig

BOTH = GuardConfig(loss_deviations=6, grad_deviations=6, window=20)
BUCKET = "17x64x64"


def feed(guard: Guard, steps: int, *, seed: int = 0, bucket: str = BUCKET) -> None:
    """Steps with a loss of about 1 and a gradient norm of about e."""
    chance = random.Random(seed)
    for _ in range(steps):
        guard.note(bucket, chance.gauss(1, 0.1), math.exp(chance.gauss(1, 0.2)), refused=False)


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (math.nan, 1.0, "loss=nan is not finite"),
        (-math.inf, 1.0, "loss=-inf is not finite"),
        (1.0, math.inf, "grad_norm=inf is not finite"),
        (1.0, 1e9, None),
    ],
)
def test_what_is_not_finite_is_refused_from_the_first_step_on(loss: float, norm: float, said: str | None) -> None:
    assert Guard(GuardConfig()).reason(BUCKET, loss, norm) == said


def test_a_spike_is_named_with_its_deviations() -> None:
    guard = Guard(GuardConfig(loss_deviations=4, grad_deviations=4, window=10))
    for n in range(10):
        guard.note(BUCKET, 1.0 + 0.5 * (-1) ** n, math.exp(2 + 0.5 * (-1) ** n), refused=False)
    assert guard.reason(BUCKET, 2.95, 1.0) is None
    assert guard.reason(BUCKET, 3.25, 1.0) == (
        "loss=3.25 is 4.5 deviations above the mean 1 of the last 10 steps of 17x64x64"
    )
    assert guard.reason(BUCKET, 1.0, math.exp(3.9)) is None
    assert guard.reason(BUCKET, 1.0, math.exp(4.5)) == (
        "grad_norm=90.02 is 5.0 deviations above the mean 7.389 of the last 10 steps of 17x64x64"
    )


def test_only_rises_of_what_is_configured_in_a_bucket_that_is_known() -> None:
    guard = Guard(BOTH)
    feed(guard, 19)
    assert guard.reason(BUCKET, 100.0, 1e6) is None  # too few steps
    feed(guard, 1)
    assert guard.reason(BUCKET, 100.0, 1e6) and guard.reason(BUCKET, 1.0, 1e6)
    assert guard.reason(BUCKET, -100.0, 0.0) is None
    assert guard.reason("1x64x64", 100.0, 1e6) is None  # another bucket's steps say nothing
    deaf = Guard(GuardConfig(window=20), guard.state())
    assert deaf.reason(BUCKET, 100.0, 1e6) is None
    half = Guard(GuardConfig(window=20, grad_deviations=6), guard.state())
    assert half.reason(BUCKET, 100.0, math.e) is None and half.reason(BUCKET, 1.0, 1e6)


def test_what_was_refused_moves_no_mean() -> None:
    guard = Guard(BOTH)
    feed(guard, 20)
    said = guard.reason(BUCKET, 3.0, math.e)
    for _ in range(50):
        guard.note(BUCKET, 3.0, math.e, refused=True)
    assert said and guard.reason(BUCKET, 3.0, math.e) == said


def test_the_window_forgets() -> None:
    guard, fresh = Guard(BOTH), Guard(BOTH)
    guard.note(BUCKET, 1e6, 1e6, refused=False)
    feed(guard, 20)
    feed(fresh, 20)
    assert guard.state() == fresh.state()


def test_steps_without_scatter_do_not_make_noise_a_spike() -> None:
    guard = Guard(BOTH)
    for _ in range(20):
        guard.note(BUCKET, 0.5, 0.0, refused=False)
    assert guard.reason(BUCKET, 0.5001, 0.0) is None and guard.reason(BUCKET, 0.51, 0.0)


def test_so_many_in_a_row_and_the_run_goes_back() -> None:
    guard = Guard(GuardConfig(in_a_row=2))
    guard.note(BUCKET, math.nan, math.nan, refused=True)
    assert not guard.must_roll_back
    guard.note("1x64x64", 1.0, 1.0, refused=False)  # a taken step of any bucket ends the row
    guard.note(BUCKET, math.nan, math.nan, refused=True)
    before = guard.state()
    guard.note(BUCKET, math.nan, 0.0, refused=False)  # not one valid sample: it changes nothing
    assert guard.state() == before and guard.in_a_row == 1
    guard.note(BUCKET, math.nan, math.nan, refused=True)
    assert guard.must_roll_back


@pytest.mark.parametrize("at", [0, 7, 33])
def test_resumed_from_json_it_decides_to_the_bit_as_before(at: int) -> None:
    chance, undisturbed = random.Random(3), Guard(BOTH)
    resumed = undisturbed
    said = []
    for step in range(120):
        if step == at:
            resumed = Guard(BOTH, json.loads(json.dumps(undisturbed.state())))
        bucket = chance.choice([BUCKET, "1x64x64"])
        loss, norm = chance.lognormvariate(0, 0.05), chance.lognormvariate(1, 0.2)
        if step > 60 and chance.random() < 0.2:  # the windows are full
            loss *= 3
        if chance.random() < 0.05:
            norm = math.inf
        reasons = [guard.reason(bucket, loss, norm) for guard in (undisturbed, resumed)]
        assert reasons[0] == reasons[1]
        for guard in {id(g): g for g in (undisturbed, resumed)}.values():
            guard.note(bucket, loss, norm, refused=reasons[0] is not None)
        said.append(reasons[0])
    assert resumed is not undisturbed and resumed.state() == undisturbed.state()
    assert sum("deviations" in reason for reason in said if reason) > 3 and said.count(None) > 80
