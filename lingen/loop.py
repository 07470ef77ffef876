"""The stage loop: the one place that sees configuration, data, models, engine, checkpoints and metrics together.

A curriculum equals its stages run one by one with ``init_from``: every stage builds its engine anew and begins at a
checkpoint on disk. The counters run on; the order of the data begins anew with each stage.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from data.batch import Batch
from data.pipeline import holdout_batches
from data.shards import load_index
from lingen import checkpoint
from lingen.begin import Inputs, StageState, Start, bad_log, begin_stage, find_start, load_inputs, open_init
from lingen.config import BucketConfig, Config, StageConfig, token_grid
from lingen.curriculum import TRAIN_FLOPS, Progress, bucket_named, is_complete, learning_rate
from lingen.dist import EXIT_PREEMPTED, Dist, StopSignal, find_place, init
from lingen.engine import DTYPES, choose_forms
from lingen.errors import UserError
from lingen.export import export_finished
from lingen.flow import bucket_shift
from lingen.kernels import forms
from lingen.metrics import Metrics
from lingen.plan import make_plan, print_plan, refuse_impossible, refuse_too_large
from lingen.runfolder import (
    architecture,
    dump_config,
    refuse_other_experiment,
    run_folder,
    stage_folder,
    with_earlier_stages,
    write_aside,
)
from lingen.step import StepResult, train_step
from lingen.validation import validate

ENOUGH_READ = 100  # samples, before the share of bad ones says anything


@dataclass(frozen=True)
class Run:
    """What stays the same over all stages."""

    config: Config
    dist: Dist
    inputs: Inputs
    metrics: Metrics
    stop: StopSignal


def dry_run(config: Config) -> int:
    """Print the plan of every stage; build nothing, write nothing. ``engine.device=cuda`` needs no GPU for that."""
    alone, place = Dist(0, 1, 0, torch.device("cpu")), find_place(os.environ)
    open_init(config, alone)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if config.engine.device == "auto" else config.engine.device
    plan = make_plan(config, load_index(config.data.path), world=place.world, device=device)
    if place.rank == 0:
        print_plan(config, plan)
    return 0


def train(config: Config, stop: StopSignal) -> int:
    """Train every stage that is not finished yet. Returns 0, or ``EXIT_PREEMPTED`` after a signal and its save.

    Raises:
        UserError: before anything is allocated, where the configuration and what lies on disk cannot work together.
    """
    dist = init(config.engine.device, config.engine.sequence_parallel)
    dist.together(lambda: choose_forms(config.kernels.model_dump(), dist.device, DTYPES[config.engine.dtype]))
    inputs = dist.together(lambda: load_inputs(config, dist))
    plan = make_plan(config, inputs.index, world=dist.world, device=dist.device.type)
    refuse_impossible(config, plan, dist.data_world)
    dist.together(lambda: refuse_too_large(config, plan, dist.device))
    if plan.unknown and dist.rank == 0:
        print(f"whether it fits the device was not predicted: {plan.unknown}", file=sys.stderr)
    dist.together(lambda: refuse_other_experiment(config))
    stages, start = find_start(config, inputs, dist)
    export_finished(config, dist)
    code = 0
    if stages:
        metrics = dist.together(lambda: open_run(config, stages, start, dist))
        try:
            code = train_stages(Run(config, dist, inputs, metrics, stop), stages, start)
        finally:
            metrics.close()
    elif dist.rank == 0:
        print(f"{run_folder(config)} is finished: every stage has its final checkpoint")
    dist.close()  # not where a rank failed: the others may never come to it
    return code


def open_run(config: Config, stages: list[StageConfig], start: Start, dist: Dist) -> Metrics:
    """Write the run's configuration down and open its records; the first thing that a start leaves on the disk."""
    if dist.rank == 0:
        write_aside(run_folder(config) / "config.yaml", dump_config(with_earlier_stages(config)))
        print_choices(config, dist)
    return Metrics(
        run_folder(config),
        config.logger,
        run_name=config.name,
        run_config=config.model_dump(mode="json"),
        rank=dist.rank,
        resume_step=start.progress.step,
        anew=None if start.resume else stages[0].name,
        total_samples=start.progress.samples - start.progress.stage_samples + sum(stage.samples for stage in stages),
    )


