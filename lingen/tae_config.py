"""The schema of our own autoencoder, of its losses, and of a run that trains it."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lingen.config import BucketConfig, RunConfig, frames_problems, settle_batches, side_problems
from lingen.model_config import PathText, Section

Weight = Annotated[float, Field(ge=0.0)]


class TaeConfig(Section):
    """What the autoencoder is. It halves the sides once between two levels, and the frames at the last such places."""

    width: Annotated[int, Field(ge=4, multiple_of=4)] = 128  # channels at the pixels
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 4)  # of the width, a level
    blocks: PositiveInt = 2  # of the encoder, a level; the decoder has one more
    channels: PositiveInt = 16  # of the latents
    time: PositiveInt = 8  # t*k + 1 frames become k + 1 latent frames; 1: images alone

    @property
    def space(self) -> int:
        """How many pixels a side of a latent has."""
        return int(2 ** (len(self.multipliers) - 1))

    @model_validator(mode="after")
    def _time_halves(self) -> TaeConfig:
        if self.time & (self.time - 1) or self.time > self.space:
            raise ValueError(
                f"tae.time={self.time} must be a power of 2 up to {self.space}, which the {len(self.multipliers)} "
                "levels of tae.multipliers make of the sides: frames are halved where sides are"
            )
        return self


class PerceptualConfig(Section):
    """A frozen VGG whose features are compared."""

    path: PathText  # safetensors with features.N.weight and .bias, and for LPIPS lin0.model.1.weight to lin4
    weight: PositiveFloat = 1.0


class AdversarialConfig(Section):
    """A discriminator of patches, trained with the hinge loss beside the autoencoder."""

    from_samples: Annotated[int, Field(ge=0)]  # of the run; before them neither plays
    weight: PositiveFloat = 0.5
    adaptive: bool = True  # the weight is relative to the gradient of the other losses at the reconstruction
    width: Annotated[int, Field(ge=4, multiple_of=4)] = 64
    levels: PositiveInt = 3  # it halves the sides so often


class LossesConfig(Section):
    """The weights of what the autoencoder is trained on; each loss is a mean, so they hold at any size."""

    l1: PositiveFloat = 1.0
    kl: Weight = 1e-6
    outlier: Weight = 0.1
    outlier_deviations: PositiveFloat = 3.0  # r of Movie Gen's eq. 1
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None


class ExportConfig(Section):
    """What is measured and shown when a stage is finished."""

    samples: PositiveInt = 256  # of the stage, as it draws them: the mean and deviation of the latents are over these
    shown: PositiveInt = 8  # held-out samples a bucket, beside their reconstruction


class TaeRunConfig(RunConfig):
    """A run of scripts/train_autoencoder.py: our own autoencoder."""

    tae: TaeConfig
    losses: LossesConfig = LossesConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _geometry(self) -> Self:
        space = self.tae.space
        for key, stage in self.stages.items():
            if stage.timestep_shift is not None:
                raise ValueError(f"stages.{key}.timestep_shift is of a diffusion; an autoencoder has no timesteps")
            for bucket in stage.buckets:
                problems = frames_problems(bucket.frames, self.tae.time, "tae.time")
                for axis, size in (("height", bucket.height), ("width", bucket.width)):
                    problems += side_problems(axis, size, space, "2 to the levels of tae.multipliers but one")
                for problem in problems:
                    raise ValueError(f"stages.{key}.buckets: {problem}")
        settle_batches(self, lambda bucket: sample_tokens(self.tae, bucket))
        return self

    @model_validator(mode="after")
    def _engines_that_serve(self) -> Self:
        if self.engine.sequence_parallel > 1:
            raise ValueError("engine.sequence_parallel shares out a backbone's heads, which an autoencoder has not")
        if self.engine.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage=3 gathers weights for whole backwards, and a discriminator's slopes are taken "
                "amid a step; an autoencoder is small enough for engine=zero2"
            )
        return self


def sample_tokens(tae: TaeConfig, bucket: BucketConfig) -> int:
    """Positions of a latent frame, times the frames of the clip: what an autoencoder's cost grows with."""
    return bucket.frames * (bucket.height // tae.space) * (bucket.width // tae.space)
