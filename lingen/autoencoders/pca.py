"""The embedded autoencoder: a PCA of causal patches, fitted in seconds.

Shapes: B clips, F = t*k + 1 frames, H height, W width in pixels; C channels; t, s the ratios in time and space;
h = H/s, w = W/s; D = 3*t*s*s numbers of a patch; N patches.

The first latent frame stands for the first frame alone, which is seen as t equal ones: so an image needs no code of its
own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders.base import Autoencoder, fingerprint, refuse_other_ratios, refuse_other_shapes, to_float
from lingen.autoencoders.tiles import tiled
from lingen.errors import UserError

LEAST_STD = 1e-4  # of a channel; pixels are in [-1, 1]. Below it whitening would blow up rounding


class PcaAutoencoder:
    """The C main directions of patches of t x s x s pixels, each divided by its standard deviation.

    Args:
        basis: (C, 3, t, s, s), orthonormal.
        mean: (3, t, s, s), the mean patch; removing it makes the latents' mean zero.
        std: (C,), of the latents before they are whitened.
    """

    def __init__(self, basis: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, device: torch.device | str) -> None:
        self.channels, _, self.time, self.space, _ = basis.shape
        self.fingerprint = fingerprint({"basis": basis, "mean": mean, "std": std})
        into = basis / std.view(-1, 1, 1, 1, 1)
        out_of = basis * std.view(-1, 1, 1, 1, 1)
        self._bias = -(into * mean).sum((1, 2, 3, 4)).to(device)  # (C,)
        self._into = into.to(device)  # (C, 3, t, s, s)
        self._into_first = into.sum(2, keepdim=True).to(device)  # (C, 3, 1, s, s): t equal frames
        self._out_of = torch.cat([out_of, mean[None]]).to(device)  # (C + 1, 3, t, s, s): the mean is a channel of ones
        self._out_of_first = self._out_of.mean(2, keepdim=True)  # (C + 1, 3, 1, s, s): the average of t frames

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See ``Autoencoder.encode``. Works on one latent frame at a time, so it needs little memory.

        Raises:
            ValueError: F is not t*k + 1, or H or W is not a multiple of s.
        """
        refuse_other_shapes(self, pixels)
        parts = [self._encode(pixels[:, :, :1], self._into_first)]
        for first in range(1, pixels.shape[2], self.time):
            parts.append(self._encode(pixels[:, :, first : first + self.time], self._into))
        return torch.cat(parts, dim=2)  # (B, C, k + 1, h, w)

    def _encode(self, pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, 3, t or 1, H, W) -> (B, C, 1, h, w)."""
        with torch.autocast(pixels.device.type, enabled=False):  # the same latents inside and outside of a bf16 step
            return functional.conv3d(to_float(pixels), weight, self._bias, stride=weight.shape[2:])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See ``Autoencoder.decode``."""
        batch, _, steps, height, width = latents.shape
        shape = (batch, 3, (steps - 1) * self.time + 1, height * self.space, width * self.space)
        pixels = torch.empty(shape, dtype=torch.float32, device=latents.device)
        pixels[:, :, :1] = self._decode(latents[:, :, 0], self._out_of_first)
        for step in range(1, steps):
            first = (step - 1) * self.time + 1
            pixels[:, :, first : first + self.time] = self._decode(latents[:, :, step], self._out_of)
        return pixels.clamp_(-1, 1)  # (B, 3, F, H, W)

    def _decode(self, latents: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, 3, t or 1, H, W): a transposed convolution, which as a matmul is five times faster."""
        batch, _, height, width = latents.shape
        tokens = latents.float().permute(0, 2, 3, 1)  # (B, h, w, C)
        tokens = torch.cat([tokens, torch.ones_like(tokens[..., :1])], dim=-1)  # (B, h, w, C + 1)
        with torch.autocast(latents.device.type, enabled=False):
            patches = tokens @ weight.flatten(1)  # (B, h, w, D)
        patches = patches.view(batch, height, width, *weight.shape[1:])  # (B, h, w, 3, t, s, s)
        clip = patches.permute(0, 3, 4, 1, 5, 2, 6)  # (B, 3, t, h, s, w, s)
        return clip.reshape(batch, 3, weight.shape[2], height * self.space, width * self.space)


def load_pca(config: AutoencoderConfig, device: torch.device | str) -> Autoencoder:
    """The PCA that the file ``config.path`` holds, on ``device``, in tiles where the configuration says so.

    Raises:
        UserError: the file is missing or damaged, or its ratios or channels are not those of the configuration.
    """
    where, path = f"autoencoder.path={config.path}", Path(config.path)
    if not path.is_file():
        raise UserError(f"{where} does not exist; fit one with: python scripts/fit_autoencoder.py data=DIR out={path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where} cannot be read as safetensors ({error}); fit it again") from error
    if metadata.get("kind") != config.kind or set(tensors) != {"basis", "mean", "std"}:
        raise UserError(
            f"{where} does not hold a '{config.kind}' autoencoder; name a file that scripts/fit_autoencoder.py wrote"
        )
    channels, _, time, space, _ = tensors["basis"].shape
    refuse_other_ratios(config, channels, time, space)
    return tiled(PcaAutoencoder(tensors["basis"], tensors["mean"], tensors["std"], device), config.tile)


def fit_pca(
    clips: Iterable[torch.Tensor], *, channels: int, time: int, space: int, image_share: float
) -> dict[str, torch.Tensor]:
    """Fit ``PcaAutoencoder``'s tensors to clips, one pass, in fp64.

    Args:
        clips: uint8 (3, t*k + 1, H, W). Their first frames count as images, so do clips of one frame.
        image_share: weight of the images' patches; the rest is the videos'. Without videos it is 1.

    Raises:
        UserError: the clips vary in fewer than ``channels`` directions.
    """
    images, videos = _Moments(3 * space * space), _Moments(3 * time * space * space)
    for clip in clips:
        images.add(_patches(clip[:, :1], 1, space))
        if clip.shape[1] > 1:
            videos.add(_patches(clip[:, 1:], time, space))
    mean, second = images.repeated(time)
    if videos.count:
        share = image_share
        mean = share * mean + (1 - share) * videos.first / videos.count
        second = share * second + (1 - share) * videos.second / videos.count
    variance, directions = torch.linalg.eigh(second - mean[:, None] * mean)  # ascending
    variance, basis = variance[-channels:].flip(0), directions[:, -channels:].flip(1).T  # (C,), (C, D)
    if len(variance) < channels or variance[-1] < LEAST_STD**2:
        enough = int((variance >= LEAST_STD**2).sum())
        raise UserError(
            f"channels={channels}: these clips vary in {enough} directions only; give more clips or fewer channels"
        )
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))  # (C, 1)
    basis = basis * largest.sign()  # an eigenvector has no sign of its own: make its largest number positive
    return {
        "basis": basis.reshape(channels, 3, time, space, space).float().contiguous(),
        "mean": mean.reshape(3, time, space, space).float(),
        "std": variance.sqrt().float(),
    }


class _Moments:
    """Running sums of patches (N, D) and of their products, in fp64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.first = torch.zeros(dim, dtype=torch.float64)  # (D,)
        self.second = torch.zeros(dim, dim, dtype=torch.float64)  # (D, D)

    def add(self, patches: torch.Tensor) -> None:
        patches = patches.double()
        self.count += len(patches)
        self.first += patches.sum(0)
        self.second.addmm_(patches.T, patches)

    def repeated(self, time: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D*t,) and second moment (D*t, D*t) of the patches repeated over t frames, laid out as (3, t, s*s)."""
        area = len(self.first) // 3
        mean = (self.first / self.count).view(3, 1, area).expand(3, time, area)
        second = (self.second / self.count).view(3, 1, area, 3, 1, area).expand(3, time, area, 3, time, area)
        return mean.reshape(-1), second.reshape(mean.numel(), mean.numel())


def _patches(clip: torch.Tensor, time: int, space: int) -> torch.Tensor:
    """(3, F, H, W) uint8 -> (N, D) float."""
    _, frames, height, width = clip.shape
    grid = clip.view(3, frames // time, time, height // space, space, width // space, space)
    return to_float(grid.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, 3 * time * space * space))