def train_stages(run: Run, stages: list[StageConfig], start: Start) -> int:
    """One stage after the other, each from the final checkpoint of the one before."""
    for number, stage in enumerate(stages):
        if number and run.dist.any(run.stop.asked):
            return EXIT_PREEMPTED  # between two stages all is saved
        final = train_stage(run, stage, start)
        if final is None:
            return EXIT_PREEMPTED
        start = Start(checkpoint.open_checkpoint(final, run.dist), resume=False)
    return 0


def print_choices(config: Config, dist: Dist) -> None:
    """What was chosen for this machine, said once."""
    engine = f"DeepSpeed ZeRO-{config.engine.zero_stage}" if config.engine.kind == "deepspeed" else "torch"
    together = f", {dist.sequence} a sample" if dist.sequence > 1 else ""
    kernels = forms.describe(dist.device, DTYPES[config.engine.dtype])
    print(
        f"{run_folder(config)}: {config.model.name} {config.size.name}, {engine} in {config.engine.dtype}, "
        f"{dist.world} x {dist.device.type}{together}; kernels: {kernels}",
        flush=True,
    )


def train_stage(run: Run, stage: StageConfig, start: Start) -> Path | None:
    """Train one stage to its end. Returns its final checkpoint, or None where a signal stopped it, after a save."""
    state = begin_stage(run.config, stage, start, run.inputs, run.dist)
    try:
        return run_steps(run, stage, state, resumed=start.resume)
    finally:
        state.networks.engine.close()  # else the next stage's would stand beside it in memory


def run_steps(run: Run, stage: StageConfig, state: StageState, *, resumed: bool) -> Path | None:
    """Step, measure and save until the stage is complete (its final checkpoint) or a signal came (None)."""
    if resumed:
        make_up(run, stage, state)
    else:
        log_transfer(run, stage, state)
        log_validation(run, stage, state, "start")
    done = is_complete(stage, state.progress)  # at once, where the stage was made shorter than its checkpoint is
    steps = iter(state.loader)
    while not done:
        waiting_since = time.perf_counter()
        batches = next(steps)
        result = take_step(run, stage, state, batches, time.perf_counter() - waiting_since)
        done = is_complete(stage, state.progress)
        refuse_too_many_holes(run, state, finished=done)
        if result.votes[0] > 0:
            save(run, stage, state, final=False)  # before all else: whoever stops us may not wait
            return None
        if due(run.config.validation.every_steps, state.progress) and not done:
            log_validation(run, stage, state, "interval")
        if due(run.config.checkpoint.every_steps, state.progress) and not done:
            save(run, stage, state, final=False)
    log_validation(run, stage, state, "end")
    return save(run, stage, state, final=True)


def make_up(run: Run, stage: StageConfig, state: StageState) -> None:
    """Measure what a signal left out, when it came at a step that was to be validated."""
    if due(run.config.validation.every_steps, state.progress) and not is_complete(stage, state.progress):
        there = run.metrics.has("validation", state.progress.step, stage.name, "interval")  # known to rank 0 alone
        if not run.dist.any(there):
            log_validation(run, stage, state, "interval")


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


def due(every: int, progress: Progress) -> bool:
    """Whether something that happens every so many steps of a stage (0: never) happens now."""
    return every > 0 and progress.stage_step % every == 0


