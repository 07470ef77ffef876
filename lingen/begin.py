"""Where a stage begins: at a checkpoint of its own (resumption), at the final one of another stage (transfer), or at
the initialization."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.pipeline import Position, StageLoader
from data.shards import Index
from lingen import checkpoint
from lingen.checkpoint import RESUME, Checkpoint
from lingen.config import RunConfig, StageConfig
from lingen.curriculum import AnyRun, Progress
from lingen.dist import Dist
from lingen.ema import Ema
from lingen.errors import UserError
from lingen.export import newest_folder
from lingen.guard import Guard
from lingen.lineage import (
    lineage_entry,
    refuse_cutting_off,
    refuse_other_lineage,
    refuse_other_stage,
    refuse_reopening,
)
from lingen.manifest import read_manifest, step_of
from lingen.runfolder import architecture, run_folder, stage_folder
from lingen.step import Trainee
from lingen.task import Inputs


@dataclass(frozen=True)
class Start:
    """The checkpoint that a stage begins with, if any, and whether it is the stage's own."""

    checkpoint: Checkpoint | None
    resume: bool

    @property
    def progress(self) -> Progress:
        """The counters that the stage begins with; all but its own run on from the stage before."""
        if self.checkpoint is None:
            return Progress()
        progress = Progress(**self.checkpoint.progress["progress"])
        return progress if self.resume else progress.enter_stage()


@dataclass
class StageState:
    """What the steps of a stage change."""

    networks: Trainee
    ema: Ema
    loader: StageLoader
    guard: Guard
    progress: Progress
    lineage: list[dict[str, Any]]  # one entry a stage: which checkpoint it began with, and after how much
    read: int  # samples of the stage, over all ranks and starts
    bad: int  # ... that were holes
    refusal: str = ""  # why a step was left out the last time


def find_start(config: RunConfig, inputs: Inputs, dist: Dist) -> tuple[list[StageConfig], Start]:
    """(the stages still to do, where the first of them begins). Rerunning a command resumes. Collective.

    The last stage that has a checkpoint decides; those before it may be gone.

    Raises:
        UserError: ``init_from`` or the newest checkpoint cannot be used, is of another architecture or lineage, or was
            trained on what the inputs no longer are.
    """
    stages = list(config.stages.values())
    start, remaining = Start(None, resume=False), stages
    for number in reversed(range(len(stages))):
        folder = stage_folder(config, stages[number].name)
        checkpoint.sweep(folder, dist)
        newest = checkpoint.latest(folder, dist)
        if newest is not None:
            refuse_other_stage(stages[number], newest)
            dist.together(partial(refuse_other_lineage, config, stages[:number], newest))  # each reads the disk itself
            refuse_reopening(stages[number], newest)
            start = Start(newest, resume=not newest.manifest.final)
            remaining = stages[number + newest.manifest.final :]
            break
    else:
        start = Start(open_init(config, dist), resume=False)
    if start.checkpoint is not None:
        checkpoint.refuse_other_architecture(start.checkpoint, architecture(config))
        inputs.refuse_others(start.checkpoint)
        if start.resume:
            refuse_other_data(start.checkpoint, remaining[0], config.data.path, inputs.index)
    if remaining:
        dist.together(partial(refuse_cutting_off, config, start.checkpoint, start.progress.step))
    return remaining, start


def open_init(config: RunConfig, dist: Dist) -> Checkpoint | None:
    """The checkpoint that ``init_from`` names, or None where it names none. Collective.

    Raises:
        UserError: there is none, or it is damaged or of another architecture.
    """
    if config.init_from is None:
        return None
    try:
        there = checkpoint.open_checkpoint(Path(config.init_from), dist)
        checkpoint.refuse_other_architecture(there, architecture(config))
    except UserError as error:
        raise UserError(f"init_from={config.init_from}: {error}") from error
    return there


def back_at(config: RunConfig, stage: StageConfig, start: Start, step: int, dist: Dist) -> Start:
    """The stage's newest regular checkpoint up to ``step``, or its beginning; what is later is removed. Collective.

    Not one that a signal left: where a run goes back to must not depend on signals.

    Raises:
        UserError: there is none, and what the stage began with is gone; or each one is damaged.
    """
    folder = stage_folder(config, stage.name)
    regular = checkpoint.latest(folder, dist, only=lambda it: step_of(it) <= step and checkpoint.may_be_regular(it))
    target = beginning(start, dist) if regular is None else Start(regular, resume=True)
    checkpoint.discard_after(folder, target.progress.step, dist)
    return target


