"""What our own autoencoder is trained on, each a mean over one sample, so that holes can be left out.

Shapes: B clips, F frames, H x W pixels; C latent channels, T x h x w latent positions.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from lingen.autoencoders.base import fingerprint
from lingen.autoencoders.tae_layers import Conv, by_frame, norm
from lingen.errors import UserError
from lingen.tae_config import AdversarialConfig

# ImageNet's mean and deviation, for pixels in [-1, 1] (LPIPS, Zhang et al. 2018).
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SLOPE = 0.2  # of the discriminator's leaky ReLUs
MOST = 1e4  # the largest adaptive weight


def kl(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """From the posterior, (B, C, T, h, w) each, to a standard normal: (B,), a latent number."""
    mean, log_variance = mean.float(), log_variance.float()
    divergence: torch.Tensor = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)
    return 0.5 * divergence


def outlier_penalty(latents: torch.Tensor, deviations: float) -> torch.Tensor:
    """How far latents (B, C, T, h, w) lie beyond so many standard deviations of their frame: (B,).

    Movie Gen, eq. 1: mean over positions of max(|X_ij - Mean(X)| - r |Std(X)|, 0), norms over the channels, each
    frame for itself. Without it decoders keep global facts in one spot of high norm, which shows in the pictures.
    """
    x = latents.float()
    off = (x - x.mean((3, 4), keepdim=True)).norm(dim=1)  # (B, T, h, w)
    deviation = x.std((3, 4), correction=0).norm(dim=1)  # (B, T)
    beyond: torch.Tensor = (off - deviations * deviation[..., None, None]).relu()
    return beyond.flatten(1).mean(1)


class Perceptual:
    """The distance of two pictures in the features of a frozen VGG; with LPIPS' weights, where the file has them.

    It is no ``nn.Module``: nobody may train it, move it into a checkpoint or shard it.
    """

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        """Raises:
        ValueError: these are not the weights of a VGG, in torchvision's names, alone or with LPIPS'.
        """
        found = {name: re.fullmatch(r"(?:.*\.)?features\.(\d+)\.(weight|bias)", name) for name in weights}
        self._convs = {
            int(match[1]): (weights[name], weights[name.removesuffix("weight") + "bias"])
            for name, match in sorted(found.items())
            if match and match[2] == "weight"
        }
        places = sorted(self._convs)
        # A convolution and its ReLU take two places, a pooling between two levels a third one.
        self._ends = [a for a, b in zip(places, [*places[1:], None], strict=True) if b is None or b - a == 3]
        lins = {int(m[1]): w for name, w in weights.items() if (m := re.search(r"\blin(\d+)\.model\.1\.weight$", name))}
        known = all(b - a in (2, 3) for a, b in pairwise(places))
        if not places or places[0] != 0 or not known or (lins and set(lins) != set(range(len(self._ends)))):
            raise ValueError("it must have features.N.weight and features.N.bias of a VGG, and lin0 to lin4 or none")
        self.is_lpips = bool(lins)
        self._lins = [lins[n] if lins else None for n in range(len(self._ends))]
        try:
            self(torch.zeros(1, 3, 1, 32, 32), torch.zeros(1, 3, 1, 32, 32))
        except RuntimeError as error:
            raise ValueError(f"its layers do not follow one another: {error}") from error
        self.fingerprint = fingerprint(weights)

    def to(self, device: torch.device, dtype: torch.dtype) -> Perceptual:
        """Move the weights, in place."""
        self._convs = {n: (w.to(device, dtype), b.to(device, dtype)) for n, (w, b) in self._convs.items()}
        self._lins = [None if lin is None else lin.to(device, dtype) for lin in self._lins]
        return self

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1] -> (B,), the mean over frames."""
        batch, _, frames = a.shape[:3]
        x = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in (a, b)])  # (2*B*F, 3, H, W)
        dtype, device = self._convs[0][0].dtype, x.device
        shift, scale = (torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (SHIFT, SCALE))
        x = ((x.float() - shift) / scale).to(dtype)
        total = torch.zeros(batch * frames, device=device)
        for place, (weight, bias) in sorted(self._convs.items()):
            x = functional.conv2d(x, weight, bias, padding=1).relu()
            if place in self._ends:
                one, other = (x.float() / (x.float().norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
                difference, lin = (one - other).square(), self._lins[self._ends.index(place)]
                by_position = difference.sum(1) if lin is None else functional.conv2d(difference, lin.float())[:, 0]
                total = total + by_position.mean((1, 2))
                x = functional.max_pool2d(x, 2) if place != self._ends[-1] else x
        return total.view(batch, frames).mean(1)


def load_perceptual(path: str) -> Perceptual:
    """The VGG in a safetensors file, on the CPU in fp32.

    Raises:
        UserError: it is missing, damaged, or not a VGG.
    """
    where = f"losses.perceptual.path={path}"
    if not Path(path).is_file():
        raise UserError(f"{where} does not exist; name a safetensors file with VGG's weights, or leave the loss out")
    try:
        return Perceptual(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where} cannot be read as safetensors: {error}") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{where} holds no VGG that is known here: {error}") from error


class Discriminator(nn.Module):
    """Tells clips from their reconstructions, patch by patch; it is inflated in time as the autoencoder is."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        widths = [config.width * min(2**level, 8) for level in range(config.levels)]
        self.first = Conv(3, widths[0], stride=2)
        self.convs = nn.ModuleList(Conv(a, b, stride=2) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(norm(b) for b in widths[1:])
        self.last = Conv(widths[-1], 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, F, H, W) -> (B, N), one number a patch: high where it looks real."""
        x = functional.leaky_relu(self.first(pixels.transpose(1, 2)), SLOPE)
        for conv, each in zip(self.convs, self.norms, strict=True):
            x = functional.leaky_relu(by_frame(each, conv(x)), SLOPE)
        scores: torch.Tensor = self.last(x).flatten(1)
        return scores


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss, from its numbers (B, N) for both: (B,)."""
    return (1 - real).relu().mean(1) + (1 + fake).relu().mean(1)


def slopes(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The gradient of each sample's loss (B,) at ``at`` (B, ...), of which none depends on another's."""
    (gradient,) = torch.autograd.grad(loss.sum(), at, retain_graph=True)
    return gradient.float()


def adaptive_weight(others: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """By how much the adversarial slopes (B, ...) must grow to be as long as those of the other losses: (B,).

    Esser et al. (2021, VQGAN, eq. 7) measure both at the decoder's last layer, over a whole batch. Measured at the
    reconstruction, a sample's weight does not depend on whom it shares a micro-batch with.
    """
    lengths: torch.Tensor = others.flatten(1).norm(dim=1) / (adversarial.flatten(1).norm(dim=1) + 1e-8)
    return lengths.clamp(max=MOST)
