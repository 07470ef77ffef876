"""The latent space: clips to latents of about mean 0 and variance 1, and back."""

from __future__ import annotations

import torch

from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders.base import Autoencoder, psnr, to_float
from lingen.autoencoders.diffusers import load_diffusers
from lingen.autoencoders.pca import load_pca
from lingen.autoencoders.tae import load_tae

__all__ = ["Autoencoder", "load_autoencoder", "psnr", "to_float"]

LOADERS = {"pca": load_pca, "diffusers": load_diffusers, "tae": load_tae}


def load_autoencoder(config: AutoencoderConfig, device: torch.device | str) -> Autoencoder:
    """The autoencoder that ``config.path`` holds, on ``device``.

    Raises:
        UserError: it is missing or damaged, or its ratios or channels are not those of the configuration.
    """
    return LOADERS[config.kind](config, device)
