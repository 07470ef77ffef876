"""What a run writes down as it goes on: steps, refused steps, transfers, validations, returns to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data.batch import Batch
from data.pipeline import holdout_batches
from lingen.begin import StageState, bad_log
from lingen.config import BucketConfig, StageConfig
from lingen.curriculum import Progress, is_complete
from lingen.run import Run
from lingen.step import StepResult, step_keys
from lingen.validation import validate


def counters(kind: str, stage: StageConfig, progress: Progress) -> dict[str, Any]:
    """The part that all records share; scripts/compare.py reads them."""
    return {"kind": kind, "stage": stage.name, **progress.as_dict()}


def log_transfer(run: Run, stage: StageConfig, state: StageState) -> None:
    """Write down where the stage came from."""
    entry = state.lineage[-1]
    record = counters("transfer", stage, state.progress)
    origin = {"from": entry["from_stage"], "checkpoint": entry["from_checkpoint"]}
    run.metrics.log(record | origin | run.inputs.fingerprints())


def log_refused(run: Run, stage: StageConfig, state: StageState, batches: list[Batch], result: StepResult) -> None:
    """Name the samples of a step that was left out, in the order of the global batch. Collective."""
    keys = step_keys(batches, run.dist)
    run.metrics.log(counters("refused", stage, state.progress) | {"reason": result.refused, "keys": keys})


def log_return(run: Run, stage: StageConfig, state: StageState, reason: str) -> None:
    """Forget the records after the checkpoint that the run went back to, but not why it did.

    The record stands at that checkpoint's step: a start that comes after it goes the same way, and finds it there.
    """
    run.metrics.rewind(state.progress.step)
    skipped = state.loader.position.skipped
    record = counters("rollback", stage, state.progress)
    run.metrics.log(record | {"at": f"skipped {skipped}", "skipped": skipped, "reason": reason})


def log_validation(run: Run, stage: StageConfig, state: StageState, at: str) -> bool:
    """Measure the stage's buckets on the held-out set; ``at`` is 'start', 'interval' or 'end'.

    Returns False where a signal came first: then nothing was written.
    """
    config = run.config
    if not config.validation.every_steps:
        return True

    def held_out(bucket: BucketConfig) -> Iterator[Batch]:
        return holdout_batches(
            run.inputs.index,
            stage,
            bucket,
            config.data,
            limit=config.validation.samples,
            batch_size=config.validation.batch_size,
            rank=run.dist.data_rank,
            world=run.dist.data_world,
            bad_log=bad_log(config, run.dist) if at == "start" else None,  # named once is enough
        )

    def asked_to_stop() -> bool:
        return run.asked_to_stop(f"validation of {stage.name}")

    measured = validate(state.networks, stage, held_out, run.dist, asked_to_stop)
    if measured is None:
        return False
    run.metrics.log(counters("validation", stage, state.progress) | measured | {"at": at})
    return True


def make_up(run: Run, stage: StageConfig, state: StageState) -> bool:
    """Measure what a signal left out, when it came at a step that was to be validated. As ``log_validation``."""
    if due(run.config.validation.every_steps, state.progress) and not is_complete(stage, state.progress):
        there = run.metrics.has("validation", state.progress.step, stage.name, "interval")  # known to rank 0 alone
        if not run.dist.any(there):
            return log_validation(run, stage, state, "interval")
    return True


def due(every: int, progress: Progress) -> bool:
    """Whether something that happens every so many steps of a stage (0: never) happens now; not at its beginning."""
    return every > 0 and progress.stage_step > 0 and progress.stage_step % every == 0
