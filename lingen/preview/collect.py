"""What a stage feeds the model: the first samples of each bucket, from the loader that training has.

Shapes: B samples, F frames, H height, W width in pixels; latents (B, C, T, h, w).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from data.batch import Batch
from data.counts import check_buckets
from data.pipeline import StageLoader
from data.shards import Index
from lingen.autoencoders import Autoencoder, psnr, to_float
from lingen.config import BucketConfig, Config, StageConfig, latent_shape, token_grid
from lingen.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One clip as it is fed, and what the autoencoder makes of it."""

    key: str
    caption: str
    row: int  # of the index
    fed: torch.Tensor | None  # (3, F, H, W) uint8; None where latents are fed
    decoded: torch.Tensor | None  # the same, through the autoencoder; None without one
    psnr: float | None  # of the two, in dB


@dataclass(frozen=True)
class BucketView:
    """One bucket of a stage."""

    bucket: BucketConfig
    steps: float  # share of the stage's steps
    train: int  # samples of it
    held_out: int
    latents: tuple[int, int, int]  # T, h, w
    tokens: int
    samples: list[Sample]
    holes: Counter[str]  # by reason, among those that were read

    @property
    def psnr(self) -> float | None:
        """Mean of the samples shown."""
        each = [sample.psnr for sample in self.samples if sample.psnr is not None]
        return sum(each) / len(each) if each else None


@dataclass(frozen=True)
class StageView:
    """One stage."""

    stage: StageConfig
    buckets: list[BucketView]
    none: dict[str, int]  # samples in none of its buckets, by the reason


def view_stage(
    config: Config,
    stage: StageConfig,
    index: Index,
    autoencoder: Autoencoder | None,
    device: torch.device,
    *,
    samples: int,
) -> StageView:
    """The first ``samples`` of each bucket's stream: those that the stage's first steps on it see.

    Raises:
        UserError: a bucket that no sample fills, or a shard that cannot be read.
    """
    total = sum(bucket.share for bucket in stage.buckets)
    counts = check_buckets(index, [stage], config.data)[stage.name]
    # The samples of a bucket come in the same order whatever its batch size and share; so each bucket has one step.
    even = [bucket.model_copy(update={"batch_size": samples, "share": 1.0}) for bucket in stage.buckets]
    loader = StageLoader(
        index,
        stage.model_copy(update={"buckets": even, "samples": samples * len(even)}),
        config.data,
        seed=config.seed,
        rank=0,
        world=1,
        grad_accumulation=1,
    )
    row_of = {key: row for row, key in enumerate(index.key)}
    found: dict[str, tuple[list[Sample], Counter[str]]] = {}
    for (batch,) in loader:
        if loader.lost:
            raise UserError(loader.lost)
        found[str(batch.bucket)] = _samples(batch, row_of, autoencoder, device), loader.bad.copy()
        loader.bad.clear()
    views = []
    for bucket in stage.buckets:
        name, size = str(bucket), (bucket.frames, bucket.height, bucket.width)
        shown, holes = found[name]
        views.append(
            BucketView(
                bucket,
                steps=bucket.share / total,
                train=counts.buckets[name].train,
                held_out=counts.buckets[name].holdout,
                latents=latent_shape(config, *size),
                tokens=math.prod(token_grid(config, *size)),
                samples=shown,
                holes=holes,
            )
        )
    return StageView(stage, views, counts.none)


@torch.no_grad()
def _samples(
    batch: Batch, row_of: dict[str, int], autoencoder: Autoencoder | None, device: torch.device
) -> list[Sample]:
    samples = []
    for n in torch.nonzero(batch.valid).flatten().tolist():  # one by one: memory is a clip's
        fed = batch.pixels[n] if batch.latents is None else None
        decoded, quality = None, None
        if autoencoder is not None:
            latents = (
                batch.latents[n : n + 1].to(device).float()
                if batch.latents is not None
                else autoencoder.encode(batch.pixels[n : n + 1].to(device))
            )  # (1, C, T, h, w)
            pixels = autoencoder.decode(latents)[0].float().cpu()  # (3, F, H, W) in [-1, 1]
            decoded = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            quality = None if fed is None else psnr(float((to_float(fed) - pixels).double().square().mean()))
        samples.append(Sample(batch.keys[n], batch.captions[n], row_of[batch.keys[n]], fed, decoded, quality))
    return samples
