"""A finished stage's autoencoder for others to use: its weight average, the statistics of its latents, and a page that
shows what it makes of held-out clips.

Shapes: B clips, F frames, H x W pixels; C latent channels, T x h x w latent positions.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from data.pipeline import StageLoader, holdout_batches
from data.shards import Index
from lingen import checkpoint
from lingen.autoencoders import psnr, to_float
from lingen.autoencoders.tae import FILE, MEAN, STD, Tae, TaeAutoencoder
from lingen.autoencoders.tae_game import AUTOENCODER
from lingen.config import BucketConfig, StageConfig
from lingen.errors import UserError
from lingen.files import write_file
from lingen.tae_config import TaeRunConfig

PAGE = "reconstruction.html"
LEAST_STD = 1e-6  # of a channel that says anything
COLUMNS = 9  # frames of a clip that the page shows, at most


@dataclass(frozen=True)
class Shown:
    """One held-out clip beside what became of it."""

    key: str
    psnr: float
    source: str  # a picture as base64
    result: str


def export_tae(
    config: TaeRunConfig, index: Index, folder: Path, out: Path, stage: StageConfig, device: torch.device
) -> None:
    """Write out/{model.safetensors,config.yaml,reconstruction.html} from the checkpoint in ``folder``.

    Raises:
        OSError: it cannot be written.
        UserError: the checkpoint or a shard cannot be read, or a channel of the latents says nothing.
    """
    weights = {
        name.removeprefix(AUTOENCODER): weight
        for name, weight in checkpoint.assemble(folder, "ema").items()
        if name.startswith(AUTOENCODER)
    }
    with torch.device("meta"):
        model = Tae(config.tae)
    model.load_state_dict(weights, assign=True)
    model.to(device).eval().requires_grad_(False)
    mean, std, clips = latent_statistics(config, index, stage, model, device)
    autoencoder = TaeAutoencoder(model, mean, std, device, torch.float32)
    rows = {str(b): list(reconstructions(config, index, stage, b, autoencoder, device)) for b in stage.buckets}
    measured = {name: mean_psnr(shown) for name, shown in rows.items()}
    metadata = {
        "kind": "tae",
        "tae": config.tae.model_dump_json(),
        "psnr": yaml.safe_dump(measured, default_flow_style=True).strip(),  # held-out, by bucket; nan: none is
    }
    out.mkdir(parents=True, exist_ok=True)
    of_stage = config.model_copy(update={"stages": {stage.name: stage}, "init_from": None})
    write_file(out / "config.yaml", yaml.safe_dump(of_stage.model_dump(mode="json"), sort_keys=False).encode())
    write_file(out / PAGE, page(config, stage, rows, measured, clips, (mean, std)).encode())
    whole = {name: tensor.contiguous().cpu() for name, tensor in {**weights, MEAN: mean, STD: std}.items()}
    write_file(out / FILE, save(whole, metadata))
    dB = ", ".join(f"{name} {_decibel(value)}" for name, value in measured.items())
    print(f"{out}: held-out PSNR {dB}; see {out / PAGE}", flush=True)


@torch.no_grad()
def latent_statistics(
    config: TaeRunConfig, index: Index, stage: StageConfig, model: Tae, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(mean (C,), deviation (C,), clips) of the latents of ``export.samples`` clips, as the stage draws them.

    Raises:
        UserError: there is no whole clip, a shard cannot be read, or a channel is the same everywhere.
    """
    parts = gcd(*(bucket.batch_size for bucket in stage.buckets))  # so that a batch is small: the first part of it
    longer = stage.model_copy(update={"samples": config.export.samples * parts})
    data = config.data.model_copy(update={"workers": 0})
    loader = StageLoader(index, longer, data, seed=config.seed, rank=0, world=parts, grad_accumulation=1)
    first = second = torch.zeros(config.tae.channels, dtype=torch.float64)
    clips = positions = 0
    for (batch,) in loader:
        if loader.lost:
            raise UserError(f"{loader.lost}; the latents were not measured; restore it and run again")
        for pixels in batch.pixels[batch.valid]:
            mean, _ = model.encode(to_float(pixels[None].to(device)))  # (1, C, T, h, w)
            latents = mean[0].flatten(1).double().cpu()  # (C, N)
            first, second = first + latents.sum(1), second + latents.square().sum(1)
            clips, positions = clips + 1, positions + latents.shape[1]
        if clips >= config.export.samples:
            break
    if not clips:
        raise UserError(f"stages.{stage.name}: no sample of it can be decoded, so its latents have no statistics")
    mean = first / positions
    std = (second / positions - mean.square()).clamp(min=0).sqrt()
    dead = [n for n, value in enumerate(std.tolist()) if not value > LEAST_STD]
    if dead:
        raise UserError(
            f"stages.{stage.name}: channels {dead} of the latents are the same in all of {clips} clips, or not finite; "
            f"lower losses.kl={config.losses.kl:g} or tae.channels={config.tae.channels}, and train under another name"
        )
    return mean.float(), std.float(), clips


