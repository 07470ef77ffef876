"""What a generation computed and what it reused: the decisions, and the FLOPs of what really ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lingen.kernels.index import Grid
from lingen.models import Backbone
from lingen.sampling.cache.sites import blocks_of, site_flops

STACK = "stack"  # what a policy of the whole stack decides for, as a site


@dataclass(frozen=True)
class ContextSummary:
    """Of one context: ``computed`` and ``reused`` count, by site, once a sample and call ("stack"), or once a block and
    call (sites that have a policy)."""

    computed: dict[str, int]
    reused: dict[str, int]
    schedules: list[list[bool]]  # of each sample, for each call: whether it was computed; empty for policies of sites
    flops: list[int]  # executed, of each sample


@dataclass(frozen=True)
class CacheSummary:
    """Of one generation. FLOPs are counted with the models' own functions, over all samples and contexts."""

    policy: str
    calls: int
    contexts: dict[str, ContextSummary]
    full_flops: int  # without a cache

    @property
    def sample_flops(self) -> list[int]:
        """Executed, of each sample."""
        return [sum(parts) for parts in zip(*(context.flops for context in self.contexts.values()), strict=True)]

    @property
    def executed_flops(self) -> int:
        """Of all samples."""
        return sum(self.sample_flops)

    @property
    def flops_ratio(self) -> float:
        """Executed over uncached."""
        return self.executed_flops / self.full_flops if self.full_flops else 1.0

    def __str__(self) -> str:
        computed, reused = Counter[str](), Counter[str]()
        for context in self.contexts.values():
            computed.update(context.computed)
            reused.update(context.reused)
        shares = [f"{site} {computed[site]} of {computed[site] + reused[site]}" for site in computed | reused]
        what = f"; computed {', '.join(shares)}" if shares else ""
        return f"{self.policy}: {self.flops_ratio:.1%} of the FLOPs{what}"


@dataclass
class Record:
    """A ``ContextSummary`` in the making."""

    computed: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    schedules: list[list[bool]] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    full_flops: int = 0

    def ran(self, executed: Sequence[int], full: int) -> None:
        """FLOPs of a forward: each sample's, and what one's would be without a cache."""
        self.flops = [a + b for a, b in zip(self.flops or [0] * len(executed), executed, strict=True)]
        self.full_flops += full * len(executed)

    def decided(self, computed: list[bool]) -> None:
        """Of the whole stack, for each sample."""
        self.schedules = self.schedules or [[] for _ in computed]
        for schedule, decision in zip(self.schedules, computed, strict=True):
            schedule.append(decision)
        self.computed[STACK] += sum(computed)
        self.reused[STACK] += len(computed) - sum(computed)

    def summary(self) -> ContextSummary:
        """What came together."""
        schedules = [list(schedule) for schedule in self.schedules]
        return ContextSummary(dict(self.computed), dict(self.reused), schedules, list(self.flops))


@dataclass(frozen=True)
class Costs:
    """Forward FLOPs of one row."""

    total: int
    blocks: tuple[int, ...]
    sites: tuple[dict[str, int], ...]  # by block

    @staticmethod
    def of(model: Backbone, grid: Grid, text_tokens: Mapping[str, int]) -> Costs:
        """At a token grid, with so many tokens of each text encoder."""
        length, blocks = sum(text_tokens.values()), blocks_of(model)
        return Costs(
            model.flops(grid, text_tokens),
            tuple(block.flops(grid, length) for block in blocks),
            tuple(site_flops(block, grid, length) for block in blocks),
        )
