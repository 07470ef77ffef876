"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) as a wrapper around the model.

Shapes: B samples, L text tokens of width D_text; latents (B, C, T, H, W).
"""

from __future__ import annotations

import torch
from torch import nn

from lingen.sampling.solver import Denoise

Text = tuple[torch.Tensor, torch.Tensor]  # states (B, L, D_text), mask (B, L) bool


def guided(model: nn.Module, text: Text, negative: Text, scale: float) -> Denoise:
    """``v_negative + scale * (v_text - v_negative)``, both halves in one batch; ``scale`` 1 needs the text alone."""
    dtype = next(model.parameters()).dtype

    def plain(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model(x.to(dtype), sigma, text[0].to(dtype), text[1]).float()  # type: ignore[no-any-return]

    def both(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        states = torch.cat([text[0], negative[0]]).to(dtype)  # (2B, L, D_text)
        mask = torch.cat([text[1], negative[1]])  # (2B, L)
        doubled = torch.cat([x, x]).to(dtype)  # (2B, C, T, H, W)
        wanted, unwanted = model(doubled, torch.cat([sigma, sigma]), states, mask).float().chunk(2)
        return unwanted + scale * (wanted - unwanted)  # type: ignore[no-any-return]

    return plain if scale == 1.0 else both
