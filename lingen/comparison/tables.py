"""The measurements as tables and sentences of text, which the page and the terminal both show."""

from __future__ import annotations

from dataclasses import dataclass

from lingen.comparison.curves import Crossing
from lingen.comparison.head_to_head import FRACTIONS, Final, StageComparison
from lingen.comparison.read import Run
from lingen.comparison.result import Result
from lingen.comparison.style import si, time_unit
from lingen.comparison.transfers import Effect, RunTransfer, Transfer

NONE = "-"


@dataclass(frozen=True)
class Table:
    """Rows of text under ``headers``; the first column names the row."""

    title: str
    headers: list[str]
    rows: list[list[str]]

    def as_text(self) -> str:
        """Aligned for a terminal: the first column to the left, the others to the right."""
        lines = [self.headers, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]
        pad = [
            [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
        body = ["  ".join(line).rstrip() for line in pad]
        return "\n".join([self.title, f"  {body[0]}", f"  {'-' * len(body[0])}", *(f"  {line}" for line in body[1:])])


def duration(hours: float) -> str:
    """0.05 -> "3 min"."""
    per_hour, unit = time_unit(hours)
    return f"{hours * per_hour:.3g} {unit}"


def count(axis: str, value: float) -> str:
    """A count of samples, tokens, FLOPs or hours."""
    return duration(value) if axis == "hours" else si(value, "FLOP" if axis == "flops" else "")


def loss(value: float | None) -> str:
    """Four decimals."""
    return NONE if value is None else f"{value:.4f}"


def difference(value: float | None) -> str:
    """Four decimals and a sign."""
    return NONE if value is None else f"{value:+.4f}"


def percent(value: float | None) -> str:
    """0.5 -> "50%"."""
    return NONE if value is None else f"{100 * value:.0f}%"


def summary_table(result: Result) -> Table:
    """One row a stage and run, narrow enough for a terminal: how it took the transfer, and where it ended."""
    rows = []
    for stage in result.stages:
        for label, final in stage.finals.items():
            crossed = [
                t.runs[label].validation for t in result.transfers if t.target == stage.stage and label in t.runs
            ]
            effect = crossed[0] if crossed else None
            back = effect.back_to if effect else None
            missing = "not reached" if effect else NONE
            rows.append(
                [
                    f"{stage.stage}: {label}{'' if final.complete else ' (in progress)'}",
                    difference(effect.jump if effect else None),
                    si(back.cost["samples"]) if back else missing,
                    si(back.cost["flops"], "FLOP") if back else missing,
                    loss(final.validation),
                    loss(final.training),
                ]
            )
    headers = ["stage: run", "jump", "back after samples", "back after compute", "final validation", "final training"]
    return Table("Validation loss across the transfers", headers, rows)


def progress_table(runs: list[Run]) -> Table:
    """How far each run is."""
    rows = []
    for run in runs:
        end = run.stages[-1].end
        state = "in progress" if run.in_progress else "finished"
        counts = [count(axis, end[axis]) for axis in ("samples", "tokens", "flops", "hours")]
        rows.append([run.label, str(run.path), f"{state}, in {run.stages[-1].name}", *counts])
    return Table("Runs", ["run", "folder", "state", "samples", "tokens", "compute", "wall clock"], rows)


def transfer_table(transfer: Transfer) -> Table:
    """Each run's jump and recovery, by every measure there is."""
    rows = []
    for label, one in transfer.runs.items():
        for name, effect in _effects(one):
            rows.append([f"{label}: {name}", *_effect_cells(effect)])
    headers = [
        "",
        "before",
        "after",
        "jump",
        "back after: samples",
        "tokens",
        "compute",
        "wall clock",
        "below for good after",
        "best",
    ]
    return Table(f"{transfer.source} → {transfer.target}", headers, rows)


def _effects(one: RunTransfer) -> list[tuple[str, Effect]]:
    buckets = [(f"validation, {bucket}", effect) for bucket, effect in one.buckets.items()]
    several = [("validation, mean of common buckets", one.common)] if len(buckets) > 1 else []
    found = [("validation, each stage's buckets", one.validation), *several, *buckets, ("training", one.training)]
    return [(name, effect) for name, effect in found if effect is not None]


def _effect_cells(effect: Effect) -> list[str]:
    jump = difference(effect.jump) + (f" ± {effect.jump_error:.4f}" if effect.jump_error is not None else "")
    back = effect.back_to
    cells = [count(axis, back.cost[axis]) if back else NONE for axis in ("samples", "tokens", "flops", "hours")]
    good = effect.below_for_good
    best = f"{loss(effect.best)} ({difference(effect.best - effect.before)})"
    return [
        loss(effect.before),
        loss(effect.after),
        jump,
        *_never(cells, back),
        si(good.cost["samples"]) if good else "not reached",
        best,
    ]


def _never(cells: list[str], crossing: Crossing | None) -> list[str]:
    return cells if crossing else ["not reached", *cells[1:]]


def finals_table(stage: StageComparison) -> Table:
    """Where each run stands at the end of a stage."""
    rows = [
        [label + ("" if final.complete else " (in progress)"), *_final_cells(final)]
        for label, final in stage.finals.items()
    ]
    headers = ["run", "validation", "wobble", "training", "samples", "tokens", "compute", "wall clock"]
    return Table(f"{stage.stage}: where it ends, and what it cost", headers, rows)


def _final_cells(final: Final) -> list[str]:
    training = NONE if final.training is None else f"{loss(final.training)} ± {final.training_error:.4f}"
    spent = [count(axis, final.cost[axis]) for axis in ("samples", "tokens", "flops", "hours")]
    wobble = NONE if final.wobble is None else f"± {final.wobble:.4f}"
    return [loss(final.validation), wobble, training, *spent]


def reach_table(stage: StageComparison) -> Table:
    """What each run needs for each other's final loss; shares are of what the other spent in the stage."""
    rows = []
    for reach in stage.reaches:
        if reach.reached is None:
            rest = ["not reached", NONE, NONE, NONE, NONE, loss(reach.best)]
        else:
            rest = [
                si(reach.reached.cost["samples"]),
                *(percent(reach.share[axis]) for axis in ("samples", "flops", "hours")),
                percent(reach.total_share["flops"]),
                loss(reach.best),
            ]
        rows.append([f"{reach.run} to {reach.other}'s final loss", difference(reach.difference), *rest])
    headers = [
        "",
        "final difference",
        "reached after samples",
        "of its samples",
        "of its compute",
        "of its time",
        "of all its compute so far",
        "best",
    ]
    return Table(f"{stage.stage}: reaching each other", headers, rows)


def lead_table(stage: StageComparison) -> Table:
    """Losses and leads at the same samples, along the stage."""
    at = [f"{percent(f)}: {si(n)}" for f, n in zip(FRACTIONS, stage.samples, strict=True)]
    rows = [[label, *map(loss, losses)] for label, losses in stage.losses.items()]
    rows += [[f"lead of {lead.run} over {lead.other}", *map(difference, lead.lead)] for lead in stage.leads]
    return Table(f"{stage.stage}: validation loss at the same samples", ["", *at], rows)


def jumps(result: Result) -> list[str]:
    """How the runs take each transfer, a sentence each."""
    found = []
    for transfer in result.transfers:
        effects = {label: one.validation for label, one in transfer.runs.items()}
        said = [_jump_in_words(label, effect) for label, effect in effects.items() if effect is not None]
        if said:
            found.append(f"{transfer.source} → {transfer.target}: {'; '.join(said)}.")
    return found


def leads(result: Result) -> list[str]:
    """The first run against each other one in each stage: who is ahead, and what it needed for the other's loss."""
    return [text for stage in result.stages for text in _ahead_in_words(stage, result.runs[0].label)]


def _jump_in_words(label: str, effect: Effect) -> str:
    start = f"{label}'s validation loss jumps by {difference(effect.jump)}"
    if effect.back_to is None:
        return f"{start} and is not back at {loss(effect.before)} within the stage (best {loss(effect.best)})"
    cost = effect.back_to.cost
    return f"{start} and is back at its level after {si(cost['samples'])} samples, {si(cost['flops'], 'FLOP')}"


def _ahead_in_words(stage: StageComparison, first: str) -> list[str]:
    """``first`` against each other run of the stage."""
    found = []
    for lead in stage.leads:
        if first not in (lead.run, lead.other):
            continue
        ahead, behind = (lead.run, lead.other) if lead.lead[-1] > 0 else (lead.other, lead.run)
        values = [difference(v if lead.run == ahead else -v) for v in lead.lead]
        finished = all(stage.finals[label].complete for label in (ahead, behind))
        where = "ends" if finished else f"not finished; {si(stage.samples[-1])} samples into it,"
        text = f"{stage.stage}: {where} with {ahead} {abs(lead.lead[-1]):.4f} below {behind}"
        reach = next(r for r in stage.reaches if (r.run, r.other) == (ahead, behind))
        if reach.reached is not None and finished:
            samples, flops = percent(reach.share["samples"]), percent(reach.share["flops"])
            text += f"; {ahead} reaches {behind}'s final loss with {samples} of the samples and {flops} of the compute"
            text += f" that {behind} spent in the stage"
        text += f"; its lead at {', '.join(map(percent, FRACTIONS))} of the stage: {', '.join(values)}"
        if reach.wobble is None:
            text += " (too few validations to say how much they scatter)"
        elif abs(lead.lead[-1]) < 2 * reach.wobble:
            text += f" (within what neighbouring validations scatter, ± {reach.wobble:.4f}: suggestive only)"
        found.append(f"{text}.")
    return found
