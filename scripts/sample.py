"""Sample a video: ``python scripts/sample.py checkpoint=DIR prompt="a red circle moving left" out=DIR``.

``checkpoint`` is an export, a run folder (its last finished stage), or a checkpoint; the EMA weights are used. Writes
NAME.mp4 and NAME.png, a contact sheet, for each seed; NAME is the prompt in plain characters and the seed.
"""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from lingen.compose import parse
from lingen.errors import run_main
from lingen.model_config import KernelsConfig
from lingen.output import make_folder, writing

NAME_LENGTH = 60


class Words(BaseModel):
    """The script's words; what is None comes from the export."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    prompt: str
    out: str
    negative_prompt: str | None = None
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    steps: PositiveInt | None = None
    guidance_scale: float | None = Field(None, ge=1.0)
    seed: int = 0
    count: PositiveInt = 1  # videos, with the seeds seed, seed + 1, ...
    device: str = "cpu"
    dtype: Literal["fp32", "bf16"] | None = None  # of the denoiser; None: the training's on a GPU, fp32 on a CPU
    autoencoder: str | None = None  # where the autoencoder's file is now
    encoders: dict[str, str] = {}  # where text encoders are now: encoders="{t5: DIR}"
    kernels: KernelsConfig = KernelsConfig()  # kernels="{attention: sdpa}"


def file_name(prompt: str, seed: int) -> str:
    """A plain name out of a prompt: no path can leave the output folder.

    Where more than punctuation is lost, a hash of the prompt keeps it apart from others that look alike without it.
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    foreign = any(not c.isascii() and unicodedata.category(c)[0] not in "PZ" for c in prompt)  # punctuation, spaces
    parts = [words[:NAME_LENGTH].rstrip("-") or "video", str(seed)]
    if foreign or len(words) > NAME_LENGTH:
        parts.insert(1, hashlib.sha256(prompt.encode()).hexdigest()[:6])
    return "-".join(parts)


def main() -> None:
    """Load, sample, write."""
    words = parse(Words, sys.argv[1:])
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
    )
    dtype = next(pipeline.model.parameters()).dtype
    choose_forms(words.kernels.model_dump(), pipeline.device, dtype)
    shape = pipeline.shape(words.frames, words.height, words.width)
    out = Path(words.out)
    make_folder(out, words.out)
    print(f"kernels: {forms.describe(pipeline.device, dtype)}", file=sys.stderr)
    seeds = list(range(words.seed, words.seed + words.count))
    videos = pipeline(
        [words.prompt] * words.count,
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
        steps=words.steps,
        guidance_scale=words.guidance_scale,
        negative_prompt=words.negative_prompt,
        seeds=seeds,
    )  # (B, 3, F, H, W)
    for seed, video in zip(seeds, videos, strict=True):
        name = out / file_name(words.prompt, seed)
        with writing(words.out):
            write_mp4(name.with_suffix(".mp4"), video, fps=pipeline.stage.fps)
            write_contact_sheet(name.with_suffix(".png"), video)
        print(f"{name}.mp4 {name}.png")


if __name__ == "__main__":
    run_main(main)
