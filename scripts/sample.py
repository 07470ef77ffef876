"""Sample videos: ``python scripts/sample.py checkpoint=DIR prompt="a red circle moving left" out=DIR``.

``checkpoint`` is what ``save_pretrained`` saved, an export, a run folder (its last finished stage), or a checkpoint;
the EMA weights are used. Writes NAME.mp4 and NAME.png, a contact sheet, for each prompt and seed as soon as they
are done; NAME is the prompt in plain characters and the seed. What is there already is kept, so the same command goes
on after an interruption; overwrite=true makes it anew. dry_run=true says how much memory it would take.
"""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from lingen.autoencoder_config import TileConfig
from lingen.compose import parse
from lingen.errors import UserError, run_main
from lingen.model_config import KernelsConfig
from lingen.output import make_folder, writing

NAME_LENGTH = 60


class Words(BaseModel):
    """The script's words; what is None comes from the export."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    prompt: str | None = None
    prompts: str | list[str] | None = None  # a text file with one a line, or a list: prompts="[a star, a circle]"
    out: str
    negative_prompt: str | None = None
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    steps: PositiveInt | None = None
    solver: Literal["euler", "heun", "ab2"] | None = None
    schedule: Literal["shifted", "linear_quadratic"] | None = None
    shift: PositiveFloat | None = None
    emulated_steps: PositiveInt | None = None
    guidance: Literal["batch", "two_passes"] | None = None
    guidance_scale: float | None = Field(None, ge=1.0)
    seed: int = 0
    count: PositiveInt = 1  # videos a prompt, with the seeds seed, seed + 1, ...
    seeds: list[int] | None = None  # ... or with these
    cache: str | None = None  # a name in conf/cache, a YAML file, or its keys: cache="{policy: fixed, period: 2}"
    batch: PositiveInt = 1  # videos that are sampled together
    truncate: bool = False  # let the text encoders cut a prompt that is longer than they take
    overwrite: bool = False  # of files that are there
    dry_run: bool = False
    device: str = "cpu"
    dtype: Literal["fp32", "bf16"] | None = None  # of the denoiser; None: the training's on a GPU, fp32 on a CPU
    autoencoder: str | None = None  # where the autoencoder's file is now
    tile: TileConfig | None = None  # that it decodes in: tile="{frames: 65, height: 256, width: 256}"
    encoders: dict[str, str] = {}  # where text encoders are now: encoders="{t5: DIR}"
    kernels: KernelsConfig = KernelsConfig()  # kernels="{attention: sdpa}"

    @model_validator(mode="after")
    def _one_way_each(self) -> Self:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError('give prompt=TEXT, or prompts=FILE (one a line), or prompts="[TEXT, TEXT]"')
        if self.seeds is not None and self.model_fields_set & {"seed", "count"}:
            raise ValueError("seeds stands for seed and count; give one of the two")
        return self

    def all_prompts(self) -> list[str]:
        """Each once, in order.

        Raises:
            UserError: the file cannot be read, or there is none in it.
        """
        if not isinstance(self.prompts, str):
            found = [self.prompt or ""] if self.prompts is None else self.prompts
        else:
            try:
                found = Path(self.prompts).expanduser().read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"prompts={self.prompts} cannot be read as a text file: {error}") from error
            found = [line.strip() for line in found if line.strip()]
        if not found:
            raise UserError(f"prompts={self.prompts} holds no prompt")
        return list(dict.fromkeys(found))

    def all_seeds(self) -> list[int]:
        """Of each prompt."""
        return list(range(self.seed, self.seed + self.count)) if self.seeds is None else list(dict.fromkeys(self.seeds))


def file_name(prompt: str, seed: int, *, alike: bool = False) -> str:
    """A plain name out of a prompt: no path can leave the output folder.

    Where more than punctuation is lost, or another prompt has the same words (``alike``), a hash of the prompt keeps it
    apart from others that look alike without it.
    """
    words = _plain(prompt)
    foreign = any(not c.isascii() and unicodedata.category(c)[0] not in "PZ" for c in prompt)  # punctuation, spaces
    parts = [words[:NAME_LENGTH].rstrip("-"), str(seed)]
    if foreign or alike or len(words) > NAME_LENGTH:
        parts.insert(1, hashlib.sha256(prompt.encode()).hexdigest()[:6])
    return "-".join(parts)


def _plain(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-") or "video"


def jobs(words: Words, out: Path) -> list[tuple[str, int, Path]]:
    """(prompt, seed, file without its suffix) of each video that is to be made."""
    prompts = words.all_prompts()
    same = Counter(map(_plain, prompts))
    asked = [
        (prompt, seed, out / file_name(prompt, seed, alike=same[_plain(prompt)] > 1))
        for prompt in prompts
        for seed in words.all_seeds()
    ]
    return [job for job in asked if words.overwrite or not all(path.exists() for path in files_of(job[2]))]


def files_of(name: Path) -> tuple[Path, Path]:
    """The video and its contact sheet."""
    return Path(f"{name}.mp4"), Path(f"{name}.png")


def main() -> None:
    """Load, sample, write."""
    words = parse(Words, sys.argv[1:])
    out = Path(words.out)
    todo = jobs(words, out)
    kept = len(words.all_prompts()) * len(words.all_seeds()) - len(todo)
    if kept:
        print(f"{kept} videos are there already and are kept; overwrite=true makes them anew", file=sys.stderr)
    if words.dry_run:
        print_plan(words)
        return
    if todo:
        sample(words, out, todo)


def sampler_words(words: Words) -> dict[str, Any]:
    """How to sample, as the pipeline is told."""
    keys = ("solver", "schedule", "shift", "emulated_steps", "guidance", "guidance_scale")
    return {key: getattr(words, key) for key in keys}


def print_plan(words: Words) -> None:
    """What a batch would take; no weight is loaded, and the device need not be here."""
    from lingen.sampling_plan import predict_memory

    shape, memory = predict_memory(
        words.checkpoint,
        batch=words.batch,
        size=(words.frames, words.height, words.width),
        sampler={"steps": words.steps, "negative_prompt": words.negative_prompt, **sampler_words(words)},
        device=words.device,
        dtype=words.dtype,
        kernels=words.kernels.model_dump(),
        autoencoder=words.autoencoder,
        encoders=words.encoders,
        tile=words.tile.model_dump() if words.tile else None,
        cache=words.cache,
    )
    print(f"{words.batch} videos of {shape} at once on {words.device}: {memory}")


def sample(words: Words, out: Path, todo: Sequence[tuple[str, int, Path]]) -> None:
    """Make the videos, batch after batch; each is whole on the disk before the next begins."""
    from data.encode import write_contact_sheet, write_mp4
    from lingen.engine import choose_forms
    from lingen.kernels import forms
    from lingen.pipeline import LinGenPipeline

    pipeline = LinGenPipeline.from_pretrained(
        words.checkpoint,
        device=words.device,
        dtype=words.dtype,
        autoencoder=words.autoencoder,
        encoders=words.encoders,
        tile=words.tile.model_dump() if words.tile else None,
    )
    choose_forms(words.kernels.model_dump(), pipeline.device, pipeline.dtype)
    if words.cache is not None:
        pipeline.enable_cache(words.cache)
    shape = pipeline.shape(words.frames, words.height, words.width)
    pipeline.sampler(steps=words.steps, **sampler_words(words))
    for key, texts in (("prompt", [prompt for prompt, _, _ in todo]), ("negative_prompt", [words.negative_prompt])):
        pipeline.refuse_long([text for text in texts if text and not words.truncate], key)
    make_folder(out, words.out)
    print(f"kernels: {forms.describe(pipeline.device, pipeline.dtype)}", file=sys.stderr)
    for at in range(0, len(todo), words.batch):
        part = todo[at : at + words.batch]
        videos = pipeline(
            [prompt for prompt, _, _ in part],
            words.negative_prompt,
            num_frames=shape.frames,
            height=shape.height,
            width=shape.width,
            seeds=[seed for _, seed, _ in part],
            truncate=words.truncate,
            num_inference_steps=words.steps,
            **sampler_words(words),
        ).frames  # (B, 3, F, H, W)
        for (_, _, name), video in zip(part, videos, strict=True):
            film, sheet = files_of(name)
            with writing(words.out):
                write_contact_sheet(sheet, video)
                write_mp4(film, video, fps=pipeline.stage.fps)
            print(f"{film} {sheet}", flush=True)
        if pipeline.cache_summary is not None:
            print(f"cache {pipeline.cache_summary}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
