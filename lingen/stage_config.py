"""The part of a run's schema that says what a stage trains on, for how long, and what it begins with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import lcm
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lingen.model_config import Name, Section


class BucketConfig(Section):
    """One shape that a stage trains on; ``batch_size`` counts the samples of a global batch over all ranks."""

    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    batch_size: Annotated[int, Field(ge=0)] = 0  # 0: to be worked out from the stage's token_budget
    share: PositiveFloat = 1.0  # of the stage's steps, relative to the other buckets

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


class CarryConfig(Section):
    """What a transfer brings into the stage from the checkpoint before it."""

    weights: Literal["model", "ema"] = "model"
    ema: Literal["carry", "fresh"] = "carry"
    optimizer: Literal["carry", "fresh"] = "fresh"


class StageConfig(Section):
    """One step of the curriculum: what is trained, for how many samples, at which rate."""

    name: Name
    buckets: Annotated[list[BucketConfig], Field(min_length=1)]
    token_budget: PositiveInt | None = None  # latent tokens of an optimizer step, in place of each batch_size
    batch_multiple: PositiveInt = 1  # ... which is then a multiple of this
    samples: PositiveInt
    lr: PositiveFloat
    fps: PositiveFloat = 16.0
    warmup_samples: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    final_lr_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1  # of lr, at the end of a cosine
    timestep_shift: PositiveFloat | None = None  # None: from the bucket's tokens (flow.*)
    carry: CarryConfig = CarryConfig()

    @model_validator(mode="after")
    def _buckets_are_distinct(self) -> StageConfig:
        for a, b in pairwise(sorted(map(str, self.buckets))):
            if a == b:
                raise ValueError(f"bucket {a} is listed twice; give it one entry with the summed share")
        return self

    @model_validator(mode="after")
    def _batches_are_given(self) -> StageConfig:
        if self.token_budget is not None:
            return self
        for bucket in self.buckets:
            if not bucket.batch_size:
                raise ValueError(
                    f"stages.{self.name}.buckets: bucket {bucket} has no batch_size, and stages.{self.name} no "
                    "token_budget; give one of them"
                )
        if self.batch_multiple > 1:
            raise ValueError(
                f"stages.{self.name}.batch_multiple={self.batch_multiple} goes with a token_budget, and none is "
                "given; each batch_size says itself what it is"
            )
        return self


def with_batches(stage: StageConfig, tokens: Callable[[BucketConfig], int]) -> StageConfig:
    """``stage`` with the batch sizes that its token budget gives, if it has one: of each bucket the largest multiple of
    ``batch_multiple`` whose tokens fit. ``tokens``: of a sample.

    Raises:
        ValueError: a bucket has another batch_size of its own (what a run wrote down has both, which agree), or not
            even ``batch_multiple`` samples fit.
    """
    budget, multiple = stage.token_budget, stage.batch_multiple
    if budget is None:
        return stage
    buckets = []
    for bucket in stage.buckets:
        each = tokens(bucket)
        size = budget // each // multiple * multiple
        if not size:
            least = "one sample" if multiple == 1 else f"batch_multiple={multiple} samples"
            raise ValueError(
                f"stages.{stage.name}.token_budget={budget} is less than {least} of bucket {bucket}, of {each} tokens "
                f"each; it takes at least {multiple * each}"
            )
        if bucket.batch_size not in (0, size):
            raise ValueError(
                f"stages.{stage.name}: bucket {bucket} has batch_size={bucket.batch_size}, and token_budget={budget} "
                f"gives it {size}; give one of the two"
            )
        buckets.append(bucket.model_copy(update={"batch_size": size}))
    return stage.model_copy(update={"buckets": buckets})


def multiple_hint(stage: StageConfig, parts: int) -> str:
    """What makes the batch sizes of a token budget multiples of ``parts``; empty where there is no budget."""
    return f"; set stages.{stage.name}.batch_multiple={lcm(stage.batch_multiple, parts)}" if stage.token_budget else ""