def got_on(start: Start, newest: Start) -> bool:
    """Whether a step was taken between two starts of a stage: a checkpoint amid refused steps is no progress."""
    refused: int = newest.checkpoint.progress["guard"]["in_a_row"] if newest.checkpoint and newest.resume else 0
    return newest.progress.step - start.progress.step > refused


def beginning(start: Start, dist: Dist) -> Start:
    """Where the stage that ``start`` is in began. Collective.

    Raises:
        UserError: that checkpoint is gone, or damaged.
    """
    if start.checkpoint is None or not start.resume:
        return start
    origin = start.checkpoint.progress["lineage"][-1]["from_checkpoint"]
    return Start(checkpoint.open_checkpoint(Path(origin), dist) if origin else None, resume=False)


def unfinished(config: AnyRun, dist: Dist) -> AnyRun:
    """``config`` without the stages that need no more training, judged by the manifests alone. Collective."""

    def remaining_here() -> list[str]:
        names = list(config.stages)
        for number in reversed(range(len(names))):
            newest = newest_folder(stage_folder(config, names[number]))
            if newest is not None:
                return names[number + read_manifest(newest).final :]
        return names

    remaining = dist.gather(dist.together(remaining_here))[0]
    return config.model_copy(update={"stages": {name: config.stages[name] for name in remaining}})


def begin_stage(
    config: RunConfig, stage: StageConfig, start: Start, inputs: Inputs, dist: Dist, *, past: Position | None = None
) -> StageState:
    """Build the model in its engine, fill both from ``start``, and open the data at the right place. Collective.

    ``past``: a place in the data that is further than the start's, where what lies between is not to be trained on.
    """
    gc.collect()  # DeepSpeed's engine of the stage before sits in reference cycles
    torch.manual_seed(config.seed)
    there = start.checkpoint
    networks = inputs.build(dist)
    ema = Ema(networks.engine.fragments(), config.ema)
    lineage: list[dict[str, Any]] = []
    if there is not None:
        carry = RESUME if start.resume else stage.carry
        checkpoint.load(there, networks.engine, ema, carry=carry, architecture=architecture(config), dist=dist)
        lineage = there.progress["lineage"]
    if not start.resume:
        lineage = [*lineage, lineage_entry(stage, there, start.progress)]
    loader = dist.together(
        lambda: StageLoader(
            inputs.index,
            stage,
            config.data,
            seed=config.seed,
            rank=dist.data_rank,
            world=dist.data_world,
            grad_accumulation=config.engine.grad_accumulation,
            position=position_of(start) if past is None else position_of(start).past(past),
            bad_log=bad_log(config, dist),
        )
    )
    guard = Guard(config.guard, there.progress["guard"] if there and start.resume else None)
    if past is not None:
        guard.in_a_row = 0
    return StageState(
        networks,
        ema,
        loader,
        guard,
        start.progress,
        lineage,
        read=there.progress["read"] if there and start.resume else 0,
        bad=there.progress["bad"] if there and start.resume else 0,
    )


def position_of(start: Start) -> Position:
    """Where in the stage's data a start begins."""
    there = start.checkpoint
    return Position.from_dict(there.progress["position"]) if there and start.resume else Position()


def bad_log(config: RunConfig, dist: Dist) -> Path | None:
    """Where broken samples are named: once, by the first of the ranks that share them."""
    return run_folder(config) / "bad_samples.jsonl" if dist.sequence_rank == 0 else None


def refuse_other_data(there: Checkpoint, stage: StageConfig, path: str, index: Index) -> None:
    """In the middle of a stage the position is a place in an order of these very samples, at this rate, among these
    buckets.

    Raises:
        UserError: the shards changed since the checkpoint, or the rate, which decides what is long enough, or the
            buckets, which decide together whose a sample is.
    """
    if there.progress["fps"] != stage.fps:
        raise UserError(
            f"stages.{stage.name}.fps={stage.fps:g}, but {there.folder} is amid that stage at {there.progress['fps']:g}"
        )
    earlier, now = there.progress["buckets"], list(map(str, stage.buckets))
    if earlier != now:
        raise UserError(
            f"stages.{stage.name}.buckets are {', '.join(now)}, but {there.folder} is amid that stage with "
            f"{', '.join(earlier)}, which decide together whose a sample is"
        )
    before = there.progress["data_fingerprint"]
    if before != index.fingerprint:
        raise UserError(
            f"data.path={path} does not hold the samples that {there.folder} was trained on (fingerprint "
            f"{index.fingerprint[:12]}, not {before[:12]}); restore them, or begin a new run"
        )
