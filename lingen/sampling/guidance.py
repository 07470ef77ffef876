"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) as a wrapper around the model.

Shapes: B samples; latents (B, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from lingen.models import Backbone
from lingen.sampling.call import Call, Context, Denoise, Forward
from lingen.text.join import Text, moved, stacked


def forward_of(model: Backbone) -> Forward:
    """The model itself, which does not ask which call it is of."""

    def forward(
        latents: torch.Tensor, sigma: torch.Tensor, text: Mapping[str, torch.Tensor], mask: torch.Tensor, call: Call
    ) -> torch.Tensor:
        return model(latents, sigma, text, mask)  # type: ignore[no-any-return]

    return forward


def contexts(scale: float, mode: Literal["batch", "two_passes"]) -> tuple[Context, ...]:
    """Those that ``guided`` will name in its calls."""
    if scale == 1.0:
        return ("text",)
    return ("pair",) if mode == "batch" else ("text", "negative")


def guided(
    forward: Forward,
    text: Text,
    negative: Text,
    scale: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
    mode: Literal["batch", "two_passes"] = "batch",
) -> Denoise:
    """``v_negative + scale * (v_text - v_negative)`` in fp32; ``scale`` 1 needs the text alone.

    Args:
        mode: the texts and the negative texts as one batch of 2B samples, or one after the other, which takes about
            half the memory.
        device, dtype: those of the model.
    """
    text, negative = (moved(part, device, dtype) for part in (text, negative))
    pair = stacked(text, negative)  # of 2B samples

    def velocity(x: torch.Tensor, sigma: torch.Tensor, who: Text, call: Call, context: Context) -> torch.Tensor:
        return forward(x.to(dtype), sigma, *who, replace(call, context=context)).float()

    def plain(x: torch.Tensor, sigma: torch.Tensor, call: Call) -> torch.Tensor:
        return velocity(x, sigma, text, call, "text")

    def batch(x: torch.Tensor, sigma: torch.Tensor, call: Call) -> torch.Tensor:
        both = velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), pair, call, "pair")
        wanted, unwanted = both.chunk(2)
        return unwanted + scale * (wanted - unwanted)

    def two_passes(x: torch.Tensor, sigma: torch.Tensor, call: Call) -> torch.Tensor:
        wanted = velocity(x, sigma, text, call, "text")
        unwanted = velocity(x, sigma, negative, call, "negative")
        return unwanted + scale * (wanted - unwanted)

    return plain if scale == 1.0 else {"batch": batch, "two_passes": two_passes}[mode]
