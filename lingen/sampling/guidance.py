"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) as a wrapper around the model.

Shapes: B samples; latents (B, C, T, H, W).
"""

from __future__ import annotations

import torch
from torch import nn

from lingen.sampling.solver import Denoise
from lingen.text.join import Text, moved, stacked


def guided(model: nn.Module, text: Text, negative: Text, scale: float) -> Denoise:
    """``v_negative + scale * (v_text - v_negative)``, both halves in one batch; ``scale`` 1 needs the text alone."""
    weight = next(model.parameters())
    dtype = weight.dtype
    text, negative = (moved(part, weight.device, dtype) for part in (text, negative))
    pair = stacked(text, negative)  # of 2B samples

    def plain(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model(x.to(dtype), sigma, *text).float()  # type: ignore[no-any-return]

    def both(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        doubled = torch.cat([x, x]).to(dtype)  # (2B, C, T, H, W)
        wanted, unwanted = model(doubled, torch.cat([sigma, sigma]), *pair).float().chunk(2)
        return unwanted + scale * (wanted - unwanted)  # type: ignore[no-any-return]

    return plain if scale == 1.0 else both
