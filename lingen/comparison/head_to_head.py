"""Run against run inside each stage: final losses, the cost of reaching each other's, and the lead along the way.

Inside a stage all runs are validated on the same samples, timesteps and noise, so their losses are like for like.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from lingen.comparison.curves import AXES, Crossing, first_at_or_below, standard_error, window_of, wobble
from lingen.comparison.read import Run, Stage

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Final:
    """Where one run stands at the end of a stage, or at its newest record where ``complete`` is False."""

    complete: bool
    validation: float | None
    wobble: float | None  # spread of neighbouring validations around their trend
    training: float | None  # mean of the last window
    training_error: float | None  # its standard error
    cost: dict[str, float]  # axis -> spent in this stage
    total: dict[str, float]  # axis -> spent since the run began


@dataclass(frozen=True)
class Reach:
    """What ``run`` needs to come down to the validation loss with which ``other`` ends the stage."""

    run: str
    other: str
    difference: float  # final validation loss of run - of other; negative: run is ahead
    wobble: float | None  # of that difference
    best: float  # lowest validation loss of run
    reached: Crossing | None
    share: dict[str, float | None]  # axis -> cost in the stage over all that other spent in it
    total_share: dict[str, float | None]  # axis -> the same, counted since the runs began


@dataclass(frozen=True)
class Lead:
    """How far ``run`` is ahead of ``other`` at the same samples: loss of other - loss of run, one value a fraction."""

    run: str
    other: str
    lead: list[float]


@dataclass(frozen=True)
class StageComparison:
    """One stage. ``samples`` are counted from the start of the stage, at FRACTIONS of what all runs have in common."""

    stage: str
    finals: dict[str, Final]
    reaches: list[Reach]  # every ordered pair
    samples: list[float]
    losses: dict[str, list[float]]  # label -> validation loss at ``samples``
    leads: list[Lead]  # every pair


def head_to_head(runs: list[Run], smoothing: int) -> list[StageComparison]:
    """Every stage of any run, in the order in which they are first met."""
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    return [_compare(name, runs, smoothing) for name in names]


def _compare(name: str, runs: list[Run], smoothing: int) -> StageComparison:
    stages = {run.label: stage for run in runs if (stage := run.stage(name)) is not None}
    validated = {label: stage for label, stage in stages.items() if len(stage.validation)}
    samples, losses = _along(validated)
    return StageComparison(
        stage=name,
        finals={label: _final(stage, smoothing) for label, stage in stages.items()},
        reaches=[_reach((a, validated[a]), (b, validated[b])) for a, b in permutations(validated, 2)],
        samples=samples,
        losses=losses,
        leads=[
            Lead(a, b, [y - x for x, y in zip(losses[a], losses[b], strict=True)]) for a, b in combinations(losses, 2)
        ],
    )


def _final(stage: Stage, smoothing: int) -> Final:
    last = stage.train.loss[-window_of(stage.train, smoothing) :]
    return Final(
        complete=stage.complete,
        validation=float(stage.validation.loss[-1]) if len(stage.validation) else None,
        wobble=wobble(stage.validation),
        training=float(last.mean()) if len(last) else None,
        training_error=standard_error(last) if len(last) else None,
        cost={axis: stage.end[axis] - stage.start[axis] for axis in AXES},
        total=stage.end,
    )


def _reach(one: tuple[str, Stage], two: tuple[str, Stage]) -> Reach:
    (label, stage), (other, target) = one, two
    level = float(target.validation.loss[-1])
    reached = first_at_or_below(stage.validation, level, stage.start)
    wobbles = wobble(stage.validation), wobble(target.validation)
    spent = target.validation.at(-1)
    share: dict[str, float | None] = dict.fromkeys(AXES)
    total_share: dict[str, float | None] = dict.fromkeys(AXES)
    if reached is not None:
        share = {a: _ratio(reached.cost[a], spent[a] - target.start[a]) for a in AXES}
        total_share = {a: _ratio(stage.start[a] + reached.cost[a], spent[a]) for a in AXES}
    return Reach(
        run=label,
        other=other,
        difference=float(stage.validation.loss[-1]) - level,
        wobble=None if wobbles[0] is None or wobbles[1] is None else float(np.hypot(wobbles[0], wobbles[1])),
        best=float(stage.validation.loss.min()),
        reached=reached,
        share=share,
        total_share=total_share,
    )


def _along(stages: dict[str, Stage]) -> tuple[list[float], dict[str, list[float]]]:
    """Validation losses at FRACTIONS of the samples that all runs of the stage cover, interpolated between records."""
    if not stages:
        return [], {}
    since = {label: s.validation.counts["samples"] - s.start["samples"] for label, s in stages.items()}
    low, high = max(x[0] for x in since.values()), min(x[-1] for x in since.values())
    if low > high:
        return [], {}
    samples = [float(low + fraction * (high - low)) for fraction in FRACTIONS]
    losses = {label: np.interp(samples, since[label], s.validation.loss).tolist() for label, s in stages.items()}
    return samples, losses


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
