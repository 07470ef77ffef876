"""The part of the schema that says how AdaCache decides (Kahatapitiya et al., arXiv 2411.02397).

Calls of the model are counted from 1 here, as in the published code: N calls are 1 ... N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lingen.errors import UserError
from lingen.model_config import Section
from lingen.reuse_config import Reusing

Entry = tuple[PositiveFloat, PositiveInt]  # a threshold and its rate


class Codebook(NamedTuple):
    """From a measured change to a rate: the next computed call is so many calls later, and those between are reused."""

    entries: tuple[tuple[float, int], ...]  # (threshold, rate), thresholds ascending: the first one above decides
    last: int  # the rate of a change that no threshold is above, or that is no number

    def rate(self, change: float) -> int:
        """The rate of the first threshold above ``change``."""
        return next((rate for threshold, rate in self.entries if change < threshold), self.last)

    def problem(self) -> str | None:
        """What is wrong with it."""
        thresholds = [threshold for threshold, _ in self.entries]
        if not all(math.isfinite(threshold) and threshold > 0 for threshold in thresholds):
            return f"thresholds are finite and above 0, got {thresholds}"
        if any(a >= b for a, b in pairwise(thresholds)):
            return f"thresholds ascend, got {thresholds}"
        if wrong := [rate for rate in (*(rate for _, rate in self.entries), self.last) if rate < 1]:
            return f"a rate is a whole number of calls, 1 or more, got {wrong[0]}"
        return None


class MoReg(Section):
    """Motion regularisation (section 3.3), with the published constants. What moves more is computed more often.

    The published windows are calls 4-26 of 30 and 10-90 of 100.
    """

    window: tuple[PositiveInt, PositiveInt]  # the first and the last call whose motion counts
    scale: PositiveFloat = 0.385  # the motion that changes nothing
    power: PositiveFloat = 8.0
    weight: Annotated[float, Field(ge=0.0)] = 10.0  # of the motion's gradient along the calls
    strides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)  # latent frames between those compared

    @model_validator(mode="after")
    def _window_ascends(self) -> MoReg:
        if self.window[0] > self.window[1]:
            raise ValueError(f"moreg.window={list(self.window)}: the first call comes after the last")
        return self


class ProbeConfig(Section):
    """Whose gated residual the change and the motion are measured on."""

    block: NonNegativeInt | Literal["middle"] = "middle"
    # None: DiT's self-attention, LinGen's TE-branch (the whole mixer, where an ablation has none).
    site: Literal["self", "mate", "te", "ma", "cross", "mlp"] | None = None


class GuardsConfig(Section):
    """Calls that are always computed."""

    first: PositiveInt = 1
    last: NonNegativeInt = 2


class AdaCacheConfig(Reusing):
    """Computes again the sooner, the more the probe's residual changed between the last two computed calls.

    ``mode``: ``reference`` decides as the published code does, faults included; ``fixed`` mends them (docs/cache.md).
    """

    policy: Literal["adacache"] = "adacache"
    mode: Literal["reference", "fixed"] = "fixed"
    codebook: tuple[Entry, ...]  # (threshold, rate), thresholds ascending
    last: PositiveInt = 1  # the rate above all thresholds
    moreg: MoReg | None = None
    probe: ProbeConfig = ProbeConfig()
    guards: GuardsConfig = GuardsConfig()

    @property
    def book(self) -> Codebook:
        """Thresholds and rates."""
        return Codebook(self.codebook, self.last)

    @model_validator(mode="after")
    def _codebook_makes_sense(self) -> AdaCacheConfig:
        if problem := self.book.problem():
            raise ValueError(f"codebook: {problem}")
        return self

    @model_validator(mode="after")
    def _reference_is_as_published(self) -> AdaCacheConfig:
        if self.mode == "reference" and self.guards != GuardsConfig():
            raise ValueError("guards: mode=reference has the published ones, first=1 and last=2; take mode=fixed")
        if self.mode == "reference" and self.reuse != "hold":
            raise ValueError(f"reuse={self.reuse}: mode=reference holds, as published; take mode=fixed")
        return self


def codebook_of(given: Codebook | Mapping[float, int] | Sequence[Any]) -> Codebook:
    """A ``Codebook`` from what stands for one.

    Args:
        given: ``(entries, last)``, the entries as pairs or as a mapping; [(threshold, rate), ..., last]; or
            {threshold: rate} or [(threshold, rate), ...], as in the published code, where the rate of the last pair
            holds above all thresholds before it and its own threshold is not read.

    Raises:
        UserError: it is none of these, or has no rate; thresholds that do not ascend; a rate below 1.
    """
    form = "give {threshold: rate, ...} or [(threshold, rate), ...], whose last rate is the rest's, or (entries, last)"
    try:
        pairs = _listed(given)
        end = pairs.pop()
        alone = isinstance(end, Real)
        if alone and len(pairs) == 1:
            inner = _listed(pairs[0])  # a pair; or the entries of (entries, last)
            pairs = pairs if inner and isinstance(inner[0], Real) else inner
        found = [(float(threshold), rate) for threshold, rate in pairs]
        last = end if alone else end[1]
        book = Codebook(tuple((threshold, int(rate)) for threshold, rate in found), int(last))
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise UserError(f"codebook={given!r} cannot be read; {form}") from error
    problem = book.problem()
    if problem or [tuple(found), last] != list(book):
        raise UserError(f"codebook={given!r}: {problem or 'a rate is a whole number of calls'}")
    return book


def _listed(given: Any) -> list[Any]:
    return list(given.items() if isinstance(given, Mapping) else given)
