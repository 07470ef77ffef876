"""From noise to latents along the velocity field dx / d sigma, from sigma 1 to 0.

Shapes: B samples, C channels, T x H x W latent positions. The solver makes the calls of ``denoise``; guidance and
caches stand behind it, and it does not know of them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from lingen.sampling.call import Call, Denoise

Step = tuple[int, float, float]  # number from 0, from which sigma, to which
After = Callable[[int, float, torch.Tensor], torch.Tensor]  # step, sigma that is reached, x -> x to go on with


def solve(denoise: Denoise, noise: torch.Tensor, sigmas: torch.Tensor, solver: str, after: After) -> torch.Tensor:
    """The sample (B, C, T, H, W) at the last of ``sigmas`` (N + 1,), from ``noise`` at the first.

    ``euler`` is of first order, ``heun`` of second with two evaluations a step but the last, ``ab2`` of
    second with one.

    Args:
        after: what becomes of the sample after each step, before the next.
    """
    levels: list[float] = sigmas.tolist()
    steps = [(number, *pair) for number, pair in enumerate(pairwise(levels))]
    return SOLVERS[solver](denoise, noise, steps, after)


def evaluations(solver: str, steps: int) -> int:
    """How often ``denoise`` is called in so many steps: N of its calls."""
    return 2 * steps - 1 if solver == "heun" else steps


def _euler(denoise: Denoise, x: torch.Tensor, steps: list[Step], after: After) -> torch.Tensor:
    for step, here, there in steps:
        x = x + (there - here) * _velocity(denoise, x, here, Call(step, len(steps), here, step))
        x = after(step, there, x)
    return x


def _heun(denoise: Denoise, x: torch.Tensor, steps: list[Step], after: After) -> torch.Tensor:
    """Heun's method (as in Karras et al., arXiv 2206.00364, algorithm 1). The last step is Euler's: the model is not
    asked at sigma 0, where training never is, and the order over the whole way stays 2."""
    count = evaluations("heun", len(steps))
    for step, here, there in steps:
        first = _velocity(denoise, x, here, Call(2 * step, count, here, step))
        ahead = x + (there - here) * first
        if step < len(steps) - 1:
            second = _velocity(denoise, ahead, there, Call(2 * step + 1, count, there, step, stage=1))
            ahead = x + (there - here) * (first + second) / 2
        x = after(step, there, ahead)
    return x


def _ab2(denoise: Denoise, x: torch.Tensor, steps: list[Step], after: After) -> torch.Tensor:
    """Adams and Bashforth's method of two steps of any lengths: the velocity goes on as the line through the last two.
    The first step is Euler's."""
    before: tuple[float, torch.Tensor] | None = None  # length of the step before and the velocity at its beginning
    for step, here, there in steps:
        length = there - here
        velocity = _velocity(denoise, x, here, Call(step, len(steps), here, step))
        middle = velocity  # of the step
        if before is not None:
            middle = velocity + length / (2 * before[0]) * (velocity - before[1])
        before = length, velocity
        x = after(step, there, x + length * middle)
    return x


def _velocity(denoise: Denoise, x: torch.Tensor, sigma: float, call: Call) -> torch.Tensor:
    return denoise(x, torch.full((x.shape[0],), sigma, device=x.device), call)


SOLVERS = {"euler": _euler, "heun": _heun, "ab2": _ab2}
