"""The stage loop: the one place that sees configuration, data, models, engine, checkpoints and metrics together.

A curriculum equals its stages run one by one with ``init_from``: every stage builds its engine anew and begins at a
checkpoint on disk. The counters run on; the order of the data begins anew with each stage.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from enum import Enum
from pathlib import Path

import torch

from data.batch import Batch
from data.pipeline import Position
from data.shards import load_index
from lingen import checkpoint
from lingen.agreement import refuse_disagreement
from lingen.begin import (
    StageState,
    Start,
    back_at,
    begin_stage,
    find_start,
    got_on,
    open_init,
    unfinished,
)
from lingen.config import RunConfig, StageConfig
from lingen.curriculum import TRAIN_FLOPS, bucket_named, is_complete, learning_rate, up_to
from lingen.dist import EXIT_PREEMPTED, Dist, StopSignal, find_place, init
from lingen.errors import UserError
from lingen.export import export_finished
from lingen.lease import Lease
from lingen.plan import make_plan, print_plan, refuse_impossible, refuse_too_large, samples_of
from lingen.records import counters, due, log_refused, log_return, log_transfer, log_validation, make_up
from lingen.run import Run, finish_save, open_records, save, save_final
from lingen.runfolder import refuse_other_experiment, run_folder
from lingen.saver import Saver
from lingen.step import StepResult, train_step
from lingen.task import Inputs
from lingen.tasks import task_of
from lingen.watchdog import Watchdog

ENOUGH_READ = 100  # samples, before the share of bad ones says anything


class Ended(Enum):
    """Why the steps of a stage came to an end."""

    COMPLETE = "its samples are seen"
    STOPPED = "a signal came, and the state is saved"
    REFUSED = "too many steps were refused in a row"


def dry_run(config: RunConfig) -> int:
    """Print the plan of every stage; build nothing, write nothing. ``engine.device=cuda`` needs no GPU for that."""
    config = up_to(config)
    alone, place = Dist(0, 1, 0, torch.device("cpu")), find_place(os.environ)
    open_init(config, alone)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if config.engine.device == "auto" else config.engine.device
    plan = make_plan(config, load_index(config.data.path), world=place.world, device=device)
    if place.rank == 0:
        print_plan(config, plan)
    return 0


def train(config: RunConfig, stop: StopSignal) -> int:
    """Train every stage that is not finished yet. Returns 0, or ``EXIT_PREEMPTED`` after a signal and its save.

    Raises:
        UserError: before anything is allocated, where the configuration and what lies on disk cannot work together.
    """
    config = up_to(config)
    dist = init(config.engine.device, config.engine.sequence_parallel)
    watchdog = Watchdog(run_folder(config), dist.rank, config.watchdog.step_s)
    lease = None
    try:
        inputs = prepare(config, dist)
        watchdog.beat("taking the lease of the run folder")
        lease = dist.together(lambda: Lease.take(run_folder(config)) if dist.rank == 0 else None)
        code = train_alone(config, inputs, dist, stop, watchdog, lease)
    finally:
        watchdog.stop()
        if lease is not None:
            lease.release()
            with suppress(OSError):
                run_folder(config).rmdir()  # where it was refused before anything was written there
    dist.close()  # not where a rank failed: the others may never come to it
    return code


def prepare(config: RunConfig, dist: Dist) -> Inputs:
    """Read what the run will see, and refuse what cannot work. Nothing is written, and no model built.

    Raises:
        UserError: on all ranks.
    """
    task = task_of(config)
    dist.together(lambda: task.choose_forms(dist.device))
    inputs = dist.together(lambda: task.load_inputs(dist))
    refuse_disagreement(config, inputs.index.fingerprint, inputs.frozen(), dist)
    todo = unfinished(config, dist)
    plan = make_plan(todo, inputs.index, world=dist.world, device=dist.device.type)
    refuse_impossible(todo, plan, dist.data_world)
    dist.together(lambda: refuse_too_large(todo, plan, dist.device))
    if dist.rank == 0:
        print(*map(samples_of, plan.stages), sep="\n", flush=True)
    if plan.unknown and dist.rank == 0:
        print(f"whether it fits the device was not predicted: {plan.unknown}", file=sys.stderr)
    dist.together(lambda: refuse_other_experiment(config))
    return inputs


def train_alone(
    config: RunConfig, inputs: Inputs, dist: Dist, stop: StopSignal, watchdog: Watchdog, lease: Lease | None
) -> int:
    """``train``, as the run folder's one writer; ``lease`` is rank 0's."""
    dist.together(lambda: refuse_other_experiment(config))  # again: another may have written before it let go
    watchdog.beat("checking the newest checkpoint")
    stages, start = find_start(config, inputs, dist)
    watchdog.beat("exporting what is finished")
    export_finished(config, dist, inputs.export)
    if not stages:
        if dist.rank == 0:
            print(f"{run_folder(config)} is finished: every stage has its final checkpoint")
        return 0
    task = task_of(config)
    metrics = dist.together(lambda: open_records(config, task, inputs, stages, start, dist))
    saver = Saver(dist, writers=config.checkpoint.writers, may_publish=lease.check if lease else lambda: None)
    try:
        return train_stages(Run(config, task, dist, inputs, metrics, saver, stop, watchdog), stages, start)
    finally:
        saver.close()
        metrics.close()


def train_stages(run: Run, stages: list[StageConfig], start: Start) -> int:
    """One stage after the other, each from the final checkpoint of the one before."""
    for number, stage in enumerate(stages):
        if number and run.dist.any(run.stop.asked):
            return EXIT_PREEMPTED  # between two stages all is saved
        final = train_stage(run, stage, start)
        if final is None:
            return EXIT_PREEMPTED
        run.watchdog.beat(f"checking {final}")
        start = Start(checkpoint.open_checkpoint(final, run.dist), resume=False)
    return 0


def train_stage(run: Run, stage: StageConfig, start: Start) -> Path | None:
    """Train one stage to its end. Returns its final checkpoint, or None where a signal stopped it, after a save.

    Where too many steps were refused in a row, the stage goes on from its last checkpoint, past their data.

    Raises:
        UserError: it went back more than ``guard.rollbacks`` times without a new checkpoint between.
    """
    past: Position | None = None
    returns, refusal = 0, ""
    while True:
        run.watchdog.beat(f"building the model of {stage.name}, and loading what it begins with")
        state = begin_stage(run.config, stage, start, run.inputs, run.dist, past=past)
        try:
            if past is not None:
                log_return(run, stage, state, refusal)
            elif not start.resume:
                log_transfer(run, stage, state)
            ended = run_steps(run, stage, state, begins=past is None and not start.resume)
            if ended is Ended.COMPLETE:
                return save_final(run, stage, state)
            finish_save(run)
            if ended is Ended.STOPPED:
                return None
            past, refusal = state.loader.position, state.refusal
        finally:
            state.networks.engine.close()  # else the next stage's would stand beside it in memory
        run.watchdog.beat(f"going back in {stage.name}")
        newest = back_at(run.config, stage, start, state.progress.step, run.dist)
        returns = 1 if got_on(start, newest) else returns + 1
        start = newest
        refuse_going_in_circles(run, stage, start, returns, refusal)


def refuse_going_in_circles(run: Run, stage: StageConfig, start: Start, returns: int, refusal: str) -> None:
    """Raises:
    UserError: other data do not help.
    """
    if returns > run.config.guard.rollbacks:
        raise UserError(
            f"stage {stage.name} went back to step {start.progress.step} guard.rollbacks={run.config.guard.rollbacks} "
            f"times and always had {run.config.guard.in_a_row} steps refused in a row, the last because {refusal}. "
            f"Lower stages.{stage.name}.lr={stage.lr:g} or optim.grad_clip, or look at the samples that "
            f"{run_folder(run.config)}/metrics.jsonl names, then run again"
        )


def run_steps(run: Run, stage: StageConfig, state: StageState, *, begins: bool) -> Ended:
    """Step, measure and save until the stage is complete, a signal came, or the guard has had enough."""
    measured = log_validation(run, stage, state, "start") if begins else make_up(run, stage, state)
    if not measured:
        return Ended.STOPPED  # nothing happened since the last save
    done = is_complete(stage, state.progress)  # at once, where the stage was made shorter than its checkpoint is
    steps = iter(state.loader)
    while not done:
        run.watchdog.beat(f"step {state.progress.step + 1} of {stage.name}")
        waiting_since = time.perf_counter()
        batches = next(steps)
        result = take_step(run, stage, state, batches, time.perf_counter() - waiting_since)
        done = is_complete(stage, state.progress)
        refuse_too_many_holes(run, state, finished=done)
        if result.votes[0]:  # before all else: whoever stops us may not wait
            if not state.guard.must_roll_back:
                save(run, stage, state)
            return Ended.STOPPED
        if state.guard.must_roll_back:
            return Ended.REFUSED
        run.saver.advance(*result.votes[1:])
        if due(run.config.validation.every_steps, state.progress) and not done:
            measured = log_validation(run, stage, state, "interval")
        if not measured or (due(run.config.checkpoint.every_steps, state.progress) and not done):
            save(run, stage, state)
        if not measured:
            return Ended.STOPPED
    if not log_validation(run, stage, state, "end"):
        save(run, stage, state)
        return Ended.STOPPED
    return Ended.COMPLETE


def refuse_too_many_holes(run: Run, state: StageState, *, finished: bool) -> None:
    """Judged over all ranks, from ``ENOUGH_READ`` samples on and at the end of the stage; before anything is saved.

    Raises:
        UserError: more than ``data.max_bad_share`` of the samples read were broken.
    """
    share = run.config.data.max_bad_share
    allowed = max(1.0, share * state.read) if share else 0.0  # one among few says nothing
    if (finished or state.read >= ENOUGH_READ) and state.bad > allowed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in state.loader.bad.most_common())
        raise UserError(
            f"{state.bad} of {state.read} samples read are bad ({reasons or 'on other ranks'}), more than "
            f"data.max_bad_share={share:g}; {run_folder(run.config)}/bad_samples-rank*.jsonl name them"
        )


def take_step(run: Run, stage: StageConfig, state: StageState, batches: list[Batch], data_wait: float) -> StepResult:
    """One optimizer step, the weight average, the counters and the records."""
    config, began = run.config, time.perf_counter()
    bucket = bucket_named(stage, str(batches[0].bucket))
    tokens = run.task.tokens(bucket)
    lr = learning_rate(stage, state.progress.stage_samples)
    result = train_step(
        state.networks,
        batches,
        lr=lr,
        stage=stage,
        samples_seen=state.progress.samples,
        dist=run.dist,
        votes=lambda: [float(run.stop.asked), *run.saver.votes()],
        refuse=lambda loss, norm: state.guard.reason(str(bucket), loss, norm),
        lost=state.loader.lost,
    )
    step_time = time.perf_counter() - began
    state.progress = state.progress.after(
        samples=bucket.batch_size,
        tokens=bucket.batch_size * tokens,
        flops=TRAIN_FLOPS * bucket.batch_size * run.task.forward_flops(bucket),
        hours=(step_time + data_wait) / 3600,
    )
    state.read += bucket.batch_size
    state.bad += bucket.batch_size - result.valid
    if result.valid:
        state.guard.note(str(bucket), result.loss, result.grad_norm, refused=result.refused is not None)
    if result.refused is None:
        state.ema.update(state.progress.samples, bucket.batch_size)
    if state.progress.step % config.logger.every_steps == 0:
        run.metrics.log(
            counters("train", stage, state.progress)
            | {
                "loss": result.loss,
                **result.terms,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "step_time_s": step_time,
                "data_wait_s": data_wait,
                "tokens_per_s": bucket.batch_size * tokens / (step_time + data_wait),
                "bucket": str(bucket),
                "valid": result.valid,
            }
        )
    if result.refused is not None:
        state.refusal = result.refused
        log_refused(run, stage, state, batches, result)
    return result
