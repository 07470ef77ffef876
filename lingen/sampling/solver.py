"""From noise to latents along the velocity field.

Shapes: B samples, C channels, T x H x W latent positions. ``denoise(x, sigma)`` returns the velocity; guidance and
caches wrap it, the solver does not know of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lingen.flow import shift_sigma

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (B, C, T, H, W), (B,) -> (B, C, T, H, W)


def sigma_schedule(steps: int, shift: float) -> torch.Tensor:
    """``steps + 1`` sigmas from 1 (noise) to 0 (data), evenly spaced and then shifted as in training."""
    return shift_sigma(torch.linspace(1.0, 0.0, steps + 1), shift)


def euler(denoise: Denoise, noise: torch.Tensor, sigmas: torch.Tensor) -> Iterator[torch.Tensor]:
    """Euler's method: one call of ``denoise`` a step. Yields the sample after each; the last is the result."""
    x = noise  # (B, C, T, H, W)
    for here, there in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        sigma = torch.full((x.shape[0],), here, device=x.device)  # (B,)
        x = x + (there - here) * denoise(x, sigma)
        yield x
