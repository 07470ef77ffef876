"""One optimizer step of flow matching, as it is done on every rank.

Shapes: B samples of a micro-batch, F frames, C channels, T x H x W latent positions, L text tokens of width D_text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data.batch import Batch
from lingen.autoencoder import Autoencoder
from lingen.config import FlowConfig
from lingen.dist import Dist
from lingen.engine import Engine
from lingen.flow import draw, interpolate, sample_losses
from lingen.models import Backbone
from lingen.text import TextEncoder

Text = tuple[torch.Tensor, torch.Tensor]  # states (B, L, D_text), mask (B, L)


@dataclass(frozen=True)
class Networks:
    """The trained model inside its engine, and the two frozen networks before it."""

    engine: Engine
    model: Backbone  # the same weights without the engine around them: for what only asks about shapes
    autoencoder: Autoencoder
    text: TextEncoder
    device: torch.device
    dtype: torch.dtype  # of the model's activations

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Clips (B, 3, F, H, W) uint8 -> latents (B, C, T, H, W) fp32."""
        return self.autoencoder.encode(pixels.to(self.device))

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        """The model's velocity at ``x`` (B, C, T, H, W) and ``sigma`` (B,), in fp32."""
        states, mask = (part.to(self.device) for part in text)
        velocity: torch.Tensor = self.engine.model(x.to(self.dtype), sigma, states.to(self.dtype), mask)
        return velocity.float()

    def forward_flops(self, grid: tuple[int, int, int]) -> int:
        """FLOPs of the model's forward for one sample of ``grid`` = (T, H, W) tokens."""
        return int(self.model.flops(grid, self.text.length))


@dataclass(frozen=True)
class StepResult:
    """What one step measured, over all ranks."""

    loss: float  # mean over the valid samples; NaN where there are none
    grad_norm: float  # before clipping
    valid: int  # samples that were not holes
    stop: bool  # some rank was asked to stop


def train_step(
    networks: Networks,
    batches: list[Batch],
    *,
    lr: float,
    seed: int,
    samples_seen: int,
    shift: float,
    flow: FlowConfig,
    dist: Dist,
    stop_asked: Callable[[], bool],
) -> StepResult:
    """Noise, predict, backward over this rank's micro-batches, then one step.

    Ranks that share their samples (``dist.sequence``) all have the same batches and the whole loss. So a sample counts
    as often as ranks share it, in the losses as in the number that divides them; and it is a hole for all of them where
    it is one for any, since a read may fail on one rank alone.

    Holes count neither in the loss nor in its mean, so the mean is over the valid samples of the global batch. Where
    all are holes, the loss is NaN and the weights stay.
    """
    device = networks.device
    masks = [dist.agreed(batch.valid) for batch in batches]  # (B,) bool each
    valid_total = torch.tensor(float(sum(int(mask.sum()) for mask in masks)), device=device)
    dist.all_reduce_sum(valid_total)
    valid = int(valid_total) // dist.sequence
    loss_sum = torch.zeros((), device=device)
    for batch, mask in zip(batches, masks, strict=True):
        latents = networks.encode(batch.pixels)  # (B, C, T, H, W)
        drawn = draw(
            batch.positions.tolist(),
            tuple(latents.shape[1:]),  # type: ignore[arg-type]
            seed=seed,
            samples_seen=samples_seen,
            shift=shift,
            flow=flow,
            device=device,
        )
        captions = ["" if drop else text for text, drop in zip(batch.captions, drawn.drop_caption, strict=True)]
        x = interpolate(latents, drawn.noise, drawn.sigma)
        velocity = networks.velocity(x, drawn.sigma, networks.text.encode(captions))
        losses = sample_losses(velocity, latents, drawn.noise)  # (B,)
        loss = (losses * mask).sum() / valid_total.clamp(min=1)
        networks.engine.backward(loss)
        loss_sum += loss.detach()
    grad_norm = networks.engine.step(lr if valid else 0.0)
    seen = torch.stack([loss_sum, torch.tensor(float(stop_asked()), device=device)])
    dist.all_reduce_sum(seen)
    return StepResult(float(seen[0]) if valid else math.nan, grad_norm, valid, bool(seen[1] > 0))
