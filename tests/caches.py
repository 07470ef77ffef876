"""Small models whose gates are awake, and generations of them with a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lingen.cache_config import read_cache
from lingen.compose import compose
from lingen.models import Backbone, make_model
from lingen.sampling.cache import CacheRun
from lingen.sampling.call import Context, Forward
from lingen.sampling.guidance import forward_of, guided
from lingen.sampling.solver import evaluations, solve
from lingen.text.join import Text

WORDS = [
    "name=test", "data.path=none", "autoencoder.path=none", "autoencoder.channels=4", "size.d_model=32",
    "size.head_dim=8", "size.d_state=8", "size.mlp_ratio=2", "text.encoders.minilm.dim=12",
    "model.mate.mamba_head_dim=8", "model.mate.window=[2,3,3]",
]  # fmt: skip
LATENTS, STEPS = (4, 3, 4, 6), 8  # (C, T', H', W'): a grid of 3 x 2 x 3 tokens
PAIR: tuple[Context, ...] = ("pair",)
TWO: tuple[Context, ...] = ("text", "negative")


@cache
def model(name: str, depth: int = 4, *words: str) -> Backbone:
    """``lingen`` or ``dit``; the same each time, so that it can be shared."""
    own = [word for word in WORDS if name == "lingen" or not word.startswith("model.mate")]
    torch.manual_seed(0)
    made = make_model(compose([f"model={name}", f"size.depth.{name}={depth}", *own, *words]))
    with torch.no_grad():
        for key, weight in made.named_parameters():  # what changes along the calls depends on the video above all
            weight.add_((0.01 if "modulation" in key else 0.08) * torch.randn_like(weight))
    return made.requires_grad_(False)


def text_of(seeds: list[int]) -> Text:
    """Of each seed, seven tokens."""
    draws = [torch.randn(7, 12, generator=torch.Generator().manual_seed(100 + seed)) for seed in seeds]
    return {"minilm": torch.stack(draws)}, torch.ones(len(seeds), 7, dtype=torch.bool)


def noise_of(seeds: list[int], latents: tuple[int, ...] = LATENTS) -> Tensor:
    """Of each seed, some that is larger the larger the seed is: videos of one batch change at different rates."""
    draws = [torch.randn(latents, generator=torch.Generator().manual_seed(seed)) * (1 + seed) for seed in seeds]
    return torch.stack(draws)


def generate(
    forward: Forward,
    seeds: list[int],
    *,
    solver: str = "euler",
    mode: Any = "batch",
    scale: float = 3.0,
    steps: int = STEPS,
    latents: tuple[int, ...] = LATENTS,
    after: Callable[[int, float, Tensor], Tensor] = lambda step, sigma, x: x,
) -> Tensor:
    """Guided latents (B, C, T', H', W')."""
    denoise = guided(
        forward, text_of(seeds), text_of([-1 - seed for seed in seeds]), scale,
        device=torch.device("cpu"), dtype=torch.float32, mode=mode,
    )  # fmt: skip
    with torch.no_grad():
        return solve(denoise, noise_of(seeds, latents), torch.linspace(1, 0, steps + 1), solver, after)


def uncached(made: Backbone, seeds: list[int], **words: Any) -> Tensor:
    """The same without any cache."""
    return generate(forward_of(made), seeds, **words)


def start(
    made: Backbone,
    config: dict[str, Any],
    contexts: tuple[Context, ...] = PAIR,
    *,
    solver: str = "euler",
    steps: int = STEPS,
) -> CacheRun:
    """A run of a cache given by its keys."""
    return CacheRun(read_cache(config), made, calls=evaluations(solver, steps), contexts=contexts)


def schedules(run: CacheRun, context: Context = "pair") -> list[list[bool]]:
    """Of each sample."""
    return run.summary().contexts[context].schedules
