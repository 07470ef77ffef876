"""The words of scripts/evaluate.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data.synthetic import BACKGROUNDS, render_clip
from lingen.autoencoder_config import TileConfig
from lingen.errors import UserError
from lingen.evaluation.folder import NAME, Asked
from lingen.evaluation.vbench import VBenchConfig
from lingen.model_config import KernelsConfig

WORLD = 1  # of the rendered worlds, the one whose captions are asked for; data.synthetic renders 0 to train on
SAMPLING = {
    "prompts", "seeds", "seed", "variants", "batch", "frames", "height", "width", "dtype", "truncate", "autoencoder",
    "encoders", "tile", "kernels",
}  # fmt: skip


class Variant(BaseModel):
    """One way to sample; what is None is as the model was trained. {name: fast, cache: adacache_fast, steps: 30}"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME)]
    curve: Annotated[str, Field(max_length=64)] = ""  # variants of one curve are joined in plots
    cache: str | dict[str, Any] | None = None  # a name in conf/cache, a file, or {policy: ...}
    steps: PositiveInt | None = None
    solver: Literal["euler", "heun", "ab2"] | None = None
    schedule: Literal["shifted", "linear_quadratic"] | None = None
    shift: PositiveFloat | None = None
    emulated_steps: PositiveInt | None = None
    guidance: Literal["batch", "two_passes"] | None = None
    guidance_scale: Annotated[float, Field(ge=1.0)] | None = None
    negative_prompt: str | None = None

    def sampler(self) -> dict[str, Any]:
        """The keys of the sampler, those that are None too."""
        return self.model_dump(exclude={"name", "curve", "cache"})


class EvaluateWords(BaseModel):
    """What is compared: folders of earlier runs, or what is sampled now."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str
    runs: Annotated[list[str], Field(min_length=1)] | None = None  # folders of sampled videos
    labels: list[str] | None = None  # other names for them

    checkpoint: str | None = None  # instead of runs: sample them, into out/runs
    prompts: str | None = None  # a text file with one a line, each with every seed; or "synthetic"
    seeds: PositiveInt = 1  # so many, from ``seed``; synthetic has a prompt of its own for each
    seed: NonNegativeInt = 0
    variants: list[Variant] = []
    batch: PositiveInt = 1  # videos sampled together; latencies are those of such a batch
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    truncate: bool = False  # let the text encoders cut a prompt that is longer than they take
    dtype: Literal["fp32", "bf16"] | None = None
    autoencoder: str | None = None
    encoders: dict[str, str] = {}
    tile: TileConfig | None = None
    kernels: KernelsConfig = KernelsConfig()

    device: str = "cpu"  # that samples, and measures distances
    baseline: str | None = None  # the run that the others are measured against; None: the first
    reference: str | None = None  # a run of many steps, that all are measured against too
    lpips: str | None = None  # a safetensors file with LPIPS' weights for VGG
    vbench: VBenchConfig | None = None
    shown: Annotated[int, Field(ge=0, le=200)] = 8  # videos on the page, of each run
    side: Annotated[int, Field(ge=16)] = 320  # pixels of the longer side of what the page shows

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.runs is None) == (self.checkpoint is None):
            raise ValueError("give runs=[DIR,...], or checkpoint=DIR to sample them now")
        idle = sorted(self.model_fields_set & SAMPLING)
        if self.runs is not None and idle:
            raise ValueError(f"{idle[0]} is of sampling, and runs=[...] are sampled already")
        if self.checkpoint is not None and self.labels is not None:
            raise ValueError("labels are of runs=[...]; a variant has a name")
        for key in ("prompts", "variants"):
            if self.checkpoint is not None and not getattr(self, key):
                raise ValueError(f"{key} is not set; checkpoint=DIR needs {key}=")
        names = [variant.name for variant in self.variants]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"variants: two are called {twice}")
        if names and not {self.baseline, self.reference} <= {None, *names}:
            raise ValueError(f"baseline and reference must be of the variants {', '.join(names)}")
        return self

    def asked(self, frames: int) -> list[Asked]:
        """See ``asked_for``."""
        return asked_for(self.prompts or "", range(self.seed, self.seed + self.seeds), frames)


def asked_for(
    prompts: str, seeds: Sequence[int], frames: int, backgrounds: Sequence[str] = tuple(BACKGROUNDS)
) -> list[Asked]:
    """The videos to sample, of so many frames: the prompts of a text file, one a line, each with every seed; or, where
    ``prompts`` is "synthetic", captions of the rendered world with these ``backgrounds``, one for each seed.

    Raises:
        UserError: the file cannot be read, or there is nothing in it.
    """
    if prompts == "synthetic":
        captions = [render_clip(WORLD, seed, frames=frames, size=8, backgrounds=backgrounds)[1] for seed in seeds]
        return [Asked(prompt=caption, seed=seed) for caption, seed in zip(captions, seeds, strict=True)]
    try:
        lines = Path(prompts).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={prompts} cannot be read as a text file: {error}") from error
    found = dict.fromkeys(line.strip() for line in lines if line.strip())
    if not found:
        raise UserError(f"prompts={prompts} holds no prompt")
    return [Asked(prompt=prompt, seed=seed) for prompt in found for seed in seeds]
