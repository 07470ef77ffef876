"""At which noise levels the model is asked: ``steps + 1`` sigmas, from exactly 1 (noise) down to exactly 0 (data).

They are worked out in fp64 and given in fp32.
"""

from __future__ import annotations

import torch

from lingen.config import SamplerConfig
from lingen.flow import shift_sigma


def schedule(sampler: SamplerConfig, shift: float) -> torch.Tensor:
    """The sigmas that ``sampler`` asks for; ``shift`` is that of the training, where the sampler names none."""
    if sampler.schedule == "linear_quadratic":
        return linear_quadratic(sampler.steps, sampler.emulated_steps)
    return shifted(sampler.steps, shift if sampler.shift is None else sampler.shift)


def shifted(steps: int, shift: float) -> torch.Tensor:
    """Evenly spaced, then shifted as timesteps are in training (``lingen.flow.shift_sigma``)."""
    return shift_sigma(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift).float()


def linear_quadratic(steps: int, emulated: int) -> torch.Tensor:
    """The first half of the steps are the first of ``emulated`` even ones; the others go on along the parabola that
    continues them and ends at 0 (Movie Gen, arXiv 2410.13720, section 3.4.2).

    ``emulated`` must be ``steps`` at least.
    """
    linear = steps // 2
    at = torch.arange(steps + 1, dtype=torch.float64) / emulated  # had all steps been even
    beyond = (torch.arange(steps + 1, dtype=torch.float64) - linear).clamp(min=0) / (steps - linear)  # 0 to 1
    sigmas = 1 - at - (1 - steps / emulated) * beyond**2
    sigmas[-1] = 0.0  # not what rounding leaves
    return sigmas.float()
