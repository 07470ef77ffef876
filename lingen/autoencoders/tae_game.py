"""The autoencoder and its discriminator as one model, and what a micro-batch of clips costs both.

Both move at once, each down its own loss (simultaneous gradient descent): one forward, one backward and one optimizer
hold all of it, so engines, checkpoints, the weight average and the guard see a model like any other. The gradients are
kept apart: the discriminator judges a detached reconstruction, and what its judgement means for the autoencoder is
found as a slope at the reconstruction, past the discriminator's weights.

Shapes: B clips, F = t*k + 1 frames, H x W pixels; C latent channels, T = k + 1.
"""

from __future__ import annotations

import torch
from torch import nn

from lingen.autoencoders.tae import Tae
from lingen.autoencoders.tae_losses import (
    Discriminator,
    Perceptual,
    adaptive_weight,
    hinge,
    kl,
    outlier_penalty,
    slopes,
)
from lingen.tae_config import LossesConfig, TaeConfig

AUTOENCODER = "autoencoder."  # what its parameters' names begin with
TERMS = ("l1", "squared", "perceptual", "kl", "outlier", "adversarial", "discriminator")


class TaeGame(nn.Module):
    """What is trained; the engine's model."""

    def __init__(self, config: TaeConfig, losses: LossesConfig, perceptual: Perceptual | None) -> None:
        super().__init__()
        self.autoencoder = Tae(config)
        self.discriminator = Discriminator(losses.adversarial) if losses.adversarial else None
        self._losses = losses
        self._perceptual = perceptual

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor | None, *, plays: bool = False) -> torch.Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1], noise (B, C, T, h, w) -> (B, 1 + len(TERMS)) fp32.

        The first column is to be minimised. Its value is the weighted sum of the first four terms: where the game
        ``plays``, it adds its gradients but not its value, which would say nothing of how good the reconstruction is.
        Without noise the latents are the posterior's means.
        """
        dtype = next(self.parameters()).dtype
        mean, log_variance = self.autoencoder.encode(pixels.to(dtype))
        latents = mean if noise is None else mean + (0.5 * log_variance).exp() * noise.to(dtype)
        decoded = self.autoencoder.decode(latents)  # (B, 3, F, H, W)
        l1 = (decoded.float() - pixels).abs().flatten(1).mean(1)
        nothing = torch.zeros_like(l1)
        looks = self._perceptual(decoded, pixels) if self._perceptual else nothing
        seen = self._losses.l1 * l1
        if self._losses.perceptual:
            seen = seen + self._losses.perceptual.weight * looks
        divergence, outliers = kl(mean, log_variance), outlier_penalty(mean, self._losses.outlier_deviations)
        total = seen + self._losses.kl * divergence + self._losses.outlier * outliers
        fooled = judged = nothing
        if plays:
            game, fooled, judged = self._play(pixels.to(dtype), decoded, seen)
            total = total + game - game.detach()
        squared = (decoded.detach().float().clamp(-1, 1) - pixels).square().flatten(1).mean(1)
        terms = (l1, squared, looks, divergence, outliers, fooled, judged)
        return torch.stack([total, *(term.detach() for term in terms)], dim=1)

    def _play(self, pixels: torch.Tensor, decoded: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(what has the gradients of both players, the autoencoder's loss, the discriminator's), each (B,)."""
        config, discriminator = self._losses.adversarial, self.discriminator
        if config is None or discriminator is None:
            raise ValueError("there is nobody to play against: losses.adversarial is not set")
        at = decoded.detach().requires_grad_()
        fake = discriminator(at).float()  # (B, N)
        fooled = -fake.mean(1)
        slope = slopes(fooled, at)  # (B, 3, F, H, W)
        weight = torch.full_like(fooled, config.weight).detach()
        if config.adaptive:
            weight = weight * adaptive_weight(slopes(seen, decoded), slope)
        pulled = (decoded.float() * slope * weight.view(-1, 1, 1, 1, 1)).flatten(1).sum(1)  # has that slope
        judged = hinge(discriminator(pixels).float(), fake)
        return pulled + judged, fooled, judged
