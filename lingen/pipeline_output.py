"""From latents to what a caller wants of the videos.

Shapes: B videos, F frames, H x W pixels; latents (B, C, T, h, w). Videos are decoded one at a time, so that the memory
is that of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from lingen.autoencoders import Autoencoder

OutputType = Literal["uint8", "pt", "np", "pil", "latent"]


@dataclass(frozen=True)
class VideoOutput:
    """What a pipeline makes: ``frames`` holds a video a prompt, in the form that was asked for."""

    frames: Any


def _latent(autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    return latents.cpu()


def _unit(autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """(B, F, 3, H, W) fp32 in [0, 1], decoded one video at a time."""
    videos = [autoencoder.decode(one).add_(1).div_(2).clamp_(0, 1).cpu() for one in torch.split(latents, 1)]
    return torch.cat(videos).transpose(1, 2)


def _uint8(autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """(B, 3, F, H, W)."""
    videos = (autoencoder.decode(one).clamp_(-1, 1).add_(1).mul_(127.5).round_() for one in torch.split(latents, 1))
    return torch.cat([video.to(torch.uint8).cpu() for video in videos])


def _array(autoencoder: Autoencoder, latents: torch.Tensor) -> Any:
    """(B, F, H, W, 3) numpy fp32 in [0, 1]."""
    return _unit(autoencoder, latents).permute(0, 1, 3, 4, 2).numpy()


def _pictures(autoencoder: Autoencoder, latents: torch.Tensor) -> list[list[Any]]:
    """A list of frames a video."""
    videos = _uint8(autoencoder, latents).permute(0, 2, 3, 4, 1).numpy()  # (B, F, H, W, 3)
    return [[Image.fromarray(frame) for frame in video] for video in videos]


FORMATS: dict[str, Callable[[Autoencoder, torch.Tensor], Any]] = {
    "uint8": _uint8,
    "pt": _unit,
    "np": _array,
    "pil": _pictures,
    "latent": _latent,
}
