"""Sample a video: ``python scripts/sample.py checkpoint=DIR prompt="a red circle moving left" out=DIR``.

``checkpoint`` is an export, a run folder (its last finished stage), or a checkpoint; the EMA weights are used. Writes
NAME.mp4 and NAME.png, a contact sheet, for each seed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from lingen.compose import parse
from lingen.errors import UserError, run_main


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
    autoencoder: str | None = None  # where the autoencoder's file is now


def file_name(prompt: str, seed: int) -> str:
    """A plain name out of a prompt: no path can leave the output folder."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "video"
    return f"{words}-{seed}"


def main() -> None:
    """Load, sample, write."""
    words = parse(Words, sys.argv[1:])
    import torch

    from data.encode import write_contact_sheet, write_mp4
    from lingen.pipeline import LinGenPipeline

    if words.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={words.device}: no GPU is to be seen here; device=cpu")
    pipeline = LinGenPipeline.from_pretrained(words.checkpoint, device=words.device, autoencoder=words.autoencoder)
    shape = pipeline.default_shape()
    seeds = list(range(words.seed, words.seed + words.count))
    videos = pipeline(
        [words.prompt] * words.count,
        frames=words.frames or shape.frames,
        height=words.height or shape.height,
        width=words.width or shape.width,
        steps=words.steps,
        guidance_scale=words.guidance_scale,
        negative_prompt=words.negative_prompt,
        seeds=seeds,
    )  # (B, 3, F, H, W)
    out = Path(words.out)
    out.mkdir(parents=True, exist_ok=True)
    for seed, video in zip(seeds, videos, strict=True):
        name = out / file_name(words.prompt, seed)
        write_mp4(name.with_suffix(".mp4"), video, fps=pipeline.stage.fps)
        write_contact_sheet(name.with_suffix(".png"), video)
        print(f"{name}.mp4 {name}.png")


if __name__ == "__main__":
    run_main(main)
