"""Which optimizer steps are left out, and when so many were that the run must go back.

A loss or gradient norm that is not finite is always refused. A spike is judged by standard deviations above the mean of
the last steps of the same bucket that were taken: what was refused moves no mean, so a run that has diverged does not
come to look normal. Only rises count. A gradient norm is judged by its logarithm, since norms scatter by factors.

A rolling window and a factor of deviations are what OLMo's skip-step optimizers use (128 steps, 6 deviations); going
back and past the data is what PaLM's authors did by hand (Chowdhery et al. 2022, section 5.1).
"""

from __future__ import annotations

import math
import sys
from collections import deque
from typing import Any

from lingen.operation_config import GuardConfig

# Of the mean loss, and of the norm (its logarithm, so a share too): scatter below that counts as that much.
SMALLEST_DEVIATION = 1e-3


class Guard:
    """Judges the steps of one stage. Equal on all ranks, since loss and gradient norm are; so is its state.

    Args:
        state: what ``state`` gave, also through JSON: a guard made from it judges as the one that gave it, to the bit.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any] | None = None) -> None:
        self._config = config
        self.in_a_row: int = state["in_a_row"] if state else 0  # steps refused since one was taken; 0 after a rollback
        self._losses = self._windows(state["losses"] if state else {})
        self._log_norms = self._windows(state["log_norms"] if state else {})

    @property
    def must_roll_back(self) -> bool:
        """Whether ``guard.in_a_row`` steps were refused one after the other."""
        return self.in_a_row >= self._config.in_a_row

    def reason(self, bucket: str, loss: float, grad_norm: float) -> str | None:
        """Why a step of ``bucket`` (such as "17x64x64") is to be left out, or None. Changes nothing."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name}={value:g} is not finite"
        losses, log_norms = self._losses.get(bucket), self._log_norms.get(bucket)
        if losses is None or log_norms is None or len(losses) < self._config.window:
            return None
        of = f"of the last {len(losses)} steps of {bucket}"
        mean, deviation = mean_and_deviation(losses)
        above = (loss - mean) / max(deviation, SMALLEST_DEVIATION * abs(mean), sys.float_info.min)
        if self._config.loss_deviations is not None and above > self._config.loss_deviations:
            return f"loss={loss:.4g} is {above:.1f} deviations above the mean {mean:.4g} {of}"
        mean, deviation = mean_and_deviation(log_norms)
        above = (logarithm(grad_norm) - mean) / max(deviation, SMALLEST_DEVIATION)
        if self._config.grad_deviations is not None and above > self._config.grad_deviations:
            return f"grad_norm={grad_norm:.4g} is {above:.1f} deviations above the mean {math.exp(mean):.4g} {of}"
        return None

    def note(self, bucket: str, loss: float, grad_norm: float, refused: bool) -> None:
        """Remember a step. One without a valid sample, which has no loss (NaN) though it was not refused, is none."""
        if refused:
            self.in_a_row += 1
        elif math.isfinite(loss):
            self.in_a_row = 0
            self._losses.setdefault(bucket, deque(maxlen=self._config.window)).append(loss)
            self._log_norms.setdefault(bucket, deque(maxlen=self._config.window)).append(logarithm(grad_norm))

    def state(self) -> dict[str, Any]:
        """All that it knows, for JSON, which keeps floats exactly."""
        return {
            "in_a_row": self.in_a_row,
            "losses": {bucket: list(values) for bucket, values in self._losses.items()},
            "log_norms": {bucket: list(values) for bucket, values in self._log_norms.items()},
        }

    def _windows(self, values: dict[str, list[float]]) -> dict[str, deque[float]]:
        return {bucket: deque(last, maxlen=self._config.window) for bucket, last in values.items()}


def mean_and_deviation(values: deque[float]) -> tuple[float, float]:
    """Mean and standard deviation, from the values alone: a running sum would remember what has left the window."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def logarithm(norm: float) -> float:
    """Of a norm, which may be 0."""
    return math.log(max(norm, sys.float_info.min))
