"""The ordered stages of a run, the counters that run on across them, and the learning rate inside one.

``samples`` drives everything: the stage, the learning rate, the weight average, the random state.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from lingen.config import BucketConfig, RunConfig, StageConfig

AnyRun = TypeVar("AnyRun", bound=RunConfig)
TRAIN_FLOPS = 3  # forward + backward, in forwards; what activation checkpointing computes again is not counted


@dataclass(frozen=True)
class Progress:
    """How far a run is. All but the ``stage_`` counters run on across stages and across resumptions."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    hours: float = 0.0  # wall clock inside the training loop
    stage_step: int = 0
    stage_samples: int = 0

    def after(self, *, samples: int, tokens: int, flops: float, hours: float) -> Progress:
        """The counters after one more optimizer step."""
        return Progress(
            self.step + 1,
            self.samples + samples,
            self.tokens + tokens,
            self.flops + flops,
            self.hours + hours,
            self.stage_step + 1,
            self.stage_samples + samples,
        )

    def enter_stage(self) -> Progress:
        """The counters at the first step of the next stage."""
        return replace(self, stage_step=0, stage_samples=0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``Progress(**d)`` reads it back."""
        return asdict(self)


def up_to(config: AnyRun) -> AnyRun:
    """``config`` without the stages that come after ``until``."""
    if config.until is None:
        return config
    names = list(config.stages)
    wanted = names[: names.index(config.until) + 1]
    return config.model_copy(update={"stages": {name: config.stages[name] for name in wanted}})


def learning_rate(stage: StageConfig, stage_samples: int) -> float:
    """The rate of the step that starts after ``stage_samples`` samples of the stage: linear warm-up, then constant or
    cosine down to ``final_lr_share``. The first step of a warm-up is not at zero."""
    if stage_samples < stage.warmup_samples:
        return stage.lr * (stage_samples + 1) / (stage.warmup_samples + 1)
    if stage.lr_schedule == "constant":
        return stage.lr
    done = (stage_samples - stage.warmup_samples) / max(1, stage.samples - stage.warmup_samples)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return stage.lr * (stage.final_lr_share + (1 - stage.final_lr_share) * cosine)


def is_complete(stage: StageConfig, progress: Progress) -> bool:
    """A stage ends with the first step that reaches its samples."""
    return progress.stage_samples >= stage.samples


def bucket_shares(stage: StageConfig) -> list[float]:
    """The share of the stage's steps that each bucket gets; they add up to one."""
    total = sum(bucket.share for bucket in stage.buckets)
    return [bucket.share / total for bucket in stage.buckets]


def planned_steps(stage: StageConfig) -> tuple[int, list[int]]:
    """(steps of the stage, steps a bucket) as the loop will take them, up to rounding of the shares."""
    shares = bucket_shares(stage)
    mean_batch = sum(share * bucket.batch_size for share, bucket in zip(shares, stage.buckets, strict=True))
    steps = math.ceil(stage.samples / mean_batch)
    return steps, [round(share * steps) for share in shares]


def bucket_named(stage: StageConfig, name: str) -> BucketConfig:
    """The stage's bucket of that ``FxHxW`` name."""
    return next(bucket for bucket in stage.buckets if str(bucket) == name)
