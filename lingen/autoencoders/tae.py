"""Our own autoencoder, in the manner of Movie Gen's TAE (Polyak et al. 2024, section 3.1.1).

Shapes: B clips, F = t*k + 1 frames, H height, W width in pixels; C channels; t, s the ratios in time and space;
T = k + 1 latent frames, h = H/s, w = W/s.

It differs from the published one in time: Movie Gen's convolutions see frames on both sides, and decode T latent
frames to t*T frames, of which the last are thrown away. Ours look back only (tae_layers.py): the first latent frame
stands for the first frame alone, and an image is a clip of one frame, as every autoencoder here has it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders.base import (
    DTYPES,
    Autoencoder,
    fingerprint,
    refuse_other_ratios,
    refuse_other_shapes,
    to_float,
)
from lingen.autoencoders.tae_layers import Conv, Middle, Out, ResBlock, Stack, Upsample
from lingen.autoencoders.tiles import tiled
from lingen.errors import UserError
from lingen.tae_config import TaeConfig

FILE, MEAN, STD = "model.safetensors", "latent.mean", "latent.std"
LOG_VARIANCE = (-30.0, 20.0)  # of the posterior
# ... at first: a deviation of 0.05. From 1 on, noise hides for long what there is to learn (docs/log.md).
FIRST_LOG_VARIANCE = -6.0


class Tae(nn.Module):
    """Encoder and decoder, with latents of any mean and scale; ``TaeAutoencoder`` is what others use."""

    def __init__(self, config: TaeConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * m for m in config.multipliers]
        halvings = len(widths) - 1
        times = [2 ** (halvings - n) <= config.time for n in range(halvings)]  # whether the nth halves the frames too
        self.encoder = Stack([Conv(3, widths[0])])
        into = widths[0]
        for level, out in enumerate(widths):
            for _ in range(config.blocks):
                self.encoder.append(ResBlock(into, out))
                into = out
            if level < halvings:
                self.encoder.append(Conv(out, out, stride=2, time_stride=2 if times[level] else 1))
        last = Out(into, 2 * config.channels)
        nn.init.constant_(last.conv.time.bias[config.channels :], FIRST_LOG_VARIANCE)
        self.encoder.extend([Middle(into), last])
        self.decoder = Stack([Conv(config.channels, into), Middle(into)])
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.decoder.append(ResBlock(into, out))
                into = out
            if level:
                self.decoder.append(Upsample(out, time=times[level - 1]))
        self.decoder.append(Out(into, 3))

    def recompute(self, yes: bool) -> None:
        """Whether the backward computes activations again instead of keeping them."""
        self.encoder.recompute = self.decoder.recompute = yes

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, F, H, W) in [-1, 1] -> the posterior's mean and log variance, each (B, C, T, h, w)."""
        mean, log_variance = self.encoder(pixels.transpose(1, 2)).transpose(1, 2).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, T, h, w) -> (B, 3, F, H, W), not clamped."""
        pixels: torch.Tensor = self.decoder(latents.transpose(1, 2)).transpose(1, 2)
        return pixels


class TaeAutoencoder:
    """A trained ``Tae``, frozen; see ``Autoencoder``. Its latents are the posterior's means, whitened.

    Args:
        mean: (C,), of the means that ``model`` encodes to, over many clips.
        std: (C,), of the same.
    """

    def __init__(
        self, model: Tae, mean: torch.Tensor, std: torch.Tensor, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        config = model.config
        self.channels, self.time, self.space = config.channels, config.time, config.space
        weights = {**model.state_dict(), MEAN: mean, STD: std}
        self.fingerprint = fingerprint(weights, also=config.model_dump_json())
        self._model = model.to(device, dtype).eval().requires_grad_(False)
        self._mean, self._std = (each.to(device).view(1, -1, 1, 1, 1) for each in (mean, std))
        self._dtype = dtype

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See ``Autoencoder.encode``.

        Raises:
            ValueError: F is not t*k + 1, or H or W is not a multiple of s.
        """
        refuse_other_shapes(self, pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # the same latents inside and outside of a bf16 step
            mean, _ = self._model.encode(to_float(pixels).to(self._dtype))
        return (mean.float() - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See ``Autoencoder.decode``."""
        with torch.autocast(latents.device.type, enabled=False):
            pixels = self._model.decode((latents.float() * self._std + self._mean).to(self._dtype))
        return pixels.float().clamp_(-1, 1)


def load_tae(config: AutoencoderConfig, device: torch.device | str) -> Autoencoder:
    """The trained autoencoder that ``config.path`` holds, a file or an export's folder, on ``device``, in tiles where
    the configuration says so.

    Raises:
        UserError: it is missing or damaged, or its ratios or channels are not those of the configuration.
    """
    where, path = f"autoencoder.path={config.path}", Path(config.path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{where}: {file} does not exist; name runs/NAME/export/STAGE of a run of scripts/train_autoencoder.py"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: {file} cannot be read as safetensors ({error}); export it again") from error
    if metadata.get("kind") != "tae" or not {MEAN, STD} <= tensors.keys():
        raise UserError(
            f"{where}: {file} does not hold a 'tae' autoencoder; name what scripts/train_autoencoder.py exported"
        )
    mean, std = tensors.pop(MEAN), tensors.pop(STD)
    try:
        settings = TaeConfig.model_validate_json(metadata.get("tae", ""))
        with torch.device("meta"):
            model = Tae(settings)
        model.load_state_dict(tensors, assign=True)
    except (ValidationError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:240]
        raise UserError(f"{where}: {file} is not a whole autoencoder ({reason}); export it again") from error
    if {mean.shape, std.shape} != {(settings.channels,)} or not (std.isfinite() & (std > 0)).all():
        raise UserError(f"{where}: {file} has no mean and deviation for each of its {settings.channels} channels")
    refuse_other_ratios(config, settings.channels, settings.time, settings.space)
    return tiled(TaeAutoencoder(model, mean, std, device, DTYPES[config.dtype]), config.tile)
