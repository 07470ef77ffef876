"""The schema of a run: every key, its default and its bounds, once.

The model's part is in ``lingen.model_config``, the latents' in ``lingen.autoencoder_config``, the text encoders' in
``lingen.text_config``, the stages' in ``lingen.stage_config``, that of keeping a run alive in
``lingen.operation_config``.

Nothing else in the project sees a DictConfig; a value that is not in this file cannot be set.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lingen.autoencoder_config import AutoencoderConfig
from lingen.model_config import KernelsConfig, ModelConfig, Name, PathText, Section, SizeConfig
from lingen.operation_config import CheckpointConfig, GuardConfig, LoggerConfig, WatchdogConfig
from lingen.stage_config import BucketConfig as BucketConfig
from lingen.stage_config import CarryConfig as CarryConfig
from lingen.stage_config import StageConfig as StageConfig
from lingen.stage_config import multiple_hint, with_batches
from lingen.text_config import TextConfig

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class DataConfig(Section):
    """Where the shards are and how they are read."""

    path: PathText  # a folder, https://, s3:// and so on, or pipe:COMMAND {}
    workers: Annotated[int, Field(ge=0)] = 2  # decoding processes a rank; 0 decodes in the main process
    prefetch: PositiveInt = 4  # micro-batches that each worker prepares ahead
    window_shards: PositiveInt = 8  # samples are shuffled inside windows of so many shards
    holdout_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05  # kept for validation, chosen by a hash of the key
    video_frames_as_images: bool = False  # one-frame buckets may draw from videos too
    max_bad_share: Share = 0.05  # of the samples read; more holes than that end the run
    verify_checksums: bool = True
    decoder: Literal["pyav", "decord"] = "pyav"  # the pixels are the same; decord decodes where it reads right
    worker_memory_mb: PositiveInt = 2048  # a worker that has gained so much is replaced by a new one
    cache_dir: PathText | None = None  # of remote shards, on a node's own disk; None: below the temporary folder
    cache_gb: PositiveFloat = 50.0  # of them are kept; two windows must fit


class FlowConfig(Section):
    """Flow matching. sigma is 0 at the data and 1 at the noise."""

    logit_mean: float = 0.0
    logit_std: PositiveFloat = 1.0
    base_tokens: PositiveInt = 256  # a bucket of so many tokens has the shift base_shift; it grows with sqrt(tokens)
    base_shift: PositiveFloat = 1.0
    max_shift: PositiveFloat = 12.0
    caption_dropout: Share = 0.1


class OptimConfig(Section):
    """AdamW."""

    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    grad_clip: PositiveFloat = 1.0


class EmaConfig(Section):
    """Weight average. The half-life counts samples, and is at most ``rampup`` of the samples seen (EDM2)."""

    halflife_samples: PositiveFloat = 500_000
    rampup: PositiveFloat = 0.05


class EngineConfig(Section):
    """Who does backward and step: plain torch, or DeepSpeed at a ZeRO level."""

    kind: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Literal[0, 1, 2, 3] = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    grad_accumulation: PositiveInt = 1
    activation_checkpointing: bool = False
    sequence_parallel: PositiveInt = 1  # neighbouring ranks that compute each sample together

    @model_validator(mode="after")
    def _zero_is_deepspeeds(self) -> EngineConfig:
        if self.kind == "torch" and self.zero_stage:
            raise ValueError("engine.zero_stage needs engine.kind=deepspeed (engine=zero1, zero2 or zero3)")
        return self


class HeldOutConfig(Section):
    """A fixed held-out set."""

    every_steps: Annotated[int, Field(ge=0)] = 500  # 0: never
    samples: PositiveInt = 64  # a bucket
    batch_size: PositiveInt = 16  # a rank


class ValidationConfig(HeldOutConfig):
    """... with fixed timesteps and noise, the same for every model."""

    sigmas: PositiveInt = 8  # evenly spaced in (0, 1), unshifted
    bins: PositiveInt = 4  # the sigmas are averaged in so many bins

    @model_validator(mode="after")
    def _bins_divide(self) -> ValidationConfig:
        if self.sigmas % self.bins:
            raise ValueError(f"validation.sigmas={self.sigmas} must be a multiple of validation.bins={self.bins}")
        return self


class SamplerConfig(Section):
    """Sampling from noise to video."""

    steps: PositiveInt = 50
    solver: Literal["euler", "heun", "ab2"] = "euler"  # heun and ab2 are of second order; heun evaluates twice a step
    schedule: Literal["shifted", "linear_quadratic"] = "shifted"
    shift: PositiveFloat | None = None  # of the shifted one; None: as the stage was trained
    emulated_steps: PositiveInt = 1000  # even ones, of the linear-quadratic one
    guidance: Literal["batch", "two_passes"] = "batch"  # two passes take half the memory
    guidance_scale: Annotated[float, Field(ge=1.0)] = 5.0  # 1: none
    negative_prompt: str = ""

    @model_validator(mode="after")
    def _schedule_reads_its_keys(self) -> SamplerConfig:
        if self.schedule != "linear_quadratic":
            return self
        if self.shift is not None:
            raise ValueError(f"sampler.shift={self.shift} is of schedule=shifted, not of schedule=linear_quadratic")
        if self.emulated_steps < self.steps:
            raise ValueError(
                f"sampler.emulated_steps={self.emulated_steps}: sampler.steps={self.steps} linear-quadratic steps "
                f"emulate at least so many even ones; give {self.steps} or more"
            )
        return self


class RunConfig(Section):
    """What every run has, whatever it trains: something taken through the stages of a curriculum."""

    name: Name
    runs_dir: PathText = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dry_run: bool = False
    init_from: PathText | None = None  # a stage's checkpoint that the first stage starts from
    until: str | None = None  # the last stage that this command trains; None: all of them
    stages: Annotated[dict[str, StageConfig], Field(min_length=1)]  # in order
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    validation: HeldOutConfig = HeldOutConfig()
    logger: LoggerConfig = LoggerConfig()

    @model_validator(mode="after")
    def _stages_are_named(self) -> Self:
        for key, stage in self.stages.items():
            if key != stage.name or "/" in key:
                raise ValueError(f"stages.{key}.name={stage.name}: a stage's name is its key, a single word")
        if self.until is not None and self.until not in self.stages:
            raise ValueError(f"until={self.until} is none of the stages {', '.join(self.stages)}")
        return self


class Config(RunConfig):
    """A run of train.py: a video model."""

    model: ModelConfig
    size: SizeConfig
    autoencoder: AutoencoderConfig
    text: TextConfig
    flow: FlowConfig = FlowConfig()
    kernels: KernelsConfig = KernelsConfig()
    validation: ValidationConfig = ValidationConfig()
    sampler: SamplerConfig = SamplerConfig()

    @model_validator(mode="after")
    def _mamba_heads_divide(self) -> Config:
        mate = self.model.mate
        if mate is None or not mate.ma or mate.ssm == "mamba1":
            return self  # without heads
        if mate.expand * self.size.d_model % mate.mamba_head_dim:
            raise ValueError(
                f"model.mate.mamba_head_dim={mate.mamba_head_dim} must divide model.mate.expand={mate.expand} * "
                f"size.d_model={self.size.d_model}"
            )
        return self

    @model_validator(mode="after")
    def _ranks_share_the_heads(self) -> Config:
        for what, heads in self._exchanged_heads().items():
            if heads % self.engine.sequence_parallel:
                raise ValueError(
                    f"engine.sequence_parallel={self.engine.sequence_parallel} must divide the {heads} {what}"
                )
        return self

    def _exchanged_heads(self) -> dict[str, int]:
        """What the ranks that compute a sample together share out: how it is called, and how many there are."""
        size, mate = self.size, self.model.mate
        heads = {}
        if mate is None or mate.te:
            heads["heads of attention (size.d_model / size.head_dim)"] = size.d_model // size.head_dim
        if mate is not None and mate.ma:
            inner = mate.expand * size.d_model
            if mate.ssm == "mamba1":
                heads["channels of the Mamba (model.mate.expand * size.d_model)"] = inner
            else:
                name = "heads of the Mamba (model.mate.expand * size.d_model / model.mate.mamba_head_dim)"
                heads[name] = inner // mate.mamba_head_dim
        return heads

    @property
    def depth(self) -> int:
        """Layers of this run's model."""
        return getattr(self.size.depth, self.model.name)  # type: ignore[no-any-return]

    @model_validator(mode="after")
    def _geometry(self) -> Config:
        for key, stage in self.stages.items():
            for bucket in stage.buckets:
                for problem in geometry_problems(self, bucket):
                    raise ValueError(f"stages.{key}.buckets: {problem}")
        settle_batches(self, lambda b: prod(token_grid(self, b.frames, b.height, b.width)))
        return self


