"""What the parts of sampling say to each other: which evaluation of the model this is.

The solver makes a ``Call`` for each evaluation, guidance says for which texts it is, and a cache decides by it. So
nobody counts forwards: a solver that evaluates twice a step, guidance in two passes and an aborted run cannot put a
count out of step.

Shapes: B samples; latents (B, C, T, H, W); of a text encoder: L tokens, S width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

# Rows of a batch: "pair" has those with the texts and then, in the same order, those with the negative texts.
Context = Literal["pair", "text", "negative"]


@dataclass(frozen=True)
class Call:
    """One evaluation of the velocity field in one generation. Guidance in two passes makes two forwards of it, which
    differ in their context."""

    index: int  # n, from 0
    count: int  # N, of the generation
    sigma: float
    step: int  # of the solver, from 0
    stage: int = 0  # 0 where the step begins; 1: the second evaluation of Heun's method
    context: Context = "text"


class Forward(Protocol):
    """A model's forward that is told which call it is of: what guidance wraps, and what a cache stands for."""

    def __call__(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        mask: torch.Tensor,
        call: Call,
        /,
    ) -> torch.Tensor:
        """The velocity; see ``Backbone.forward`` for all but ``call``."""
        ...


Denoise = Callable[[torch.Tensor, torch.Tensor, Call], torch.Tensor]  # x, sigma (B,), call -> velocity, as x
