"""What an autoencoder is to the rest of the project, and what all kinds of them share.

Shapes: B clips, F = t*k + 1 frames, H height, W width in pixels; C channels; t, s the ratios in time and space;
h = H/s, w = W/s.

An autoencoder is *causal*: the first latent frame stands for the first frame alone, each later one for t more frames.
So an image is a clip of one frame.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Protocol

import torch

from lingen.autoencoder_config import AutoencoderConfig
from lingen.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Autoencoder(Protocol):
    """What the training loop and the sampler need to know of an autoencoder."""

    channels: int
    time: int
    space: int
    fingerprint: str  # of the weights: runs with different ones cannot be compared

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, t*k + 1, H, W), uint8 or float in [-1, 1] -> latents (B, C, k + 1, h, w) fp32, each channel of about
        mean 0 and variance 1."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, k + 1, h, w) -> float pixels in [-1, 1], (B, 3, t*k + 1, H, W)."""
        ...


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> [-1, 1]; float pixels as they are, in fp32."""
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels.float()


def psnr(squared_error: float) -> float:
    """In dB, of a mean squared error; the peak is 2, for pixels are in [-1, 1]."""
    return 10 * math.log10(4 / max(squared_error, 1e-12))


def fingerprint(tensors: Mapping[str, torch.Tensor], also: str = "") -> str:
    """A sha256 over names, shapes, types and bits, and over what else the latents depend on."""
    digest = hashlib.sha256(also.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)  # numpy knows no bf16
    return digest.hexdigest()


def refuse_other_ratios(config: AutoencoderConfig, channels: int, time: int, space: int) -> None:
    """Raises:
    UserError: the configuration says other channels or ratios than those that were found in ``config.path``.
    """
    for key, there in (("channels", channels), ("time", time), ("space", space)):
        said = getattr(config, key)
        if said != there:
            raise UserError(f"autoencoder.{key}={said}, but {config.path} has {there}; set autoencoder.{key}={there}")


def refuse_other_shapes(autoencoder: Autoencoder, pixels: torch.Tensor) -> None:
    """Raises:
    ValueError: F is not t*k + 1, or H or W is not a multiple of s.
    """
    frames, height, width = pixels.shape[2:]
    time, space = autoencoder.time, autoencoder.space
    if (frames - 1) % time or height % space or width % space:
        raise ValueError(f"{frames}x{height}x{width} is not ({time}*k + 1) x multiples of {space}")