def settle_batches(config: RunConfig, tokens: Callable[[BucketConfig], int]) -> None:
    """Put the batch sizes that token budgets give into ``config.stages``; a part of its validation.

    Raises:
        ValueError: a budget gives none, or the accumulation does not divide a batch size.
    """
    accumulation = config.engine.grad_accumulation
    for key, stage in config.stages.items():
        config.stages[key] = with_batches(stage, tokens)
        for bucket in config.stages[key].buckets:
            if bucket.batch_size % accumulation:
                raise ValueError(
                    f"stages.{key}.buckets: bucket {bucket} has batch_size={bucket.batch_size}, which "
                    f"engine.grad_accumulation={accumulation} does not divide{multiple_hint(stage, accumulation)}"
                )


def geometry_problems(config: Config, shape: BucketConfig) -> list[str]:
    """What the autoencoder and the model's patching cannot take of a shape; empty where all is well."""
    ratio, (patch_t, patch_h, patch_w) = config.autoencoder.time, config.size.patch
    problems = frames_problems(shape.frames, ratio, "autoencoder.time")
    if not problems and ((shape.frames - 1) // ratio + 1) % patch_t:
        problems.append(f"frames={shape.frames} gives latent frames that size.patch[0]={patch_t} does not divide")
    for axis, size, patch in (("height", shape.height, patch_h), ("width", shape.width, patch_w)):
        problems += side_problems(axis, size, config.autoencoder.space * patch, "autoencoder.space * size.patch")
    return problems


def frames_problems(frames: int, ratio: int, key: str) -> list[str]:
    """What an autoencoder of that ratio, which stands in ``key``, cannot take of so many frames."""
    low = (frames - 1) // ratio * ratio + 1
    near = f"{low} or {low + ratio}"
    wrong = f"frames={frames} is not {ratio}*k + 1, as {key}={ratio} needs; nearest: {near}"
    return [] if low == frames else [wrong]


def side_problems(axis: str, size: int, multiple: int, why: str) -> list[str]:
    """What is wrong with a side that must be a multiple."""
    low = size // multiple * multiple
    near = f"{low} or {low + multiple}" if low else str(multiple)
    wrong = f"{axis}={size} is not a multiple of {multiple} ({why}); nearest: {near}"
    return [] if low == size else [wrong]


def latent_shape(config: Config, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T, H, W) of the latents of a clip of ``frames`` x ``height`` x ``width`` pixels."""
    ae = config.autoencoder
    return (frames - 1) // ae.time + 1, height // ae.space, width // ae.space


def token_grid(config: Config, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T, H, W) of the tokens that the model sees for such a clip."""
    t, h, w = latent_shape(config, frames, height, width)
    patch_t, patch_h, patch_w = config.size.patch
    return t // patch_t, h // patch_h, w // patch_w
