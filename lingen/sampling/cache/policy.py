"""When: what a policy is asked, and what it is shown. One policy object lives for one context of one generation.

There are two kinds. A ``StackPolicy`` decides for each sample whether a range of blocks is computed or what it added
before is added again; it may look at the samples. A ``SitePolicy`` decides from the call alone, for named branches of
each block.

Shapes: B samples; R rows, as in ``lingen.sampling.cache.layout``; n tokens of this rank; D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from lingen.sampling.cache.layout import Layout
from lingen.sampling.call import Call


class Probe(NamedTuple):
    """A branch whose gated residual a policy wants to see: of which block, from 0, and at which site."""

    block: int
    site: str


@dataclass(frozen=True)
class Front:
    """What there is to decide by, ahead of the blocks. Its tensors are lent: they may change after ``decide``, and a
    policy that keeps one keeps a copy. What ``modulated`` gives is new."""

    layout: Layout
    start: Tensor  # (R, n, D), what enters the first block
    here: Tensor  # (R, n, D), what enters the span: the same where the span begins with the first block
    modulated: Callable[[], Tensor]  # (R, n, D), what the first block's mixer would see


@dataclass(frozen=True)
class Seen:
    """What the computed samples showed. ``layout`` is theirs: of those samples alone."""

    samples: list[int]
    layout: Layout
    probe: Tensor | None  # (R', n, D), the gated residual that the policy's ``probe`` names; new, and the policy's own
    residual: Tensor  # (R', n, D), what the span added; lent, as in ``Front``


class StackPolicy(Protocol):
    """Decides for a range of blocks, each sample for itself."""

    @property
    def probe(self) -> Probe | None:
        """What ``learn`` wants to see, inside the span; None: nothing."""

    def span(self, call: Call) -> range:
        """The blocks that this call computes or reuses; those around it always run. What was stored is forgotten where
        it changes."""

    def decide(self, call: Call, front: Front) -> list[bool]:
        """For each sample, whether the span is computed; asked at every call. Waits at most once for the device.

        Where nothing is stored yet the answer counts for nothing: all are computed, as ``learn`` says.
        """

    def learn(self, call: Call, seen: Seen) -> None:
        """Told behind the blocks of a call, if anything was computed in it."""


@runtime_checkable
class SitePolicy(Protocol):
    """Decides for named branches, for all samples at once, and never looks at them."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The branches that may be reused."""

    def computes(self, call: Call, site: str) -> bool:
        """Whether this branch is computed, in all blocks. Where nothing is stored yet, it is."""


Policy = StackPolicy | SitePolicy
