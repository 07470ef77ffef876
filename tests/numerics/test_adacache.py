"""AdaCache's reference decisions equal those of the published code, written here once more in plain numbers."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lingen.adacache_config import Codebook, MoReg
from lingen.errors import UserError
from lingen.sampling.adacache import reference_schedule

Frames = list[list[float]]  # T frames of a probe
FAST_30 = {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.00: 1}
SLOW_30 = {0.08: 3, 0.16: 2, 0.24: 1, 0.32: 1, 0.40: 1, 1.00: 1}
FAST_100 = {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.00: 3}


def ratio(a: float, b: float) -> float:
    """a / b as floating-point hardware has it."""
    if b == 0.0:
        return math.nan if a == 0.0 or math.isnan(a) else math.inf
    return a / b


def l1(frames: Frames) -> float:
    return math.fsum(abs(x) for frame in frames for x in frame)


def difference(a: Frames, b: Frames) -> Frames:
    return [[x - y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def oracle(
    probes: list[Frames | None], book: dict[float, int], window: tuple[int, int] | None = None
) -> tuple[list[bool], float]:
    """The published loop over scalars: the decisions, and how near (relatively) a change came to a threshold."""
    total, thresholds, rates = len(probes), list(book), list(book.values())
    forward, previous_compute, rate, previous_motion = 0, 0, 1, 1.0
    cache: Frames | None = None
    computed, margin = [], math.inf
    for probe in probes:
        forward += 1
        active = forward == previous_compute + rate or forward in [1, total - 1, total]
        computed.append(active)
        if not active:
            continue
        assert probe is not None
        if cache is not None:
            change = ratio(l1(difference(cache, probe)), l1(cache)) / rate
            if window is not None:
                motion = 1.0
                if window[0] <= forward <= window[1]:
                    moved = ratio(l1(difference(probe[1:], probe[:-1])), l1(probe[1:]) + l1(probe[:-1]))
                    motion = (1 / 0.385 * moved) ** 8
                gradient = 10 * (motion - previous_motion) / rate
                previous_motion = motion
                change *= motion + abs(gradient)
            new = rates[-1]
            for i in range(5):
                if change < thresholds[i]:
                    new = rates[i]
                    break
            margin = min([margin, *(abs(change / threshold - 1) for threshold in thresholds[:5])])
            rate = new
        cache, previous_compute = probe, forward
    return computed, margin


def walk(rng: random.Random, calls: int, frames: int, size: int) -> list[Tensor]:
    """Probes that change by random amounts, calm and wild, from call to call and from frame to frame."""
    still, wild = rng.uniform(0.0, 0.6), rng.uniform(0.0, 0.5)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    picture = torch.randn(1, size, generator=generator)
    probe = picture + rng.uniform(0.3, 1.3) * torch.randn(frames, size, generator=generator)
    probes = []
    for _ in range(calls):
        step = still * rng.random() + (wild if rng.random() < 0.2 else 0.0)
        probe = probe + step * torch.randn(frames, size, generator=generator)
        probes.append(probe.clone())
    return probes


@pytest.mark.parametrize(
    ("calls", "book", "window"),
    [
        (30, FAST_30, None),
        (30, SLOW_30, None),
        (100, FAST_100, None),
        (30, FAST_30, (4, 26)),
        (30, SLOW_30, (4, 26)),
        (100, FAST_100, (10, 90)),
        *((calls, FAST_30, (1, 3)) for calls in range(1, 8)),
    ],
)
def test_decisions_equal_those_of_the_published_code(
    calls: int, book: dict[float, int], window: tuple[int, int] | None
) -> None:
    rng = random.Random(f"{calls} {book} {window}")
    schedules = set()
    for _ in range(60 if calls < 50 else 15):
        probes = walk(rng, calls, frames=rng.randint(2, 5), size=rng.randint(3, 12))
        expected, margin = oracle([p.tolist() for p in probes], book, window)
        if margin < 1e-5:
            continue  # fp32 may fall to the other side
        assert reference_schedule(probes, calls, book, window) == expected
        schedules.add(tuple(expected))
    assert len(schedules) > (10 if calls >= 30 else 0)  # the cases do reach different decisions


def test_guards_and_the_first_two_calls() -> None:
    still = [torch.ones(2, 3)] * 30
    computed = [i + 1 for i, hit in enumerate(reference_schedule(still, 30, FAST_30)) if hit]
    assert computed == [1, 2, 8, 14, 20, 26, 29, 30]  # 2 since the rate is 1 at first; then the longest, to the guards


def test_a_call_after_the_window_sees_a_false_gradient() -> None:
    """1% of change a call in frames that are all alike: the motion is 0 inside the window, so the change counts as none
    there, tenfold where the window begins, and sixfold where it has ended at a rate of 2."""
    probes = [torch.full((2, 4), 1.01**i) for i in range(14)]
    book = {0.05: 2, 0.051: 1, 0.052: 1, 0.053: 1, 0.054: 1, 1.0: 1}
    computed = reference_schedule(probes, 14, book, (2, 5))
    assert computed == oracle([p.tolist() for p in probes], book, (2, 5))[0]
    assert [i + 1 for i, hit in enumerate(computed) if hit] == [1, 2, 3, 5, 7, 8, 10, 12, 13, 14]


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("window", [None, (4, 26)])
def test_what_is_no_number_takes_the_last_rate(value: float, window: tuple[int, int] | None) -> None:
    probes = [torch.full((3, 4), value)] * 30
    expected = oracle([p.tolist() for p in probes], FAST_30, window)[0]
    assert reference_schedule(probes, 30, FAST_30, window) == expected == [True] * 30


def test_one_frame_has_no_motion() -> None:
    still = [torch.ones(1, 3)] * 30
    assert reference_schedule(still, 30, FAST_30, (4, 26)) == oracle([p.tolist() for p in still], FAST_30, (4, 26))[0]


def test_sums_overflow_in_fp16_and_take_the_last_rate() -> None:
    probes = [torch.full((2, 100), 1000.0 * (-1) ** i, dtype=torch.float16) for i in range(30)]  # inf / inf
    assert reference_schedule(probes, 30, SLOW_30) == [True] * 30
    assert reference_schedule([p / 2**8 for p in probes], 30, {9.0: 3, 1.0: 1})[2:4] == [False, False]


def test_probes_of_calls_that_are_not_computed_are_not_looked_at() -> None:
    probes = walk(random.Random(3), 30, 3, 8)
    expected = reference_schedule(probes, 30, FAST_30, (4, 26))
    assert not all(expected)
    seen: list[Any] = [probe if hit else None for probe, hit in zip(probes, expected, strict=True)]
    assert reference_schedule(seen, 30, FAST_30, (4, 26)) == expected


def test_all_forms_of_a_codebook_and_of_moreg_mean_the_same() -> None:
    probes = walk(random.Random(5), 30, 3, 8)
    entries = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2))
    books: list[Any] = [FAST_30, list(FAST_30.items()), (entries, 1), [*entries, 1], Codebook(entries, 1)]
    books += [(dict(entries), 1), [*entries, (math.inf, 1)], torch.tensor([*entries, (1.0, 1)], dtype=torch.float64)]
    moregs: list[Any] = [True, (4, 26), {"window": [4, 26]}, {"scale": 0.385}, MoReg(window=(4, 26))]
    schedules = [reference_schedule(probes, 30, book, moreg) for book in books for moreg in moregs]
    assert all(schedule == schedules[0] for schedule in schedules)
    assert all(reference_schedule(probes, 30, book) == [True] * 30 for book in ({1.0: 1}, [1], ((), 1)))
    assert reference_schedule(probes, 30, [(0.5, 3), 1]) == reference_schedule(probes, 30, (((0.5, 3),), 1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 29}, "30 for num_steps=29"),
        ({"codebook": {}}, "cannot be read"),
        ({"codebook": 3}, "cannot be read"),
        ({"codebook": {0.2: 2, 0.1: 3, 1.0: 1}}, "ascend"),
        ({"codebook": {-0.2: 2, 1.0: 1}}, "above 0"),
        ({"codebook": {0.2: 0, 1.0: 1}}, "rate"),
        ({"codebook": {0.2: 1.5, 1.0: 1}}, "rate"),
        ({"codebook": [(0.2, 2), {}]}, "cannot be read"),
        ({"moreg": (26, 4)}, "moreg"),
        ({"moreg": {"window": 4}}, r"moreg=\{'window': 4\}: window=4: "),
        ({"moreg": {"windows": (4, 26)}}, "moreg"),
        ({"moreg": {"window": (4, 26), "strides": [0]}}, "moreg"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"probes": [torch.ones(2, 2)] * 30, "num_steps": 30, "codebook": FAST_30}
    with pytest.raises(UserError, match=message):
        reference_schedule(**good | changed)
    with pytest.raises(UserError, match="published for 30 and 100"):
        reference_schedule([torch.ones(2, 2)] * 9, 9, FAST_30, True)