def reconstructions(
    config: TaeRunConfig,
    index: Index,
    stage: StageConfig,
    bucket: BucketConfig,
    autoencoder: TaeAutoencoder,
    device: torch.device,
) -> Iterator[Shown]:
    """The first held-out clips of a bucket, and what they become.

    Raises:
        UserError: a shard cannot be read.
    """
    data = config.data.model_copy(update={"workers": 0})
    limit = config.export.shown
    for batch in holdout_batches(index, stage, bucket, data, limit=limit, batch_size=1, rank=0, world=1):
        if batch.lost:
            raise UserError(f"{batch.lost}; nothing was reconstructed; restore it and run again")
        if batch.valid.all():
            decoded = autoencoder.decode(autoencoder.encode(batch.pixels.to(device))).cpu()
            error = (decoded - to_float(batch.pixels)).square().mean().item()
            result = ((decoded + 1) * 127.5).round().to(torch.uint8)
            yield Shown(batch.keys[0], psnr(error), _picture(batch.pixels[0]), _picture(result[0]))


def mean_psnr(shown: list[Shown]) -> float:
    """The mean over clips, in dB; nan where there is none."""
    return sum(clip.psnr for clip in shown) / len(shown) if shown else math.nan


def page(
    config: TaeRunConfig,
    stage: StageConfig,
    rows: dict[str, list[Shown]],
    measured: dict[str, float],
    clips: int,
    statistics: tuple[torch.Tensor, torch.Tensor],
) -> str:
    """The page; all text is escaped."""
    here = jinja2.FileSystemLoader(Path(__file__).parent / "autoencoders")
    template = jinja2.Environment(loader=here, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "reconstruction.html.j2"
    )
    facts: dict[str, Any] = {
        "time": config.tae.time,
        "space": config.tae.space,
        "channels": config.tae.channels,
        "clips": clips,
    }
    return template.render(
        name=config.name,
        stage=stage.name,
        rows=rows,
        measured={name: _decibel(value) for name, value in measured.items()},
        statistics=[(f"{m:.3f}", f"{s:.3f}") for m, s in zip(*(each.tolist() for each in statistics), strict=True)],
        **facts,
    )


def _picture(clip: torch.Tensor) -> str:
    """(3, F, H, W) uint8 -> frames side by side, a PNG as base64; of many frames some, with the first and the last."""
    frames = clip.shape[1]
    chosen = torch.linspace(0, frames - 1, min(frames, COLUMNS)).round().long()
    strip = clip[:, chosen].permute(2, 1, 3, 0).flatten(1, 2).numpy()  # (H, n*W, 3)
    stream = io.BytesIO()
    Image.fromarray(strip).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


def _decibel(value: float) -> str:
    return "not measured (none is held out)" if math.isnan(value) else f"{value:.2f} dB"
