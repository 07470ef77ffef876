"""All that was measured, as one object: what compare.json, the report and the closing table are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lingen.comparison import comparable
from lingen.comparison.curves import default_smoothing, window_of
from lingen.comparison.head_to_head import FRACTIONS, StageComparison, head_to_head
from lingen.comparison.read import Run
from lingen.comparison.transfers import Transfer, transfers


@dataclass(frozen=True)
class Result:
    """The comparison of ``runs``; ``warnings`` say what makes a difference doubtful, ``notes`` what else differs."""

    runs: list[Run]
    smoothing: int  # logged steps in the window of the training loss
    warnings: list[str]
    notes: list[str]
    transfers: list[Transfer]
    stages: list[StageComparison]

    @property
    def stage_names(self) -> list[str]:
        """All stages, in the order of training."""
        return [stage.stage for stage in self.stages]


def measure(runs: list[Run], smoothing: int | None) -> Result:
    """Compare the runs; nothing is drawn or written. ``smoothing`` None: chosen by the length of the stages."""
    if smoothing is None:
        smoothing = default_smoothing(stage.train for run in runs for stage in run.stages)
    crossed = transfers(runs, smoothing)
    return Result(
        runs=runs,
        smoothing=smoothing,
        warnings=comparable.warnings(runs),
        notes=comparable.notes(runs) + _late_validations(crossed),
        transfers=crossed,
        stages=head_to_head(runs, smoothing),
    )


def _late_validations(crossed: list[Transfer]) -> list[str]:
    return [
        f"{label} was first validated {one.first_validation:.0f} samples after the transfer to {transfer.target}: "
        "its jump lacks what happened before."
        for transfer in crossed
        for label, one in transfer.runs.items()
        if one.first_validation
    ]


def as_json(result: Result) -> dict[str, Any]:
    """The tree of compare.json. Losses are mean squared errors of the velocity; hours are hours; null: not reached or
    not recorded."""
    return {
        "smoothing": {"training_window_records": result.smoothing, "validation": "none"},
        "fractions": list(FRACTIONS),
        "warnings": result.warnings,
        "notes": result.notes,
        "runs": [_run(run, result.smoothing) for run in result.runs],
        "transfers": [asdict(transfer) for transfer in result.transfers],
        "stages": [asdict(stage) for stage in result.stages],
    }


def _run(run: Run, smoothing: int) -> dict[str, Any]:
    return {
        "label": run.label,
        "path": str(run.path),
        "in_progress": run.in_progress,
        "stages": [
            {
                "name": stage.name,
                "complete": stage.complete,
                "start": stage.start,
                "end": stage.end,
                "train_records": len(stage.train),
                "training_window_records": window_of(stage.train, smoothing),
                "validation_records": len(stage.validation),
                "validation_buckets": list(stage.buckets),
            }
            for stage in run.stages
        ],
    }
