"""Fit a cache to a model.

    python scripts/calibrate_cache.py checkpoint=DIR out=FILE.yaml [cache=adacache_fast] [skip=0.5] [steps=30] ...

Measures, on generations of the model itself, what the policy decides by, and searches for the thresholds that skip the
wanted share of the FLOPs. ``cache`` says which policy, and keeps all else that it says: adacache gets a codebook,
teacache its polynomial and threshold, first_block a threshold, magcache its ratios (beside FILE) and threshold. FILE is
a cache: ``python scripts/sample.py ... cache=FILE.yaml``. Judge it on other prompts and seeds than these.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from lingen.cache_config import cache_yaml, read_cache
from lingen.compose import parse
from lingen.errors import UserError, run_main
from lingen.evaluation.settings import asked_for
from lingen.model_config import KernelsConfig
from lingen.output import make_folder, writing


class Words(BaseModel):
    """The script's words; what is None is as the model was trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    out: Annotated[str, Field(pattern=r"\.ya?ml$")]  # the file to write; a new one
    cache: str | dict[str, Any] = "adacache_fast"  # the policy, and all of it that is not fitted
    skip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5  # the share of the FLOPs that is not to be computed
    tolerance: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02  # how near to it is near enough
    rounds: PositiveInt = 10  # trials at most
    prompts: str = "synthetic"  # or a text file with one a line, each with every seed
    seeds: PositiveInt = 8  # so many, from ``seed``
    seed: NonNegativeInt = 1_000_000  # far from those that anybody evaluates with
    batch: PositiveInt = 1  # videos sampled together
    truncate: bool = False  # let the text encoders cut prompts that are longer than they take
    steps: PositiveInt | None = None
    solver: Literal["euler", "heun", "ab2"] | None = None
    schedule: Literal["shifted", "linear_quadratic"] | None = None
    shift: PositiveFloat | None = None
    guidance: Literal["batch", "two_passes"] | None = None
    guidance_scale: float | None = Field(None, ge=1.0)
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    device: str = "cpu"
    dtype: Literal["fp32", "bf16"] | None = None
    autoencoder: str | None = None
    encoders: dict[str, str] = {}
    kernels: KernelsConfig = KernelsConfig()

    def sampler(self) -> dict[str, Any]:
        """The keys of the sampler, those that are None too."""
        return self.model_dump(include={"steps", "solver", "schedule", "shift", "guidance", "guidance_scale"})


def main() -> None:
    """Measure, search, write."""
    words = parse(Words, sys.argv[1:])
    cache, out = read_cache(words.cache), Path(words.out)
    if out.exists():
        raise UserError(f"out={out} exists; choose another file, or remove this one to fit it again")
    make_folder(out.parent, words.out)
    from rich.progress import Progress

    from lingen.calibration import Ground, fit
    from lingen.engine import choose_forms
    from lingen.pipeline import LinGenPipeline
    from lingen.runfolder import write_aside
    from lingen.sampling.cache.magcache import fingerprint

    pipeline = LinGenPipeline.from_pretrained(
        words.checkpoint, device=words.device, dtype=words.dtype, autoencoder=words.autoencoder,
        encoders=words.encoders,
    )  # fmt: skip
    choose_forms(words.kernels.model_dump(), pipeline.device, pipeline.dtype)
    shape = pipeline.shape(words.frames, words.height, words.width)
    asked = asked_for(words.prompts, range(words.seed, words.seed + words.seeds), shape.frames)
    prompts, seeds = [one.prompt for one in asked], [one.seed for one in asked]
    pipeline.refuse_long(() if words.truncate else prompts)
    sampler = pipeline.sampler(**words.sampler())
    pipeline.refuse_too_large(shape, sampler, words.batch, decodes=False)
    ground = Ground(pipeline, sampler, shape, prompts, seeds, words.batch)
    with Progress(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("measuring")

        def told(what: str | None, videos: int) -> None:
            if what is None:
                bar.advance(task, videos)
            else:
                bar.reset(task, description=what, total=videos)

        found = fit(ground, cache, words.skip, out, tolerance=words.tolerance, rounds=words.rounds, told=told)
    each = sorted(found.skipped.calls)
    lines = [
        f"Fitted by scripts/calibrate_cache.py on {datetime.now(UTC):%Y-%m-%d}, for this model and this way to sample.",
        f"model: {pipeline.config.model.name} {fingerprint(pipeline.model)}, stage {pipeline.stage.name}, "
        f"{pipeline.origin.samples} samples seen, {str(pipeline.dtype).removeprefix('torch.')}",
        f"video: {shape.frames} x {shape.height} x {shape.width}; {len(asked)} videos, prompts={words.prompts}, seeds "
        f"{words.seed} to {words.seed + words.seeds - 1}",
        "sampler: " + ", ".join(f"{key}={value}" for key, value in ground.sampler.model_dump(mode="json").items()),
        f"wanted: {words.skip:.1%} of the FLOPs skipped; measured with this file: {found.skipped.share:.1%}",
        f"share of calls skipped, of the videos: least {each[0]:.1%}, middle {each[len(each) // 2]:.1%}, most "
        f"{each[-1]:.1%}",
    ]
    text = "".join(f"# {line}\n" for line in lines) + cache_yaml(found.cache, out.parent)
    with writing(words.out):
        write_aside(out, text)
    for line in lines[-2:]:
        print(line)
    for level, share in found.tried:
        print(f"level {level:.3f}: {share:.1%} skipped")
    if abs(found.skipped.share - words.skip) > words.tolerance:
        print(f"warning: this is as near as {len(found.tried)} trials came; a share in between may not exist")
    print(out)


if __name__ == "__main__":
    run_main(main)
