"""How: what was computed stands for what is not, held or extrapolated.

Shapes: R rows, each with times of its own; a value (R, n, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lingen.reuse_config import Reusing
from lingen.sampling.cache.layout import index_of
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
        kept, known = self._how.kept, self._times
        if rows is None and all(times[0] != now for times in known):
            self.values = [value, *self.values][:kept]
            self._times = [[now, *times][:kept] for times in known] or [[now] for _ in value]
            return
        rows = range(len(value)) if rows is None else rows
        if len(self.values) < kept:
            self.values.append(self.values[-1].clone())
        # A solver may come back to a noise level: the rows that were computed there go on, distances are not zero.
        older = [row for row in rows if known[row][0] != now]
        index = index_of(older, value.device)
        for newer, old in zip(reversed(self.values[:-1]), reversed(self.values[1:]), strict=True):
            old.index_copy_(0, index, newer.index_select(0, index))
        for row in older:
            known[row] = [now, *known[row]][:kept]
        self.values[0].index_copy_(0, index_of(rows, value.device), value)

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
                chosen = index_of(rows, x.device)
                x.index_add_(0, chosen, value.index_select(0, chosen) * weight)

    def _weights(self, call: Call, rows: Sequence[int]) -> list[float | Tensor]:
        """Of each value, in the sum that stands for it now: numbers where all rows have the same, else (R', 1, 1)."""
        now = self._time(call)
        each = [lagrange(self._times[row], now) for row in rows]
        if all(weights == each[0] for weights in each):
            return list(each[0])
        longest = max(map(len, each))
        padded = torch.tensor([weights + [0.0] * (longest - len(weights)) for weights in each])  # (R', K)
        like = self.values[0]
        return list(padded.to(like.device, like.dtype, non_blocking=True)[:, :, None, None].unbind(1))

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
