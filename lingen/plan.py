"""What a run will do, worked out before anything is allocated: tokens, batches, steps, samples, FLOPs, memory.

``train.py dry_run=true`` prints it; a real run refuses to start where it finds a bucket that no sample can fill, or a
stage that does not fit its device.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import ceil

import psutil
import torch
from rich.console import Console
from rich.table import Table

from data.counts import BucketCount, check_buckets
from data.shards import Index
from lingen.config import BucketConfig, Config, RunConfig, StageConfig
from lingen.curriculum import TRAIN_FLOPS, planned_steps
from lingen.errors import UserError
from lingen.memory import Memory
from lingen.stage_config import multiple_hint
from lingen.task import Task
from lingen.tasks import task_of


@dataclass(frozen=True)
class BucketPlan:
    """One bucket of one stage."""

    bucket: BucketConfig
    tokens: int  # a sample
    steps: int
    count: BucketCount  # of what the shards hold for it
    forward_flops: int  # a sample


@dataclass(frozen=True)
class StagePlan:
    """One stage; ``flops`` is for training it."""

    stage: StageConfig
    steps: int
    buckets: list[BucketPlan]
    none: dict[str, int]  # samples in no bucket, by the reason
    memory: Memory | None  # of one rank, on the largest bucket; None where ``Plan.unknown`` says why

    @property
    def largest(self) -> BucketPlan:
        """The bucket of the most tokens a batch."""
        return largest_of(self.buckets)

    @property
    def tokens(self) -> int:
        """Tokens that the stage trains on."""
        return sum(b.steps * b.bucket.batch_size * b.tokens for b in self.buckets)

    @property
    def flops(self) -> float:
        """Training FLOPs of the stage."""
        return float(sum(TRAIN_FLOPS * b.steps * b.bucket.batch_size * b.forward_flops for b in self.buckets))


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    model: str  # in a few words
    parameters: int
    stages: list[StagePlan]
    world: int  # ranks
    device: str
    unknown: str | None  # why memory could not be predicted


def make_plan(config: RunConfig, index: Index, *, world: int, device: str) -> Plan:
    """The plan of every stage on so many ranks and that kind of device; the model takes no memory."""
    task = task_of(config)
    counts = check_buckets(index, list(config.stages.values()), config.data)
    stages: list[StagePlan] = []
    unknown = None
    for stage in config.stages.values():
        total, steps = planned_steps(stage)
        buckets = []
        for bucket, bucket_steps in zip(stage.buckets, steps, strict=True):
            count, forward = counts[stage.name].buckets[str(bucket)], task.forward_flops(bucket)
            buckets.append(BucketPlan(bucket, task.tokens(bucket), bucket_steps, count, forward))
        memory = None
        try:
            memory = stage_memory(config, task, largest_of(buckets), world, device)
        except Exception as error:  # of an unknown release of Triton, say: said, but no reason not to start
            unknown = f"{type(error).__name__}: {error}"
        stages.append(StagePlan(stage, total, buckets, counts[stage.name].none, memory))
    return Plan(f"{task.name}, {task.shape}", task.parameters, stages, world, device, unknown)


def largest_of(buckets: list[BucketPlan]) -> BucketPlan:
    """The bucket of the most tokens a batch."""
    return max(buckets, key=lambda b: b.tokens * b.bucket.batch_size)


def stage_memory(config: RunConfig, task: Task, plan: BucketPlan, world: int, device: str) -> Memory:
    """What one rank needs for the bucket's micro-batches."""
    bucket, engine = plan.bucket, config.engine
    micro = ceil(bucket.batch_size / max(1, world // engine.sequence_parallel) / engine.grad_accumulation)
    return task.memory(bucket, batch=micro, world=world, device=device)


def refuse_impossible(config: RunConfig, plan: Plan, world: int) -> None:
    """``world``: the ranks, or groups of ranks, that a batch is cut into.

    Raises:
        UserError: a bucket that no sample fills, or a batch that the ranks and the accumulation do not divide.
    """
    parts, together = world * config.engine.grad_accumulation, config.engine.sequence_parallel
    ranks = f"{world} ranks" if together == 1 else f"{world} groups of engine.sequence_parallel={together} ranks"
    for stage in plan.stages:
        for b in stage.buckets:
            where = f"stages.{stage.stage.name}.buckets: bucket {b.bucket}"
            if b.count.empty:
                raise UserError(f"{where} is empty: {b.count.empty}")
            if not b.count.holdout and config.validation.every_steps:
                raise UserError(
                    f"{where} has no held-out sample to validate on; raise data.holdout_share="
                    f"{config.data.holdout_share:g} or set validation.every_steps=0"
                )
            if b.bucket.batch_size % parts:
                raise UserError(
                    f"{where} has batch_size={b.bucket.batch_size}, which is not a multiple of {ranks} x "
                    f"engine.grad_accumulation={config.engine.grad_accumulation}{multiple_hint(stage.stage, parts)}"
                )


def refuse_too_large(config: RunConfig, plan: Plan, device: torch.device) -> None:
    """Raises:
    UserError: a stage needs more memory than the device has.
    """
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = psutil.virtual_memory().total
    for stage in plan.stages:
        if stage.memory is not None and stage.memory.total > there:
            raise UserError(
                f"stages.{stage.stage.name}: bucket {stage.largest.bucket} needs {in_gb(stage.memory)} on each rank, "
                f"and {device} has {there / 1e9:.3g} GB; {ways_out(config, plan.world)}"
            )


def in_gb(memory: Memory) -> str:
    """The sum and what it is made of."""
    parts = {name: size for name, size in memory.as_dict().items() if name not in ("building", "total") and size}
    made_of = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
    building = f"; {memory.building / 1e9:.3g} as it is built" if memory.building > memory.step else ""
    return f"{memory.total / 1e9:.3g} GB ({made_of}{building})"


def ways_out(config: RunConfig, world: int) -> str:
    """What would need less memory."""
    engine, is_backbone = config.engine, isinstance(config, Config)
    ways = [
        "engine.activation_checkpointing=true" if not engine.activation_checkpointing else "",
        f"engine=zero{max(2, engine.zero_stage + 1)}" if engine.zero_stage < (3 if is_backbone else 2) else "",
        "engine.dtype=bf16" if engine.dtype == "fp32" else "",
        f"a larger engine.grad_accumulation than {engine.grad_accumulation}",
        f"a larger engine.sequence_parallel than {engine.sequence_parallel}" if is_backbone else "",
        f"more ranks than {world}",
        "a smaller batch_size",
    ]
    return f"try {', '.join(way for way in ways if way)}"


def print_plan(config: RunConfig, plan: Plan) -> None:
    """The plan as a table on stdout."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    print_training(console, config, plan)
    console.print(f"memory of each rank, {plan.world} in all, device {plan.device}:")
    for stage in plan.stages:
        if stage.memory is not None:
            console.print(f"  {stage.stage.name}: {in_gb(stage.memory)} at {stage.largest.bucket}", soft_wrap=True)
    if plan.unknown:
        console.print(f"  not predicted: {plan.unknown}", soft_wrap=True, markup=False)
    for stage in plan.stages:
        for b in stage.buckets:
            if b.count.empty:
                line = f"empty bucket: stages.{stage.stage.name} {b.bucket}: {b.count.empty}"
                console.print(line, soft_wrap=True, markup=False)


def print_training(console: Console, config: RunConfig, plan: Plan) -> None:
    """The part of the plan that does not depend on the machine: what is trained, and what it costs."""
    console.print(f"[bold]{config.name}[/bold]: {plan.model}, {plan.parameters:,} parameters")
    table = Table("stage", "bucket", "fps", "tokens", "batch", "steps", "samples", "in shards", "held out", "PFLOPs")
    for column in table.columns[2:]:
        column.justify = "right"
    for stage in plan.stages:
        for b in stage.buckets:
            samples = b.steps * b.bucket.batch_size
            found = f"{b.count.train:,}" if b.count.train else "[red]empty[/red]"
            pflops = TRAIN_FLOPS * samples * b.forward_flops / 1e15
            table.add_row(
                stage.stage.name,
                str(b.bucket),
                f"{stage.stage.fps:g}",
                f"{b.tokens:,}",
                f"{b.bucket.batch_size:,}",
                f"{b.steps:,}",
                f"{samples:,}",
                found,
                f"{b.count.holdout:,}",
                f"{pflops:.4g}",
            )
        table.add_section()
    console.print(table)
    for stage in plan.stages:
        if stage.none:
            console.print(f"{stage.stage.name}: {in_no_bucket(stage.none)}", soft_wrap=True, markup=False)
    console.print(
        f"total: {sum(s.steps for s in plan.stages):,} steps, {sum(s.tokens for s in plan.stages):,} tokens, "
        f"{sum(s.flops for s in plan.stages) / 1e15:.4g} PFLOPs of training (3x forward)"
    )


def samples_of(stage: StagePlan) -> str:
    """How many samples each bucket of a stage has, in one line."""
    each = ", ".join(f"{b.bucket} {b.count.train:,} (held out {b.count.holdout:,})" for b in stage.buckets)
    return f"{stage.stage.name}: samples of {each}{'; ' if stage.none else ''}{in_no_bucket(stage.none)}"


def in_no_bucket(none: dict[str, int]) -> str:
    """How many samples a stage leaves out, and why; empty where there is none."""
    return f"in no bucket: {'; '.join(f'{count:,} {reason}' for reason, count in none.items())}" if none else ""
