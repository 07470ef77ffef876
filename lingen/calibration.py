"""Fits a cache to a model, a number of calls, and a wanted share of skipped computation.

Published thresholds do not carry over: how much a residual changes from call to call depends on the model, the sampler
and the number of steps. So everything is measured on generations of the model itself. First each call is computed, and
what the policy decides by is measured. Then one level, from 0 (nothing is skipped) to 1, is searched: each is tried by
sampling with it, and counting the FLOPs that ran.

Shapes: B videos; N calls of a generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from lingen.adacache_config import AdaCacheConfig, GuardsConfig
from lingen.cache_config import CacheConfig, FirstBlockConfig, MagCacheConfig, TeaCacheConfig
from lingen.config import BucketConfig, SamplerConfig, latent_shape, token_grid
from lingen.errors import UserError
from lingen.pipeline import LinGenPipeline
from lingen.sampling.cache import CacheRun
from lingen.sampling.cache.adacache import FixedPolicy, adacache_policies
from lingen.sampling.cache.magcache import MeasureNorms, mean_ratios, write_ratios
from lingen.sampling.cache.measured import relative_change
from lingen.sampling.cache.policy import Front, Policy, Seen
from lingen.sampling.cache.record import Costs
from lingen.sampling.call import Call, Context
from lingen.sampling.guidance import contexts
from lingen.sampling.noise import draw_noise, generators
from lingen.sampling.solver import evaluations

DEGREE = 4  # of TeaCache's polynomial, as published
ENTRIES = 6  # of a codebook, at most, as published
SCALES = (1e-3, 1e2)  # of the thresholds, at the levels 0 and 1: from hardly any skip to hardly any call
Fitted = AdaCacheConfig | TeaCacheConfig | FirstBlockConfig | MagCacheConfig


@dataclass(frozen=True)
class Ground:
    """The generations that a calibration is made on."""

    pipeline: LinGenPipeline
    sampler: SamplerConfig
    shape: BucketConfig
    prompts: Sequence[str]
    seeds: Sequence[int]  # one a prompt
    batch: int  # videos that are sampled together

    @property
    def calls(self) -> int:
        """N."""
        return evaluations(self.sampler.solver, self.sampler.steps)

    @property
    def contexts(self) -> tuple[Context, ...]:
        """Those of a generation."""
        return contexts(self.sampler.guidance_scale, self.sampler.guidance)

    @property
    def cached_share(self) -> float:
        """The share of the FLOPs that lies in the blocks; what is around them is always computed."""
        config, model = self.pipeline.config, self.pipeline.model
        grid = token_grid(config, self.shape.frames, self.shape.height, self.shape.width)
        costs = Costs.of(model, grid, config.text.lengths)
        return sum(costs.blocks) / costs.total

    def runs(self, make: Callable[[], CacheRun]) -> Iterator[CacheRun]:
        """Sample all videos, each batch with a run of its own; what each has done."""
        config = self.pipeline.config
        size = latent_shape(config, self.shape.frames, self.shape.height, self.shape.width)
        for start in range(0, len(self.prompts), self.batch):
            prompts, seeds = self.prompts[start : start + self.batch], self.seeds[start : start + self.batch]
            noise = draw_noise((config.autoencoder.channels, *size), generators(len(prompts), None, list(seeds)))
            negatives, run = [self.sampler.negative_prompt] * len(prompts), make()
            self.pipeline.denoise(run.forward, prompts, negatives, noise, self.shape, self.sampler)
            yield run

    def measure(self, policy: Callable[[], Callable[[Context], Policy]]) -> Iterator[dict[Context, Policy]]:
        """Sample all videos; the policies of each batch, which ``policy`` makes and which have seen it."""
        made: dict[Context, Policy] = {}

        def run() -> CacheRun:
            make = policy()
            made.clear()
            made.update({context: make(context) for context in self.contexts})
            return CacheRun.measuring(made.__getitem__, self.pipeline.model, calls=self.calls, contexts=self.contexts)

        for _ in self.runs(run):
            yield dict(made)


@dataclass(frozen=True)
class Skipped:
    """What a cache skipped on all videos of a ``Ground``."""

    share: float  # of the FLOPs
    calls: list[float]  # of each video: the share of its calls that were not computed


@dataclass(frozen=True)
class Fit:
    """A cache that skips about as much as is wanted."""

    cache: Fitted
    skipped: Skipped
    tried: list[tuple[float, float]]  # level and share of skipped FLOPs, in the order of trial


def fit(
    ground: Ground, cache: CacheConfig, skip: float, out: Path, *, tolerance: float, rounds: int, told: Told
) -> Fit:
    """``cache`` with thresholds, and what else its policy calibrates, that skip a share of about ``skip`` of the FLOPs.

    Args:
        out: where the cache will be written; MagCache's ratios are written beside it.
        tolerance: how near to ``skip`` is near enough.
        rounds: at most so many levels are tried.
        told: is told what is done next, and how many videos that takes; and of each that is done.

    Raises:
        UserError: the policy has no thresholds; no level skips as much; the model cannot be cached so.
    """
    if not isinstance(cache, Fitted):
        raise UserError(
            f"cache={cache.policy} has no thresholds to fit; adacache, teacache, first_block, magcache have"
        )
    at_level = levels(ground, cache, skip, out, told)

    def attempt(level: float, number: int) -> tuple[Fitted, Skipped]:
        made = at_level(level)
        told(f"trial {number} of {rounds}", len(ground.prompts))
        return made, skipped(ground, made, told)

    made, found = attempt(1.0, 1)
    tried = [(1.0, found.share)]
    if found.share < skip - tolerance:
        raise UserError(
            f"skip={skip:g}: {cache.policy} skips {found.share:.1%} of the FLOPs of {ground.calls} calls at most; ask "
            "for less, or take more steps"
        )
    best, low, high = (made, found), (0.0, 0.0), (1.0, found.share)
    for number in range(2, rounds + 1):
        if abs(best[1].share - skip) <= tolerance:
            break
        # Where a line through both ends puts the wanted share, but never near an end: the truth is a staircase.
        part = (skip - low[1]) / (high[1] - low[1]) if high[1] > low[1] else 0.5
        level = low[0] + min(max(part, 0.15), 0.85) * (high[0] - low[0])
        made, found = attempt(level, number)
        tried.append((level, found.share))
        if abs(found.share - skip) < abs(best[1].share - skip):
            best = made, found
        low, high = (low, (level, found.share)) if found.share > skip else ((level, found.share), high)
    return Fit(*best, tried)


Told = Callable[[str | None, int], None]  # what begins, of so many videos; None: so many more of it are done


def skipped(ground: Ground, cache: CacheConfig, told: Told) -> Skipped:
    """What a cache skips."""
    executed, full, calls = 0, 0, list[float]()
    for run in ground.runs(
        lambda: CacheRun(cache, ground.pipeline.model, calls=ground.calls, contexts=ground.contexts)
    ):
        summary = run.summary()
        executed, full = executed + summary.executed_flops, full + summary.full_flops
        schedules = next(iter(summary.contexts.values())).schedules
        calls += [schedule.count(False) / len(schedule) for schedule in schedules]
        told(None, len(schedules))
    return Skipped(1 - executed / full, calls)


def levels(ground: Ground, cache: Fitted, skip: float, out: Path, told: Told) -> Callable[[float], Fitted]:
    """Measure what the policy decides by, with every call computed; what makes a cache of a level from 0 to 1."""
    if isinstance(cache, AdaCacheConfig):
        measured = measured_changes(ground, cache, told)
        longest = longest_rate(ground.calls, cache.guards, skip / ground.cached_share)
        return partial(with_codebook, cache, *codebook(measured, longest))
    if isinstance(cache, TeaCacheConfig):
        cache = cache.model_copy(update={"coefficients": fitted_polynomial(ground, told)})
    if isinstance(cache, MagCacheConfig):
        path = out.with_suffix(".ratios.json").resolve()
        write_ratios(path, ground.pipeline.model, ground.calls, measured_ratios(ground, told))
        cache = cache.model_copy(update={"ratios": str(path)})
    return lambda level: cache.model_copy(update={"threshold": _scaled(1.0, level)})


def measured_changes(ground: Ground, cache: AdaCacheConfig, told: Told) -> list[float]:
    """The changes that a codebook would meet if every call were computed, of all videos and calls.

    Raises:
        UserError: there are none, or all are zero.
    """
    every = cache.model_copy(update={"mode": "fixed", "codebook": (), "last": 1})
    told("measuring", len(ground.prompts))
    changes = []
    for policies in ground.measure(lambda: adacache_policies(every, ground.pipeline.model, ground.calls)):
        policy = next(iter(policies.values()))
        assert isinstance(policy, FixedPolicy)
        changes += [one.change for sample in policy.measured for one in sample if math.isfinite(one.change)]
        told(None, len(policy.measured))
    if not changes:
        raise UserError(
            f"steps={ground.sampler.steps}: nothing was measured; adacache decides anything from "
            f"{cache.guards.first + cache.guards.last + 2} calls of the model on"
        )
    if not any(changes):
        raise UserError(f"probe.block={cache.probe.block}: nothing changes there; is the model trained?")
    return changes


def longest_rate(calls: int, guards: GuardsConfig, skip: float) -> int:
    """The longest rate of a codebook that skips about ``skip`` of the calls: taken at every decision, it would compute
    two thirds of what is wanted, so that shorter ones have their part. It never reaches further than from the first
    guards to the last."""
    guarded = guards.first + 1 + guards.last  # and the call behind the first ones, when nothing is known yet
    between = max(calls - guarded, 2)
    wanted = calls * (1 - skip) * 2 / 3 - guarded
    return min(max(math.ceil(between / wanted), 2), between) if wanted > 0 else between


def codebook(changes: Sequence[float], longest: int) -> tuple[list[float], list[int]]:
    """Thresholds and rates before they are scaled: the rates fall from the longest to 2, at most ``ENTRIES``, and the
    thresholds are evenly spaced quantiles of the measured changes, so that each rate would be as frequent."""
    rates = np.linspace(longest, 2, min(longest - 1, ENTRIES)).round().astype(int).tolist()
    return np.quantile(changes, np.arange(1, len(rates) + 1) / (len(rates) + 1)).tolist(), rates


def with_codebook(
    cache: AdaCacheConfig, thresholds: Sequence[float], rates: Sequence[int], level: float
) -> AdaCacheConfig:
    """The cache with this codebook, its thresholds scaled; of those that are equal the first counts."""
    book: dict[float, int] = {}
    for threshold, rate in zip(thresholds, rates, strict=True):
        if (scaled := _scaled(threshold, level)) > 0:
            book.setdefault(scaled, rate)
    return AdaCacheConfig.model_validate(cache.model_dump() | {"codebook": tuple(book.items()), "last": 1})


@dataclass
class MeasureChanges:
    """Computes every call, and measures what TeaCache's polynomial relates: the change of what the first block's mixer
    sees, and that of what the stack adds."""

    depth: int
    probe: None = None
    pairs: list[tuple[float, float]] = field(default_factory=list)  # of each call and sample
    inputs: list[float] = field(default_factory=list)  # at this call
    seen: Tensor | None = None  # (R, n, D) at the last call, and what was added there
    added: Tensor | None = None

    def span(self, call: Call) -> range:
        """All blocks."""
        return range(self.depth)

    def decide(self, call: Call, front: Front) -> list[bool]:
        """All."""
        now, before = front.modulated(), self.seen
        self.seen = now
        self.inputs = [] if before is None else relative_change(front.layout, now, before)
        return [True] * front.layout.samples

    def learn(self, call: Call, seen: Seen) -> None:
        """Pairs the changes."""
        now, before = seen.residual.clone(), self.added
        self.added = now
        if before is not None:
            self.pairs += zip(self.inputs, relative_change(seen.layout, now, before), strict=True)


def fitted_polynomial(ground: Ground, told: Told) -> tuple[float, ...]:
    """TeaCache's coefficients, highest power first (its section 3.3), of all videos, calls and contexts.

    Raises:
        UserError: there are too few calls to fit to, or nothing changes.
    """
    told("measuring", len(ground.prompts))
    pairs: list[tuple[float, float]] = []
    for policies in ground.measure(lambda: lambda context: MeasureChanges(len(ground.pipeline.model.blocks))):
        found = [policy for policy in policies.values() if isinstance(policy, MeasureChanges)]
        pairs += [pair for policy in found for pair in policy.pairs if all(map(math.isfinite, pair))]
        told(None, ground.batch)
    if len({before for before, _ in pairs}) <= DEGREE:
        raise UserError(
            f"cache=teacache: {len(pairs)} changes were measured, too few for a polynomial of degree {DEGREE}; take "
            "more steps or more seeds, and a model that is trained"
        )
    inputs, outputs = np.array(pairs).T
    return tuple(_rounded(c) for c in np.polyfit(inputs, outputs, DEGREE).tolist())


def measured_ratios(ground: Ground, told: Told) -> dict[Context, list[float]]:
    """MagCache's, by context; the mean over the videos."""
    told("measuring", len(ground.prompts))
    found: dict[Context, list[MeasureNorms]] = {context: [] for context in ground.contexts}
    for policies in ground.measure(lambda: lambda context: MeasureNorms(len(ground.pipeline.model.blocks))):
        for context, policy in policies.items():
            assert isinstance(policy, MeasureNorms)
            found[context].append(policy)
        told(None, ground.batch)
    return {context: mean_ratios(measured) for context, measured in found.items()}


def _scaled(threshold: float, level: float) -> float:
    low, high = SCALES
    return _rounded(threshold * low * (high / low) ** level)


def _rounded(value: float) -> float:
    """To five digits: what a file shows is what was tried."""
    return float(f"{value:.5g}")
