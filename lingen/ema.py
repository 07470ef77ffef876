"""A running average of the weights, whose half-life counts samples and ramps up (Karras et al., EDM, training loop).

Shapes: each average is a flat fp32 piece of one parameter, as its ``Fragment`` is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lingen.config import EmaConfig
from lingen.engine import Fragment


class Ema:
    """The average of the fragments that this rank owns: sharded as they are, so it needs no communication."""

    def __init__(self, fragments: Sequence[Fragment], config: EmaConfig) -> None:
        self.averages = {f.name: f.master.clone() for f in fragments}  # name -> (elements,)
        self._masters = [f.master for f in fragments]
        self._config = config

    def decay(self, samples_seen: int, batch_samples: int) -> float:
        """The share of the old average that a step of ``batch_samples`` keeps, ``samples_seen`` counting that step.

        The half-life ramps up with the samples seen, so that the average forgets the initialization soon.
        """
        halflife = min(self._config.halflife_samples, self._config.rampup * samples_seen)
        return float(0.5 ** (batch_samples / halflife)) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, samples_seen: int, batch_samples: int) -> None:
        """Move the average towards the weights after a step of ``batch_samples``."""
        if self._masters:
            torch._foreach_lerp_(
                list(self.averages.values()), self._masters, 1.0 - self.decay(samples_seen, batch_samples)
            )

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past: the average becomes the weights as they are."""
        for average, master in zip(self.averages.values(), self._masters, strict=True):
            average.copy_(master)
