"""Policies that decide from the call alone, the same for all samples, and never wait for the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lingen.cache_config import DeltaDitConfig, FixedConfig, PabConfig, ScheduleConfig, TGateConfig
from lingen.errors import UserError
from lingen.sampling.cache.policy import Front, Seen
from lingen.sampling.call import Call


def _at_ends(call: Call, config: FixedConfig) -> bool:
    return call.index < config.first or call.index >= call.count - config.last


@dataclass
class Interval:
    """Fixed intervals of the whole stack: what an adaptive policy has to beat."""

    config: FixedConfig
    depth: int  # blocks of the model
    probe: None = None
    last: int = 0  # the last computed call

    def span(self, call: Call) -> range:
        """All blocks."""
        return range(self.depth)

    def decide(self, call: Call, front: Front) -> list[bool]:
        """A period after the last computed call, and at both ends."""
        assert self.config.period is not None  # the schema sees to it
        due = call.index - self.last >= self.config.period or _at_ends(call, self.config)
        return [due] * front.layout.samples

    def learn(self, call: Call, seen: Seen) -> None:
        """That the call was computed."""
        self.last = call.index


@dataclass(frozen=True)
class Replay:
    """Schedules that are given, of each sample its own."""

    config: ScheduleConfig
    depth: int
    probe: None = None

    def span(self, call: Call) -> range:
        """All blocks."""
        return range(self.depth)

    def decide(self, call: Call, front: Front) -> list[bool]:
        """As the schedules say.

        Raises:
            UserError: there are not as many as samples.
        """
        given, samples = self.config.schedules, front.layout.samples
        if len(given) not in (1, samples):
            raise UserError(f"cache: policy=schedule: {len(given)} schedules for {samples} videos; give one a video")
        decisions = [schedule[call.index] == "1" for schedule in given]
        return decisions if len(given) == samples else decisions * samples

    def learn(self, call: Call, seen: Seen) -> None:
        """Nothing."""


@dataclass
class DeltaDit:
    """Rear blocks early, front blocks late (Delta-DiT, section 4.3)."""

    config: DeltaDitConfig
    depth: int
    probe: None = None
    last: int = 0

    def span(self, call: Call) -> range:
        """The rear blocks before the gate, the front ones behind it."""
        count = max(1, round(self.config.blocks * self.depth))
        early = call.index < self.config.gate * call.count
        return range(self.depth - count, self.depth) if early else range(count)

    def decide(self, call: Call, front: Front) -> list[bool]:
        """A period after the last computed call."""
        return [call.index - self.last >= self.config.period] * front.layout.samples

    def learn(self, call: Call, seen: Seen) -> None:
        """That the call was computed."""
        self.last = call.index


@dataclass(frozen=True)
class SiteIntervals:
    """Fixed intervals, one a site."""

    config: FixedConfig

    @property
    def sites(self) -> tuple[str, ...]:
        """Those that the configuration names."""
        return tuple(self.config.sites)

    def computes(self, call: Call, site: str) -> bool:
        """Every so many calls, and at both ends."""
        periods: Mapping[str, int] = dict(self.config.sites.items())
        return call.index % periods[site] == 0 or _at_ends(call, self.config)


@dataclass(frozen=True)
class Pab:
    """Pyramid Attention Broadcast: inside a window of noise levels each kind of attention has its period."""

    config: PabConfig
    sites: tuple[str, ...]  # of the model

    def computes(self, call: Call, site: str) -> bool:
        """Outside the window; inside it, every so many calls."""
        low, high = self.config.window
        config = self.config
        period = {"self": config.spatial, "te": config.spatial, "ma": config.temporal, "cross": config.cross}[site]
        return call.index % period == 0 or not low < call.sigma < high


@dataclass(frozen=True)
class TGate:
    """Before the gate the mixer has a period; behind it the cross-attention is what it was (T-GATE)."""

    config: TGateConfig
    mixer: str  # its site
    cross: str = "cross"

    @property
    def sites(self) -> tuple[str, ...]:
        """Both."""
        return self.mixer, self.cross

    def computes(self, call: Call, site: str) -> bool:
        """The mixer behind the gate, and every so many calls before it; the cross-attention before the gate."""
        early = call.index < self.config.gate * call.count
        return early if site == self.cross else not early or call.index % self.config.period == 0
