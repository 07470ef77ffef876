"""AdaCache as a policy: as published, and with its faults mended.

``mode: reference`` runs the schedule of ``lingen.sampling.adacache``. ``mode: fixed`` differs from it so: each sample
decides for itself, by the sums over its guidance pair, also where guidance takes two passes; the change is divided by
the real gap to the last computed call; motion has a gradient between two calls of the window only; sums hold in any
dtype, and ranks agree by an all-reduce of scalars. The probe is what a branch adds to the residual stream, where tokens
lie in their natural order and no review tokens are among them.

Shapes: B samples; R rows of a forward; n tokens of this rank, of a grid (T, H, W); D width; S strides of motion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lingen.adacache_config import AdaCacheConfig, MoReg, ProbeConfig
from lingen.errors import UserError
from lingen.models import Backbone
from lingen.sampling.adacache import Reference
from lingen.sampling.cache.distance import change_sums, motion_sums
from lingen.sampling.cache.layout import Layout, index_of
from lingen.sampling.cache.policy import Front, Probe, Seen, StackPolicy
from lingen.sampling.cache.sites import blocks_of, mixer_branches, mixer_site
from lingen.sampling.call import Call, Context


def adacache_policies(config: AdaCacheConfig, model: Backbone, calls: int) -> Callable[[Context], StackPolicy]:
    """What makes the policy of each context of one generation of ``calls`` calls.

    Raises:
        UserError: the model has no block of the probe's number.
    """
    probe, depth = place_of(config.probe, model), len(model.blocks)
    if config.mode == "reference":
        return lambda context: ReferencePolicy(config, probe, depth, calls)
    judge = Judge(config, calls)
    return lambda context: FixedPolicy(judge, probe, depth)


def place_of(probe: ProbeConfig, model: Backbone) -> Probe:
    """The block and the site that a model's probe is at; the middle of 28 blocks is 13, as published."""
    blocks = blocks_of(model)
    block = (len(blocks) - 1) // 2 if probe.block == "middle" else probe.block
    if block >= len(blocks):
        raise UserError(f"cache=adacache: probe.block={block}: the model's blocks are 0 to {len(blocks) - 1}")
    default = "te" if "te" in mixer_branches(blocks[block]) else mixer_site(blocks[block])
    return Probe(block, probe.site or default)


class ReferencePolicy:
    """One schedule for all samples of a context, which are one in its sums; ranks gather the residual, as published."""

    def __init__(self, config: AdaCacheConfig, probe: Probe, depth: int, calls: int) -> None:
        self._schedule, self._span = Reference(calls, config.book, config.moreg), range(depth)
        self.probe: Probe | None = probe

    def span(self, call: Call) -> range:
        """All blocks."""
        return self._span

    def decide(self, call: Call, front: Front) -> list[bool]:
        """The same for each sample."""
        return [self._schedule.computes(call.index + 1)] * front.layout.samples

    def learn(self, call: Call, seen: Seen) -> None:
        """Measures; waits once for the device."""
        assert seen.probe is not None
        grid = seen.layout.grid
        whole = seen.layout.group.gather(seen.probe, math.prod(grid))  # (R, N, D)
        self._schedule.saw(call.index + 1, torch.unflatten(whole, 1, (grid[0], -1)).movedim(1, 0))  # (T, R, H*W, D)


class FixedPolicy:
    """A context's probes; what they show goes to the ``judge``, which decides for all contexts of the generation."""

    def __init__(self, judge: Judge, probe: Probe, depth: int) -> None:
        self._judge, self._span = judge, range(depth)
        self.probe: Probe | None = probe
        self._last: Tensor | None = None  # (R, n, D), each sample's at its last computed call
        self._layout: Layout | None = None  # of all samples

    @property
    def measured(self) -> list[list[Measured]]:
        """By sample; the same in all contexts of a generation."""
        return self._judge.measured

    def span(self, call: Call) -> range:
        """All blocks."""
        return self._span

    def decide(self, call: Call, front: Front) -> list[bool]:
        """Each sample for itself; waits at most once for the device."""
        self._layout = front.layout
        return self._judge.computes(call.index + 1, front.layout.samples)

    def learn(self, call: Call, seen: Seen) -> None:
        """Sums up, and does not wait for the device: the next decision does."""
        assert seen.probe is not None and self._layout is not None
        everyone, old = len(seen.samples) == self._layout.samples, self._last
        rows = None if everyone else index_of(self._layout.rows_of(seen.samples), seen.probe.device)
        if old is not None and self._judge.wants(call.index + 1):
            sums = change_sums(old if rows is None else old.index_select(0, rows), seen.probe, seen.layout)
            if moreg := self._judge.moreg_at(call.index + 1):
                sums = torch.cat([sums, motion_sums(seen.probe, moreg.strides, seen.layout)])
            self._judge.hear(seen.samples, seen.layout.totals(sums))
        if rows is None or old is None:
            self._last = seen.probe
        else:
            old.index_copy_(0, rows, seen.probe)


