"""What a run will do, worked out before anything is allocated: tokens, batches, steps, samples, parameters, FLOPs.

``train.py dry_run=true`` prints it; a real run refuses to start where it finds a bucket that no sample can fill.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod

import torch
from rich.console import Console
from rich.table import Table

from data.pipeline import BucketCount, check_buckets
from data.shards import Index
from lingen.config import BucketConfig, Config, StageConfig, token_grid
from lingen.curriculum import planned_steps
from lingen.errors import UserError
from lingen.models import make_model

TRAIN_FLOPS = 3  # forward + backward, in forwards; what activation checkpointing computes again is not counted


@dataclass(frozen=True)
class BucketPlan:
    """One bucket of one stage."""

    bucket: BucketConfig
    tokens: int  # a sample
    steps: int
    train_samples: int  # that the shards hold for it
    holdout_samples: int
    forward_flops: int  # a sample


@dataclass(frozen=True)
class StagePlan:
    """One stage; ``flops`` is for training it."""

    stage: StageConfig
    steps: int
    buckets: list[BucketPlan]

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

    parameters: int
    stages: list[StagePlan]


def make_plan(config: Config, index: Index) -> Plan:
    """The plan of every stage; the model is built on the meta device and takes no memory."""
    with torch.device("meta"):
        model = make_model(config, text_dim=config.text.dim)
    counts = check_buckets(index, list(config.stages.values()), config.data)
    stages = []
    for stage in config.stages.values():
        total, steps = planned_steps(stage)
        buckets = []
        for bucket, bucket_steps in zip(stage.buckets, steps, strict=True):
            grid = token_grid(config, bucket.frames, bucket.height, bucket.width)
            count: BucketCount = counts[stage.name][str(bucket)]
            forward = model.flops(grid, config.text.length)
            buckets.append(BucketPlan(bucket, prod(grid), bucket_steps, count.train, count.holdout, forward))
        stages.append(StagePlan(stage, total, buckets))
    return Plan(sum(p.numel() for p in model.parameters()), stages)


def refuse_impossible(config: Config, plan: Plan, world: int) -> None:
    """``world``: the ranks, or groups of ranks, that a batch is cut into.

    Raises:
        UserError: a bucket that no sample fills, or a batch that the ranks and the accumulation do not divide.
    """
    parts, together = world * config.engine.grad_accumulation, config.engine.sequence_parallel
    ranks = f"{world} ranks" if together == 1 else f"{world} groups of engine.sequence_parallel={together} ranks"
    for stage in plan.stages:
        for b in stage.buckets:
            where = f"stages.{stage.stage.name}.buckets: bucket {b.bucket}"
            if not b.train_samples:
                raise UserError(
                    f"{where} is empty: no sample in data.path={config.data.path} can fill it at "
                    f"fps={stage.stage.fps:g}; add longer clips{' or images' if b.bucket.frames == 1 else ''}, "
                    "or take the bucket out"
                )
            if not b.holdout_samples and config.validation.every_steps:
                raise UserError(
                    f"{where} has no held-out sample to validate on; raise data.holdout_share="
                    f"{config.data.holdout_share:g} or set validation.every_steps=0"
                )
            if b.bucket.batch_size % parts:
                raise UserError(
                    f"{where} has batch_size={b.bucket.batch_size}, which is not a multiple of {ranks} x "
                    f"engine.grad_accumulation={config.engine.grad_accumulation}"
                )


def print_plan(config: Config, plan: Plan) -> None:
    """The plan as a table on stdout."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(
        f"[bold]{config.name}[/bold]: {config.model.name} {config.size.name}, {config.depth} layers of width "
        f"{config.size.d_model}, {plan.parameters:,} parameters"
    )
    table = Table("stage", "bucket", "fps", "tokens", "batch", "steps", "samples", "in shards", "held out", "PFLOPs")
    for column in table.columns[2:]:
        column.justify = "right"
    for stage in plan.stages:
        for b in stage.buckets:
            samples = b.steps * b.bucket.batch_size
            found = f"{b.train_samples:,}" if b.train_samples else "[red]empty[/red]"
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
                f"{b.holdout_samples:,}",
                f"{pflops:.4g}",
            )
        table.add_section()
    console.print(table)
    console.print(
        f"total: {sum(s.steps for s in plan.stages):,} steps, {sum(s.tokens for s in plan.stages):,} tokens, "
        f"{sum(s.flops for s in plan.stages) / 1e15:.4g} PFLOPs of training (3x forward)"
    )
    for stage in plan.stages:
        for b in stage.buckets:
            if not b.train_samples:
                console.print(f"empty bucket: stages.{stage.stage.name} {b.bucket}: no sample can fill it")
