"""Fit the PCA autoencoder to shards: python scripts/fit_autoencoder.py data=DIR out=FILE [channels=16] [clips=256] ...

Shapes: F = time*k + 1 frames, H height, W width in pixels.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from rich.progress import track
from safetensors.torch import save

from data.batch import Bucket
from data.buckets import eligible, split, starts
from data.decode import BadSample, decode_clip
from data.latents import refuse_latents
from data.shards import Index, load_index, read_member
from lingen.autoencoders import psnr, to_float
from lingen.autoencoders.pca import PcaAutoencoder, fit_pca
from lingen.compose import parse
from lingen.config import DataConfig
from lingen.errors import UserError, run_main
from lingen.files import write_file
from lingen.output import make_folder, writing


class FitConfig(BaseModel):
    """What to fit to. A fit to small clips serves larger ones: their patches are smoother."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str  # folder of shards
    out: str  # the safetensors file to write
    channels: PositiveInt = 16
    time: PositiveInt = 8
    space: PositiveInt = 8
    clips: PositiveInt = 256  # videos to fit to, and as many images where there are
    heldout: PositiveInt = 64  # videos, and images, that the PSNR is measured on
    frames: PositiveInt = 17
    height: PositiveInt = 64
    width: PositiveInt = 64
    fps: PositiveFloat = 8.0
    # Half: on the rendered world it costs the videos 0.2 dB and gives the images 0.7 dB, against their natural third.
    image_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    holdout_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05  # as in training (data.holdout_share)
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits_the_ratios(self) -> FitConfig:
        if self.frames <= self.time or (self.frames - 1) % self.time:
            raise ValueError(
                f"frames={self.frames} must be {self.time}*k + 1, such as {2 * self.time + 1} (time={self.time})"
            )
        for name, size in (("height", self.height), ("width", self.width)):
            if size % self.space:
                raise ValueError(f"{name}={size} must be a multiple of space={self.space}")
        return self


class Clips:
    """Decodes samples of the shards; what is broken is left out and counted."""

    def __init__(self, config: FitConfig) -> None:
        self.index: Index = load_index(config.data)
        refuse_latents(self.index, f"data={config.data}")
        self.bad: Counter[str] = Counter()
        self._config = config
        data = DataConfig(path=config.data, holdout_share=config.holdout_share)
        self._train, self._heldout = split(self.index, config.holdout_share)
        shapes = (config.frames, 1)
        self._rows = {
            f: eligible(self.index, Bucket(f, config.height, config.width), fps=config.fps, data=data) for f in shapes
        }

    def choose(self, frames: int, limit: int, *, heldout: bool) -> list[tuple[int, int]]:
        """(row of the index, frames) of at most ``limit`` samples, chosen by the seed."""
        side = self._heldout if heldout else self._train
        rows = self._rows[frames][side[self._rows[frames]]]
        chosen = np.random.default_rng(self._config.seed).permutation(rows)[:limit]
        return [(int(row), frames) for row in chosen]

    def fitting(self, frames: int) -> int:
        """How many samples can fill such a clip, held out or not."""
        return len(self._rows[frames])

    def read(self, chosen: list[tuple[int, int]], what: str) -> Iterator[torch.Tensor]:
        """Each sample that decodes, uint8 (3, F, H, W), under a bar."""
        config = self._config
        for row, frames in track(chosen, what):
            start = float(starts(config.seed, np.array([row]))[0])
            try:
                media = read_member(self.index, row)
                yield decode_clip(
                    media,
                    frames=frames,
                    height=config.height,
                    width=config.width,
                    fps=config.fps,
                    start=start,
                    begin=float(self.index.begin[row]),
                    end=float(self.index.end[row]),
                )
            except BadSample as bad:
                self.bad[bad.reason] += 1


def main() -> None:
    config = parse(FitConfig, sys.argv[1:])
    if Path(config.out).exists():
        raise UserError(f"out={config.out} exists; choose another file, or remove this one to fit it again")
    torch.set_num_threads(1)  # the same bits whatever the number of cores; and cores that are busy would stall eigh
    clips = Clips(config)
    videos, images = (clips.choose(frames, config.clips, heldout=False) for frames in (config.frames, 1))
    for frames, chosen in ((config.frames, videos), (1, videos + images)):
        if clips.fitting(frames) and not chosen:
            raise UserError(
                f"holdout_share={config.holdout_share} holds out all {clips.fitting(frames)} samples of "
                f"data={config.data} that can be fitted to; lower it"
            )
    if not videos and (clips.index.frames > 1).any():
        footage = f"{(config.frames - 1) / config.fps:g} s of footage"
        raise UserError(
            f"frames={config.frames} at fps={config.fps:g} need {footage}, which no clip of data={config.data} has"
        )
    out = Path(config.out)
    make_folder(out.parent, config.out)
    tensors = fit_pca(
        _some(clips.read(videos + images, "fitting"), clips.bad),
        channels=config.channels,
        time=config.time,
        space=config.space,
        image_share=config.image_share,
    )
    autoencoder = PcaAutoencoder(tensors["basis"], tensors["mean"], tensors["std"], "cpu")
    heldout = (clips.choose(frames, config.heldout, heldout=True) for frames in (config.frames, 1))
    video_psnr, image_psnr = (measure(autoencoder, clips.read(rows, "measuring")) for rows in heldout)
    metadata = {
        "kind": "pca",
        "channels": str(config.channels),
        "time": str(config.time),
        "space": str(config.space),
        "psnr": f"{video_psnr:.3f}",  # nan: there was nothing to measure it on
        "image_psnr": f"{image_psnr:.3f}",
    }
    with writing(config.out):
        write_file(out, save(tensors, metadata))
    if clips.bad:
        print("left out: " + ", ".join(f"{count} ({reason})" for reason, count in clips.bad.most_common()))
    shape = f"{config.frames}x{config.height}x{config.width}"
    print(f"held-out PSNR: clips of {shape} {_decibel(video_psnr)}, images {_decibel(image_psnr)}")
    print(f"{out}: pca, {config.channels} channels, {config.time}x{config.space}x{config.space}")


def measure(autoencoder: PcaAutoencoder, clips: Iterable[torch.Tensor]) -> float:
    """In dB, from the mean squared error over all pixels of all clips; nan where there is none."""
    error, pixels = 0.0, 0
    for clip in clips:
        decoded = autoencoder.decode(autoencoder.encode(clip[None]))
        error += float((decoded - to_float(clip[None])).double().square().sum())
        pixels += clip.numel()
    return psnr(error / pixels) if pixels else math.nan


def _some(clips: Iterator[torch.Tensor], bad: Counter[str]) -> Iterator[torch.Tensor]:
    """The clips, of which there must be one."""
    first = next(clips, None)
    if first is None:
        why = ", ".join(f"{count} {reason}" for reason, count in bad.most_common()) or "it has no sample of this shape"
        raise UserError(f"data: there is nothing to fit to ({why}); name shards with good clips or images")
    yield first
    yield from clips


def _decibel(value: float) -> str:
    return "not measured (none is held out)" if math.isnan(value) else f"{value:.2f} dB"


if __name__ == "__main__":
    run_main(main)
