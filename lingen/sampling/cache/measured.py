"""Policies that look at the samples ahead of the blocks: each decides for itself, the rows of its pair together.

Shapes: R rows of B samples, as in ``lingen.sampling.cache.layout``; n tokens of this rank; D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lingen.cache_config import FirstBlockConfig, TeaCacheConfig
from lingen.sampling.cache.distance import change_sums
from lingen.sampling.cache.layout import Layout, index_of
from lingen.sampling.cache.policy import Front, Seen
from lingen.sampling.call import Call


@dataclass
class TeaCache:
    """The change of what the first block's mixer sees, summed over the calls (TeaCache, equations 4 to 6)."""

    config: TeaCacheConfig
    depth: int
    probe: None = None
    previous: Tensor | None = None  # (R, n, D), at the last call, computed or not
    summed: list[float] = field(default_factory=list)  # of each sample, since it was computed

    def span(self, call: Call) -> range:
        """All blocks."""
        return range(self.depth)

    def decide(self, call: Call, front: Front) -> list[bool]:
        """Where the sum comes to the threshold; at the first and the last call. What is no number computes."""
        now, before = front.modulated(), self.previous
        self.previous = now
        if before is None or call.index == call.count - 1:
            computed = [True] * front.layout.samples
        else:
            changes = relative_change(front.layout, now, before)
            self.summed = [s + self._rescaled(change) for s, change in zip(self.summed, changes, strict=True)]
            computed = [not s < self.config.threshold for s in self.summed]
        if before is None:
            self.summed = [0.0] * front.layout.samples
        self.summed = [0.0 if done else s for s, done in zip(self.summed, computed, strict=True)]
        return computed

    def learn(self, call: Call, seen: Seen) -> None:
        """Nothing but what ``decide`` knows."""

    def _rescaled(self, change: float) -> float:
        total = 0.0
        for coefficient in self.config.coefficients:  # Horner's rule
            total = total * change + coefficient
        return total


@dataclass
class FirstBlock:
    """What the first block adds, against what it added when the others last ran."""

    config: FirstBlockConfig
    depth: int
    probe: None = None
    computed: Tensor | None = None  # (R, n, D), of each row's last computed call
    now: Tensor | None = None

    def span(self, call: Call) -> range:
        """All blocks but the first."""
        return range(1, self.depth)

    def decide(self, call: Call, front: Front) -> list[bool]:
        """Where it changed by more than the threshold. What is no number computes."""
        self.now = front.here - front.start
        if self.computed is None:
            return [True] * front.layout.samples
        changes = relative_change(front.layout, self.now, self.computed)
        return [not change <= self.config.threshold for change in changes]

    def learn(self, call: Call, seen: Seen) -> None:
        """Keep what the first block added to the computed samples."""
        assert self.now is not None  # decide came before
        samples = len(self.now) // (seen.layout.rows // seen.layout.samples)
        if self.computed is None or len(seen.samples) == samples:
            self.computed = self.now
        else:
            rows = [half + sample for half in range(0, len(self.now), samples) for sample in seen.samples]
            index = index_of(rows, self.now.device)
            self.computed.index_copy_(0, index, self.now.index_select(0, index))
        self.now = None


def relative_change(layout: Layout, new: Tensor, old: Tensor) -> list[float]:
    """|new - old|_1 / |old|_1 of each sample: (R, n, D) each. Waits once for the device.

    nan where both are zero, inf where only the old one is.
    """
    change, size = layout.totals(change_sums(old, new, layout))  # (B,) each
    return (change / size).tolist()  # type: ignore[no-any-return]
