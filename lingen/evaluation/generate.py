"""Sample the same prompts and seeds in several ways, and write down what each video cost.

The variants take turns, video by video, so that a machine that slows down slows all of them.

Shapes: B videos, F frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lingen.cache_config import CacheConfig, ScheduleConfig, read_cache
from lingen.config import BucketConfig, SamplerConfig
from lingen.errors import UserError
from lingen.evaluation.folder import Asked, RunFile, begin_run, write_video
from lingen.evaluation.meter import machine, metered, now
from lingen.evaluation.settings import Variant
from lingen.pipeline import LinGenPipeline
from lingen.sampling.cache import CacheRun, CacheSummary
from lingen.sampling.guidance import contexts
from lingen.sampling.solver import evaluations

WARM_UP_STEPS = 2


def sample_runs(
    pipeline: LinGenPipeline,
    variants: Sequence[Variant],
    asked: Sequence[Asked],
    shape: BucketConfig,
    out: Path,
    *,
    batch: int = 1,
    truncate: bool = False,
    progress: bool = True,
    told: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Sample ``asked`` by every variant into OUT/NAME, ``batch`` videos at once; videos that are there are kept.
    Returns the folders. ``truncate`` lets the text encoders cut what is longer than they take; ``told`` hears after
    each turn how many videos are done, of how many.

    Raises:
        UserError: a variant cannot be sampled; a folder holds another run, or cannot be written.
    """
    caches = {variant.name: read_cache(variant.cache) if variant.cache is not None else None for variant in variants}
    files = {variant.name: _run_file(pipeline, variant, caches[variant.name], asked, shape) for variant in variants}
    if not truncate:
        pipeline.refuse_long([one.prompt for one in asked])
        pipeline.refuse_long([variant.negative_prompt or "" for variant in variants], "negative_prompt")
    todo = {name: set(begin_run(out / name, file)) for name, file in files.items()}
    if any(todo.values()):
        _warm_up(pipeline, asked[0], shape)
    with Progress(disable=not progress) as bar:
        task = bar.add_task("sampling", total=sum(map(len, todo.values())))
        for start in range(0, len(asked), batch):
            for variant in variants:
                name = variant.name
                numbers = [n for n in range(start, min(start + batch, len(asked))) if n in todo[name]]
                if numbers:
                    bar.update(task, description=f"sampling {name}")
                    _sample(pipeline, variant, caches[name], numbers, files[name], out / name)
                    bar.advance(task, len(numbers))
            if told is not None:
                told(int(bar.tasks[task].completed), int(bar.tasks[task].total or 0))
    return [out / variant.name for variant in variants]


def _run_file(
    pipeline: LinGenPipeline, variant: Variant, cache: CacheConfig | None, asked: Sequence[Asked], shape: BucketConfig
) -> RunFile:
    """What the videos of a variant depend on.

    Raises:
        UserError: the sampler cannot do it, or the model has not what the cache asks for.
    """
    try:
        sampler: SamplerConfig = pipeline.sampler(**variant.sampler())
        if cache is not None:
            named = contexts(sampler.guidance_scale, sampler.guidance)
            CacheRun(cache, pipeline.model, calls=evaluations(sampler.solver, sampler.steps), contexts=named)
    except UserError as error:
        raise UserError(f"variants, {variant.name}: {error}") from error
    return RunFile(
        name=variant.name,
        curve=variant.curve,
        settings={
            "model": pipeline.config.model.name,
            "weights": pipeline.origin.model_dump(mode="json", include={"stage", "samples", "checkpoint_sha256"}),
            "dtype": str(pipeline.dtype).removeprefix("torch."),
            "tile": pipeline.config.autoencoder.model_dump(mode="json")["tile"],
            "sampler": sampler.model_dump(mode="json"),
            "cache": cache.model_dump(mode="json") if cache is not None else None,
        },
        machine=machine(pipeline.device),
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
        fps=pipeline.stage.fps,
        videos=list(asked),
    )


def _warm_up(pipeline: LinGenPipeline, asked: Asked, shape: BucketConfig) -> None:
    """Kernels are chosen and compiled, and the allocator grows, before anything is measured."""
    pipeline(
        [asked.prompt],
        seeds=[asked.seed],
        num_inference_steps=WARM_UP_STEPS,
        truncate=True,
        progress=False,
        **_size(shape),
    )


def _size(of: BucketConfig | RunFile) -> dict[str, Any]:
    return {"num_frames": of.frames, "height": of.height, "width": of.width}


def _sample(
    pipeline: LinGenPipeline,
    variant: Variant,
    cache: CacheConfig | None,
    numbers: Sequence[int],
    file: RunFile,
    folder: Path,
) -> None:
    """Sample the videos with these numbers as one batch, and write them."""
    asked = [file.videos[number] for number in numbers]
    words = variant.sampler()
    steps = pipeline.sampler(**words).steps
    if cache is not None:
        pipeline.enable_cache(cache.of(numbers) if isinstance(cache, ScheduleConfig) else cache)
    try:
        with metered(pipeline.model, pipeline.device) as meter:

            def after(pipe: LinGenPipeline, step: int, sigma: float, now_there: Mapping[str, torch.Tensor]) -> None:
                if step == steps - 1:
                    meter.ended = now(pipeline.device)

            videos = pipeline(
                [one.prompt for one in asked],
                words.pop("negative_prompt"),
                num_inference_steps=words.pop("steps"),
                seeds=[one.seed for one in asked],
                callback_on_step_end=after,
                truncate=True,  # where it was not allowed, no text is too long
                progress=False,
                **words,
                **_size(file),
            ).frames  # (B, 3, F, H, W) uint8
        summary = pipeline.cache_summary if cache is not None else None
    finally:
        if cache is not None:
            pipeline.disable_cache()
    flops = [meter.flops // len(asked)] * len(asked) if summary is None else summary.sample_flops
    cost: dict[str, Any] = {
        "batch": len(asked),
        "denoise_seconds": meter.denoise_seconds / len(asked),
        "seconds": meter.seconds / len(asked),
        "peak_memory": meter.peak_memory,
    }
    for place, (number, one, video) in enumerate(zip(numbers, asked, videos, strict=True)):
        skipped = None if summary is None else _skipped(summary, place)
        own = {"prompt": one.prompt, "seed": one.seed, "flops": flops[place], "cache": skipped}
        write_video(folder, number, video, file.fps, cost | own)


def _skipped(summary: CacheSummary, place: int) -> dict[str, Any]:
    """The batch's summary, with the schedule and the FLOPs of one of its videos alone."""
    tree = asdict(summary) | {"executed_flops": summary.executed_flops}
    for context in tree["contexts"].values():
        for key in ("schedules", "flops"):
            context[key] = context[key][place : place + 1]
    return tree