def take_step(run: Run, stage: StageConfig, state: StageState, batches: list[Batch], data_wait: float) -> StepResult:
    """One optimizer step, the weight average, the counters and the record."""
    config, began = run.config, time.perf_counter()
    bucket = bucket_named(stage, str(batches[0].bucket))
    grid = token_grid(config, bucket.frames, bucket.height, bucket.width)
    tokens = prod(grid)
    lr = learning_rate(stage, state.progress.stage_samples)
    result = train_step(
        state.networks,
        batches,
        lr=lr,
        seed=config.seed,
        samples_seen=state.progress.samples,
        shift=stage.timestep_shift or bucket_shift(tokens, config.flow),
        flow=config.flow,
        dist=run.dist,
        votes=lambda: [float(run.stop.asked)],
        refuse=lambda loss, norm: None if math.isfinite(loss) and math.isfinite(norm) else "it is not finite",
        lost=state.loader.lost,
    )
    if result.refused:
        raise UserError(
            f"step {state.progress.step + 1} of stage {stage.name}: loss={result.loss}, grad_norm={result.grad_norm}; "
            f"nothing of it was saved. Lower stages.{stage.name}.lr={stage.lr:g} or optim.grad_clip, then run again"
        )
    step_time = time.perf_counter() - began
    state.progress = state.progress.after(
        samples=bucket.batch_size,
        tokens=bucket.batch_size * tokens,
        flops=TRAIN_FLOPS * bucket.batch_size * state.networks.forward_flops(grid),
        hours=(step_time + data_wait) / 3600,
    )
    state.read += bucket.batch_size
    state.bad += bucket.batch_size - result.valid
    state.ema.update(state.progress.samples, bucket.batch_size)
    if state.progress.step % config.logger.every_steps == 0:
        run.metrics.log(
            counters("train", stage, state.progress)
            | {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "step_time_s": step_time,
                "data_wait_s": data_wait,
                "tokens_per_s": bucket.batch_size * tokens / (step_time + data_wait),
                "bucket": str(bucket),
                "valid": result.valid,
            }
        )
    return result


def counters(kind: str, stage: StageConfig, progress: Progress) -> dict[str, Any]:
    """The part that all records share; scripts/compare.py reads them."""
    return {"kind": kind, "stage": stage.name, **progress.as_dict()}


def log_transfer(run: Run, stage: StageConfig, state: StageState) -> None:
    """Write down where the stage came from."""
    entry = state.lineage[-1]
    record = counters("transfer", stage, state.progress)
    origin = {"from": entry["from_stage"], "checkpoint": entry["from_checkpoint"]}
    run.metrics.log(record | origin | fingerprints(run))


def fingerprints(run: Run) -> dict[str, str]:
    """What the run sees: without it, two losses cannot be compared, nor a position in the data understood."""
    return {
        "data_fingerprint": run.inputs.index.fingerprint,
        "autoencoder_fingerprint": run.inputs.autoencoder.fingerprint,
    }


def log_validation(run: Run, stage: StageConfig, state: StageState, at: str) -> None:
    """Measure the stage's buckets on the held-out set; ``at`` is 'start', 'interval' or 'end'."""
    config = run.config
    if not config.validation.every_steps:
        return

    def held_out(bucket: BucketConfig) -> Iterator[Batch]:
        return holdout_batches(
            run.inputs.index,
            bucket,
            stage.fps,
            config.data,
            limit=config.validation.samples,
            batch_size=config.validation.batch_size,
            rank=run.dist.data_rank,
            world=run.dist.data_world,
            bad_log=bad_log(config, run.dist) if at == "start" else None,  # named once is enough
        )

    measured = validate(state.networks, stage, held_out, config.validation, run.dist)
    run.metrics.log(counters("validation", stage, state.progress) | measured | {"at": at})


def save(run: Run, stage: StageConfig, state: StageState, *, final: bool) -> Path:
    """Write a checkpoint, let the oldest go, and export the weight average where the stage is finished."""
    config = run.config
    run.metrics.sync()
    folder = checkpoint.save(
        stage_folder(config, stage.name),
        step=state.progress.step,
        samples=state.progress.samples,
        tokens=state.progress.tokens,
        progress={
            "progress": state.progress.as_dict(),
            "position": state.loader.position.as_dict(),
            "lineage": state.lineage,
            "read": state.read,
            "bad": state.bad,
            **fingerprints(run),
        },
        architecture=architecture(config),
        final=final,
        engine=state.networks.engine,
        ema=state.ema,
        dist=run.dist,
    )
    kept = config.checkpoint.keep_last
    run.dist.together(lambda: checkpoint.prune(folder, kept) if run.dist.rank == 0 else None)
    if final:
        export_finished(config, run.dist)
    return folder