@dataclass(frozen=True)
class Measured:
    """What a sample showed at a computed call, and what followed."""

    call: int  # from 1
    gap: int  # calls since the one computed before
    change: float  # c, as it met the codebook; no number where there was nothing to measure
    motion: float | None  # r, the mean over the strides; None outside of MoReg's window
    rate: int


@dataclass
class Sample:
    """One sample's schedule."""

    last: int = 0  # its last computed call
    before: int = 0  # the one before that
    rate: int = 1
    factor: float | None = None  # m at the last computed call; None outside of the window
    measured: list[Measured] = field(default_factory=list)


class Judge:
    """Decides for the samples of one generation, from what all of its contexts measured at the calls before."""

    def __init__(self, config: AdaCacheConfig, calls: int) -> None:
        self._config, self._book, self._calls = config, config.book, calls
        self._samples: list[Sample] = []
        self._heard: tuple[list[int], Tensor] | None = None  # B' samples and their sums (2 + 2S, B')
        self._call, self._decisions = 0, list[bool]()

    @property
    def measured(self) -> list[list[Measured]]:
        """By sample."""
        return [sample.measured for sample in self._samples]

    def wants(self, call: int) -> bool:
        """Whether what is measured at this call decides anything: behind it there must be a call that is no guard."""
        return self._config.guards.first <= call < self._calls - self._config.guards.last

    def moreg_at(self, call: int) -> MoReg | None:
        """The motion regularisation, inside its window."""
        moreg = self._config.moreg
        return moreg if moreg is not None and moreg.window[0] <= call <= moreg.window[1] else None

    def hear(self, samples: list[int], sums: Tensor) -> None:
        """The sums (2 + 2S, B') of the samples that the last decision computed; contexts add up."""
        self._heard = samples, sums if self._heard is None else self._heard[1] + sums

    def computes(self, call: int, samples: int) -> list[bool]:
        """For each sample, whether this call is computed; the same for all contexts."""
        if call == self._call:
            return self._decisions
        self._samples = self._samples or [Sample() for _ in range(samples)]
        if self._heard is not None:
            computed, sums = self._heard
            for sample, column in zip(computed, sums.T.tolist(), strict=True):  # the one wait for the device
                self._learn(self._samples[sample], column)
            self._heard = None
        first, last = self._config.guards.first, self._config.guards.last
        guard = call <= first or call > self._calls - last
        self._call, self._decisions = call, []
        for each in self._samples:
            self._decisions.append(guard or call >= each.last + each.rate)
            if self._decisions[-1]:
                each.before, each.last = each.last, call
        return self._decisions

    def _learn(self, sample: Sample, sums: list[float]) -> None:
        """``sums``: |p' - p|, |p'|; and, inside the window, for each stride the motion's two."""
        gap = sample.last - sample.before
        change = _ratio(sums[0], sums[1]) / gap
        motion, factor = None, None
        if moreg := self.moreg_at(sample.last):
            motion = sum(_ratio(*pair) for pair in zip(sums[2::2], sums[3::2], strict=True)) / len(moreg.strides)
            factor = (motion / moreg.scale) ** moreg.power
            gradient = 0.0 if sample.factor is None else moreg.weight * (factor - sample.factor) / gap
            change *= factor + abs(gradient)
        sample.factor = factor
        sample.rate = self._book.rate(change)
        sample.measured.append(Measured(sample.last, gap, change, motion, sample.rate))


def _ratio(part: float, whole: float) -> float:
    """0/0 is no number, and below no threshold."""
    if whole:
        return part / whole
    return math.inf if part else math.nan
