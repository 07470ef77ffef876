"""Flow matching: the straight path from noise to data, and the loss along it.

Shapes: B samples, C channels, T x H x W latent positions. sigma is 0 at the data and 1 at the noise:

    x_sigma = (1 - sigma) * x_0 + sigma * noise,    velocity = d x_sigma / d sigma = noise - x_0

Every random number of a training step comes from (seed, samples seen before the step, position in the global batch),
never from the rank: a run can be repeated, resumed, and spread over other ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lingen.config import FlowConfig


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator that is a pure function of ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def bucket_shift(tokens: int, flow: FlowConfig) -> float:
    """The timestep shift of a bucket: it grows with the square root of its tokens, as signal-to-noise does when a field
    is sampled more densely (Esser et al., arXiv 2403.03206, section 5.3.2)."""
    return min(flow.max_shift, flow.base_shift * math.sqrt(tokens / flow.base_tokens))


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Move timesteps towards the noise (shift > 1) or the data (shift < 1); 0 and 1 stay."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class Noised:
    """The random part of one micro-batch, drawn sample by sample."""

    sigma: torch.Tensor  # (B,) fp32
    noise: torch.Tensor  # (B, C, T, H, W) fp32
    drop_caption: list[bool]  # True: train this sample without its caption, for guidance


def draw(
    positions: Sequence[int],
    latent_shape: tuple[int, int, int, int],
    *,
    seed: int,
    samples_seen: int,
    shift: float,
    flow: FlowConfig,
    device: torch.device,
) -> Noised:
    """Timesteps (logit-normal, then shifted), noise and caption dropout of the samples at ``positions``.

    ``latent_shape`` is (C, T, H, W). Noise is drawn on ``device``, the small numbers on the CPU.
    """
    sigmas, noises, drops = [], [], []
    for position in positions:
        small = generator("cpu", "train", seed, samples_seen, position)
        logit = flow.logit_mean + flow.logit_std * torch.randn((), generator=small)
        sigmas.append(torch.sigmoid(logit))
        drops.append(bool(torch.rand((), generator=small) < flow.caption_dropout))
        large = generator(device, "noise", seed, samples_seen, position)
        noises.append(torch.randn(latent_shape, generator=large, device=device))
    sigma = shift_sigma(torch.stack(sigmas).to(device), shift)
    return Noised(sigma, torch.stack(noises), drops)


def draw_left_out(
    positions: Sequence[int], dropout: Mapping[str, float], *, seed: int, samples_seen: int
) -> list[set[str]]:
    """For each sample at ``positions`` the text encoders whose tokens it trains without: one draw an encoder, which
    depends neither on the other encoders nor on what ``draw`` draws."""

    def share(position: int, encoder: str) -> float:
        own = generator("cpu", "encoder", encoder, seed, samples_seen, position)
        return float(torch.rand((), generator=own))

    return [{name for name, most in dropout.items() if most and share(at, name) < most} for at in positions]


def interpolate(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_sigma, the input of the model: (B, C, T, H, W)."""
    weight = sigma.view(-1, 1, 1, 1, 1)
    return torch.lerp(latents, noise, weight)


def sample_losses(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The mean squared error of the predicted velocity, a sample: (B,) fp32."""
    return (velocity.float() - (noise - latents)).square().flatten(1).mean(1)
