"""What a transfer does to a loss: the jump, and what it costs to get back to and below the level before it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lingen.comparison.curves import (
    Crossing,
    Curve,
    below_for_good,
    first_at_or_below,
    standard_error,
    window_mean,
    window_of,
)
from lingen.comparison.read import Run, Stage


@dataclass(frozen=True)
class Effect:
    """One loss across one transfer of one run. ``None`` in a crossing: not within the stage, as far as it has come."""

    before: float  # at the end of the stage before
    after: float  # at the start of the new stage
    jump: float  # after - before
    jump_error: (
        float | None
    )  # standard error of the jump; None for a validation loss, whose samples and noise are fixed
    peak: float  # highest of the new stage
    best: float  # lowest of the new stage
    back_to: Crossing | None  # first at or below ``before``
    below_for_good: Crossing | None  # from here on always below ``before``


@dataclass(frozen=True)
class RunTransfer:
    """One run at one transfer. A part is None where the run recorded nothing of the kind on one of its sides."""

    start: dict[str, float]  # axis -> count at the transfer
    first_validation: float | None  # samples between the transfer and the new stage's first validation
    validation: Effect | None  # each stage's own mix of buckets: a new resolution is another loss
    common: Effect | None  # mean over the buckets that both stages validate: like for like
    buckets: dict[str, Effect]  # each of those buckets
    training: Effect | None  # window means


@dataclass(frozen=True)
class Transfer:
    """A boundary between two stages, and every run that crossed it."""

    source: str
    target: str
    runs: dict[str, RunTransfer]  # by label


def transfers(runs: list[Run], smoothing: int) -> list[Transfer]:
    """Every transfer of any run, in the order in which they are first met."""
    found: dict[tuple[str, str], dict[str, RunTransfer]] = {}
    for run in runs:
        for before, after in pairwise(run.stages):
            found.setdefault((before.name, after.name), {})[run.label] = _transfer(before, after, smoothing)
    return [Transfer(source, target, by_label) for (source, target), by_label in found.items()]


def common_buckets(before: Stage, after: Stage) -> list[str]:
    """Buckets that are validated on both sides of a transfer."""
    return [bucket for bucket in after.buckets if bucket in before.buckets]


def mean_curve(curves: list[Curve]) -> Curve:
    """The plain mean over curves of the same records."""
    return Curve(curves[0].counts, np.mean([c.loss for c in curves], axis=0))


def _transfer(before: Stage, after: Stage, smoothing: int) -> RunTransfer:
    shared = common_buckets(before, after)
    each = {bucket: _validation_effect(before.buckets[bucket], after.buckets[bucket], after.start) for bucket in shared}
    common = None
    if shared:
        means = [mean_curve([stage.buckets[b] for b in shared]) for stage in (before, after)]
        common = _validation_effect(means[0], means[1], after.start)
    late = after.validation.at(0)["samples"] - after.start["samples"] if len(after.validation) else None
    return RunTransfer(
        start=after.start,
        first_validation=late,
        validation=_validation_effect(before.validation, after.validation, after.start),
        common=common,
        buckets={bucket: effect for bucket, effect in each.items() if effect is not None},
        training=_training_effect(before.train, after.train, after.start, smoothing),
    )


def _validation_effect(before: Curve, after: Curve, start: dict[str, float]) -> Effect | None:
    if not len(before) or not len(after):
        return None
    return _effect(float(before.loss[-1]), after, start, jump_error=None)


def _training_effect(before: Curve, after: Curve, start: dict[str, float], smoothing: int) -> Effect | None:
    """The last window of the stage before against the first window of the new one, and then the window means."""
    if not len(before) or not len(after):
        return None
    ends = before.loss[-window_of(before, smoothing) :], after.loss[: window_of(after, smoothing)]
    error = float(np.hypot(standard_error(ends[0]), standard_error(ends[1])))
    return _effect(float(ends[0].mean()), window_mean(after, smoothing), start, jump_error=error)


def _effect(before: float, curve: Curve, start: dict[str, float], *, jump_error: float | None) -> Effect:
    return Effect(
        before=before,
        after=float(curve.loss[0]),
        jump=float(curve.loss[0]) - before,
        jump_error=jump_error,
        peak=float(curve.loss.max()),
        best=float(curve.loss.min()),
        back_to=first_at_or_below(curve, before, start),
        below_for_good=below_for_good(curve, before, start),
    )
