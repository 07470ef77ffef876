"""The noise that a video begins as: of its own seed, whatever its batch.

Shapes: B videos; latents (C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import torch

from lingen.errors import UserError
from lingen.flow import generator

Random = torch.Generator | Sequence[torch.Generator]


def generators(count: int, given: Random | None, seeds: int | Sequence[int] | None) -> list[torch.Generator]:
    """What the noise of each of ``count`` videos is drawn from: generators, or seeds, or seed 0.

    Raises:
        UserError: both are given, or not as many as videos; a seed is no whole number.
    """
    if given is not None and seeds is not None:
        raise UserError("generator and seeds both say where the noise comes from; give one of them")
    if isinstance(given, torch.Generator):
        return [given] * count
    if given is not None:
        many: Sequence[torch.Generator] = given
    else:
        numbers = list(seeds) if isinstance(seeds, Iterable) else [seeds or 0]
        numbers = numbers * count if len(numbers) == 1 else numbers
        if wrong := [seed for seed in numbers if not isinstance(seed, SupportsIndex)]:
            raise UserError(f"seeds: {wrong[0]!r} is no whole number")
        many = [generator("cpu", "sample", int(seed)) for seed in numbers]
    if len(many) != count:
        what = "seeds" if given is None else "generator"
        raise UserError(f"{what}: {len(many)} for {count} prompts; give one a prompt, or one for all")
    return list(many)


def draw_noise(shape: tuple[int, ...], draws: Sequence[torch.Generator]) -> torch.Tensor:
    """(B, *shape) fp32 on the CPU, each video's from its own generator, wherever that computes."""
    return torch.stack([torch.randn(shape, generator=draw, device=draw.device).cpu() for draw in draws])
