"""How: what was computed stands for what is not, held or extrapolated.

Shapes: R rows, each with times of its own; a value (R, n, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lingen.reuse_config import Reusing
from lingen.sampling.call import Call


class Stored:
    """The last computed values of one thing, newest first: one tensor, or ``order + 1`` to extrapolate through."""

    def __init__(self, how: Reusing) -> None:
        self._how = how
        self.values: list[Tensor] = []
        self._times: list[list[float]] = []  # of each row, newest first

    def __bool__(self) -> bool:
        return bool(self.values)

    def clear(self) -> None:
        """Forget all."""
        self.values, self._times = [], []

    def put(self, call: Call, value: Tensor, rows: Sequence[int] | None = None) -> None:
        """Store what was computed for these rows (all of them: None); a tensor for all is kept as it is."""
        now = self._time(call)
        if rows is None:
            if not self._times or any(times[0] != now for times in self._times):
                self.values.insert(0, value)
                self._times = [[now, *times] for times in self._times] or [[now] for _ in value]
            else:  # a solver that comes back to a noise level: distances are not zero
                self.values[0] = value
            del self.values[self._how.kept :]
            self._times = [times[: self._how.kept] for times in self._times]
            return
        if len(self.values) < self._how.kept:
            self.values.append(self.values[-1].clone())
        older = [row for row in rows if self._times[row][0] != now]
        for newer, old in zip(reversed(self.values[:-1]), reversed(self.values[1:]), strict=True):
            old[older] = newer[older]
        for row in older:
            self._times[row] = [now, *self._times[row]][: self._how.kept]
        self.values[0][list(rows)] = value

    def get(self, call: Call) -> Tensor:
        """What stands for the value now, of all rows; lent, not to be written to."""
        if len(self.values) == 1:
            return self.values[0]
        weights = self._weights(call, range(len(self._times)))
        terms = [value * weight for value, weight in zip(self.values, weights, strict=False)]
        return reduce(torch.add, terms)

    def add_to(self, x: Tensor, call: Call, rows: Sequence[int] | None = None) -> None:
        """Add it, in place, to these rows of x (R, n, D)."""
        weights = self._weights(call, range(len(self._times)) if rows is None else rows)
        for value, weight in zip(self.values, weights, strict=False):
            if rows is None:
                x.add_(value, alpha=weight) if isinstance(weight, float) else x.add_(value * weight)
            else:
                chosen = torch.as_tensor(rows, device=x.device)
                x.index_add_(0, chosen, value.index_select(0, chosen) * weight)

    def _weights(self, call: Call, rows: Sequence[int]) -> list[float | Tensor]:
        """Of each value, in the sum that stands for it now: numbers where all rows have the same, else (R', 1, 1)."""
        now = self._time(call)
        each = [lagrange(self._times[row], now) for row in rows]
        if all(weights == each[0] for weights in each):
            return list(each[0])
        longest = max(map(len, each))
        padded = torch.tensor([weights + [0.0] * (longest - len(weights)) for weights in each])  # (R', K)
        return list(padded.to(self.values[0])[:, :, None, None].unbind(1))

    def _time(self, call: Call) -> float:
        return float(call.index) if self._how.over == "call" else call.sigma


def lagrange(times: Sequence[float], now: float) -> list[float]:
    """The weights of values at ``times`` in the polynomial through them, taken at ``now``: it has the divided
    differences of TaylorSeer (arXiv 2503.06923, equation 3) as its coefficients, with the distances as they are."""
    weights = []
    for i, here in enumerate(times):
        weight = 1.0
        for other in (*times[:i], *times[i + 1 :]):
            weight *= (now - other) / (here - other)
        weights.append(weight)
    return weights
