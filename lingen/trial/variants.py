"""What the trial compares: as data, in curves from cheap to dear.

Shapes: N calls of a generation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lingen.cache_config import read_cache
from lingen.evaluation.settings import Variant

UNCACHED, REFERENCE = "uncached", "many-steps"
FEWER, FIXED, TAYLOR, ADACACHE = "fewer steps", "fixed interval", "fixed, taylor", "AdaCache"
SHUFFLED, COMMON = "AdaCache, others' schedules", "AdaCache, commonest schedule"
MOREG, MOREG_SCALED, ADA_TAYLOR = "AdaCache + MoReg", "AdaCache + scaled MoReg", "AdaCache, taylor"
PUBLISHED, PUBLISHED_CODE = "published codebooks", "published code"
REFERENCE_MODE = "AdaCache, reference mode"
WINDOW = (4 / 30, 26 / 30)  # of the calls, in which published MoReg counts motion


@dataclass(frozen=True)
class Way:
    """A variant, and the share of the uncached FLOPs that it should take: for the estimate alone."""

    variant: Variant
    share: float
    alone: bool = False  # decides for a whole batch as one, and is therefore sampled video by video


@dataclass(frozen=True)
class Wanted:
    """A cache that is to be fitted until it skips this share of the FLOPs."""

    name: str
    curve: str
    cache: dict[str, Any]
    skip: float


def moreg(steps: int, scale: float = 0.385) -> dict[str, Any]:
    """MoReg's keys, with the published window carried over to so many calls."""
    return {"window": [max(1, round(WINDOW[0] * steps)), round(WINDOW[1] * steps)], "scale": scale}


def even(steps: int, computed: int, first: int = 1) -> str:
    """A schedule whose computed calls are evenly spaced, the first ones and the last one among them."""
    places = {*range(first), *np.linspace(first - 1, steps - 1, max(2, computed - first + 1)).round().astype(int)}
    return "".join("1" if call in places else "0" for call in range(steps))


def given(steps: int, reference_steps: int, skips: Sequence[float], cached_share: float, *, every: bool) -> list[Way]:
    """Those that nothing has to be fitted for.

    Args:
        cached_share: of the FLOPs that lie in the blocks; what is around them is always computed.
        every: all of them, not the core alone.
    """

    def way(name: str, curve: str, share: float, cache: Any, alone: bool = False) -> Way:
        return Way(Variant(name=name, curve=curve, cache=cache, steps=steps), share, alone)

    ways = [
        Way(Variant(name=UNCACHED, steps=steps), 1.0),
        Way(Variant(name=REFERENCE, steps=reference_steps), reference_steps / steps),
    ]
    for skip in skips:
        fewer = max(1, round(steps * (1 - skip)))
        ways.append(Way(Variant(name=f"steps-{fewer}", curve=FEWER, steps=fewer), fewer / steps))
        computed = max(2, steps - round(skip / cached_share * steps))
        schedule, ahead = even(steps, computed), even(steps, max(4, computed), first=3)
        ways += [
            way(f"fixed-{computed}", FIXED, 1 - skip, {"policy": "schedule", "schedules": [schedule]}),
            way(f"taylor-{computed}", TAYLOR, 1 - skip,
                {"policy": "schedule", "schedules": [ahead], "reuse": "taylor"}),
        ]  # fmt: skip
    ways += [
        way("pab-slow", "PAB", 0.9, "pab_slow"),
        way("pab-357", "PAB", 0.87, {"policy": "pab", "spatial": 3, "temporal": 5, "cross": 7}),
        way("pab-fast", "PAB", 0.85, "pab_fast"),
        way("pab-wide", "PAB", 0.7, {"policy": "pab", "spatial": 2, "temporal": 4, "cross": 6, "window": [0.05, 0.98]}),
        way("tgate-70", "T-GATE", 0.92, {"policy": "tgate", "gate": 0.7}),
        way("tgate-40", "T-GATE", 0.85, "tgate"),
        way("tgate-20", "T-GATE", 0.8, {"policy": "tgate", "gate": 0.2}),
        way("delta-dit-2", "Delta-DiT", 0.75, "delta_dit"),
        way("delta-dit-3", "Delta-DiT", 0.67, {"policy": "delta_dit", "period": 3}),
        way("delta-dit-4-75", "Delta-DiT", 0.45, {"policy": "delta_dit", "period": 4, "blocks": 0.75}),
        way("published-fast", PUBLISHED, 0.6, "adacache_fast"),
        way("published-slow", PUBLISHED, 0.7, "adacache_slow"),
    ]
    if every:
        ways += [
            way("published-fast-moreg", PUBLISHED, 0.7, published("adacache_fast", moreg=moreg(steps))),
            way("code-fast", PUBLISHED_CODE, 0.6, published("adacache_fast", mode="reference"), True),
            way("code-slow", PUBLISHED_CODE, 0.7, published("adacache_slow", mode="reference"), True),
            way("code-fast-moreg", PUBLISHED_CODE, 0.7,
                published("adacache_fast", mode="reference", moreg=moreg(steps)), True),
        ]  # fmt: skip
    seen: set[str] = set()  # two shares may come to the same number of steps
    return [one for one in ways if not (one.variant.name in seen or seen.add(one.variant.name))]  # type: ignore[func-returns-value]


