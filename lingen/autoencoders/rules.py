"""What each diffusers class does to its latents before a model sees them, as its own pipelines do it.

A model sees (z - mean) / std of the posterior's mode z. Where the numbers are, by class:

    AutoencoderKLWan             latents_mean, latents_std of the config
    AutoencoderKLMochi           the same, and std is divided by scaling_factor
    AutoencoderKLLTXVideo        the same, but the two are buffers that come with the weights
    AutoencoderKLCosmos          latents_mean, latents_std of the config, one number for each channel AND latent frame
    AutoencoderKLHunyuanVideo    std = 1 / scaling_factor; nothing is subtracted
    AutoencoderKLHunyuanVideo15  the same
    AutoencoderKLCogVideoX       the same (invert_scale_latents concerns the conditioning images of one model alone)
    AutoencoderDC                the same
    AutoencoderKL                latents_mean, latents_std where the config has them, else shift_factor as mean; and
                                 std is divided by scaling_factor

The pipelines of Cosmos also multiply by sigma_data, which is their scheduler's and not the autoencoder's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Statistics = tuple[torch.Tensor, torch.Tensor]  # mean and std, each (C or 1, N or 1): N latent frames, the last for all


@dataclass(frozen=True)
class Rule:
    """How one class is used."""

    statistics: Callable[[Any], Statistics]
    images: bool = False  # it knows no time: frames go through one by one
    odd: bool = False  # it decodes an odd number of latent frames alone as t*k + 1 frames
    streams: bool = False  # it goes through time in pieces and carries its state: exact, where tiles are not
    first: str = ""  # a layer without weights that needs the pixels as they are: bf16 would round off what it shows


def _factor(vae: Any) -> Statistics:
    return torch.zeros(1, 1), torch.full((1, 1), 1 / vae.config["scaling_factor"])


def _lists(vae: Any) -> Statistics:
    mean, std = (torch.tensor(vae.config[name], dtype=torch.float32) for name in ("latents_mean", "latents_std"))
    return mean[:, None], std[:, None]


def _lists_and_factor(vae: Any) -> Statistics:
    mean, std = _lists(vae)
    return mean, std / vae.config["scaling_factor"]


def _buffers_and_factor(vae: Any) -> Statistics:
    mean, std = vae.latents_mean.float(), vae.latents_std.float()
    return mean[:, None], std[:, None] / vae.config["scaling_factor"]


def _lists_by_frame(vae: Any) -> Statistics:
    if vae.config["latents_mean"] is None:
        return torch.zeros(1, 1), torch.ones(1, 1)
    channels = vae.config["latent_channels"]
    mean, std = _lists(vae)
    return mean.view(channels, -1), std.view(channels, -1)


def _lists_or_shift(vae: Any) -> Statistics:
    if vae.config["latents_mean"] is not None:
        return _lists_and_factor(vae)
    mean, std = _factor(vae)
    return mean + (vae.config["shift_factor"] or 0.0), std


RULES = {
    "AutoencoderDC": Rule(_factor, images=True),
    "AutoencoderKL": Rule(_lists_or_shift, images=True),
    "AutoencoderKLCogVideoX": Rule(_factor, odd=True, streams=True),
    "AutoencoderKLCosmos": Rule(_lists_by_frame),
    "AutoencoderKLHunyuanVideo": Rule(_factor),
    "AutoencoderKLHunyuanVideo15": Rule(_factor),
    "AutoencoderKLLTXVideo": Rule(_buffers_and_factor),
    "AutoencoderKLMochi": Rule(_lists_and_factor, first="encoder.fourier_features"),  # sines of 2^6, 2^7 turns
    "AutoencoderKLWan": Rule(_lists, streams=True),
}