def published(name: str, **changes: Any) -> dict[str, Any]:
    """A cache of conf/cache, with other values."""
    return read_cache(name).model_dump(mode="json") | changes


def fitted(steps: int, skips: Sequence[float], scale: float, *, every: bool) -> list[Wanted]:
    """Those that are fitted, each at every share; ``scale``: the model's own motion, for MoReg."""
    plain: dict[str, Any] = {"policy": "adacache", "codebook": []}
    kinds = [
        ("adacache", ADACACHE, plain),
        ("moreg", MOREG, plain | {"moreg": moreg(steps)}),
        ("teacache", "TeaCache", {"policy": "teacache"}),
        ("first-block", "first block", {"policy": "first_block"}),
        ("magcache", "MagCache", {"policy": "magcache", "ratios": "unread"}),
    ]
    if every:
        kinds.append(("moreg-scaled", MOREG_SCALED, plain | {"moreg": moreg(steps, scale)}))
    return [Wanted(f"{name}-{round(100 * skip)}", curve, cache, skip) for name, curve, cache in kinds for skip in skips]


def derived(name: str, skip: float, cache: dict[str, Any], steps: int, *, every: bool) -> list[Way]:
    """From a fitted AdaCache the same with what it stores extrapolated, and as the published code would run it."""
    suffix, share = name.removeprefix("adacache"), 1 - skip
    taylor, code = cache | {"reuse": "taylor"}, cache | {"mode": "reference"}
    made = [Way(Variant(name=f"adacache-taylor{suffix}", curve=ADA_TAYLOR, cache=taylor, steps=steps), share)]
    if every:
        variant = Variant(name=f"adacache-code{suffix}", curve=REFERENCE_MODE, cache=code, steps=steps)
        made.append(Way(variant, share, alone=True))
    return made


def controls(name: str, schedules: Sequence[str], steps: int, *, every: bool) -> list[Variant]:
    """From the schedules that AdaCache gave N videos: each video with another's, and all with the commonest."""
    suffix = name.removeprefix("adacache")
    shuffled = [schedules[place] for place in derangement(len(schedules))]
    common, _ = Counter(schedules).most_common(1)[0]

    def variant(kind: str, curve: str, chosen: list[str]) -> Variant:
        return Variant(
            name=f"{kind}{suffix}", curve=curve, cache={"policy": "schedule", "schedules": chosen}, steps=steps
        )

    made = [variant("shuffled", SHUFFLED, shuffled)]
    return [*made, variant("commonest", COMMON, [common])] if every else made


def derangement(count: int) -> list[int]:
    """A permutation that leaves nobody in place: one random cycle through all (Sattolo 1986), always the same."""
    places, rng = list(range(count)), np.random.default_rng(0)
    for last in range(count - 1, 0, -1):
        other = int(rng.integers(last))
        places[last], places[other] = places[other], places[last]
    return places
