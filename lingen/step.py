"""One optimizer step, as it is done on every rank; what its losses are, a ``Trainee`` knows.

Shapes: B samples of a micro-batch, M numbers a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from data.batch import Batch
from lingen.config import StageConfig
from lingen.dist import Dist
from lingen.engine import Engine
from lingen.errors import UserError


class Trainee(Protocol):
    """A model in its engine, and what a batch costs it."""

    @property
    def engine(self) -> Engine:
        """Who takes the steps."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the losses are."""
        ...

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of what ``losses`` gives beside the loss."""
        ...

    def losses(self, batch: Batch, stage: StageConfig, samples_seen: int) -> torch.Tensor:
        """(1 + terms, B): of each sample, holes included, the loss, with the graph behind it, and what is recorded
        beside it. Its random numbers come from the seed, ``samples_seen`` and the positions in the batch."""
        ...

    def measure(self, batch: Batch) -> torch.Tensor:
        """(M, B): what validation takes the mean of; nothing random in it but what is the same each time."""
        ...

    def summary(self, measured: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, Any]:
        """The record of a validation, with its ``loss`` and ``bucket_loss``.

        Args:
            measured: by bucket, the mean of ``measure`` over its held-out samples, (M,) fp64.
            shares: (buckets,) fp64, of the stage's steps.
        """
        ...


@dataclass(frozen=True)
class StepResult:
    """What one step measured, over all ranks; the same on every rank."""

    loss: float  # mean over the valid samples; NaN where there are none
    terms: dict[str, float]  # the same of what the trainee records beside it
    grad_norm: float  # before clipping
    valid: int  # samples that were not holes
    votes: list[float]  # the sums of what the ranks' ``votes`` gave
    refused: str | None  # why the weights were left as they were


def train_step(
    networks: Trainee,
    batches: list[Batch],
    *,
    lr: float,
    stage: StageConfig,
    samples_seen: int,
    dist: Dist,
    votes: Callable[[], Sequence[float]],
    refuse: Callable[[float, float], str | None],
    lost: str | None,
) -> StepResult:
    """Losses and their backward over this rank's micro-batches, then one step.

    Ranks that share their samples (``dist.sequence``) all have the same batches and the whole loss. So a sample counts
    as often as ranks share it, in the losses as in the number that divides them; and it is a hole for all of them where
    it is one for any, since a read may fail on one rank alone.

    Holes count neither in the loss nor in its mean, so the mean is over the valid samples of the global batch. Where
    all are holes, the loss is NaN, nothing changes, and that is no failure.

    Args:
        votes: this rank's numbers to be summed over the ranks; asked when the losses are known, and as many on each.
        refuse: (loss, gradient norm) -> why the step is to be left out, or None. It has a reason against whatever is
            not finite. What any rank refuses, all leave out.
        lost: what this rank could not read (``StageLoader.lost``).

    Raises:
        UserError: a rank could not read its samples. On all ranks, before anything was changed.
    """
    device = networks.device
    masks = [dist.agreed(batch.valid) for batch in batches]  # (B,) bool each
    counts = torch.tensor([float(sum(int(mask.sum()) for mask in masks)), float(lost is not None)], device=device)
    dist.all_reduce_sum(counts)
    if counts[1]:
        raise_lost(lost, dist, "nothing of this step was taken")
    valid_total, valid = counts[0], int(counts[0]) // dist.sequence
    sums = torch.zeros(1 + len(networks.terms), device=device)
    for batch, mask in zip(batches, masks, strict=True):
        found = networks.losses(batch, stage, samples_seen)  # (1 + terms, B)
        loss = (found[0] * mask).sum() / valid_total.clamp(min=1)
        networks.engine.backward(loss)
        sums[0] += loss.detach()
        if networks.terms:
            sums[1:] += (found[1:].detach() * mask).sum(1) / valid_total.clamp(min=1)
    seen = torch.tensor([0.0] * len(sums) + [*votes()], device=device)
    seen[: len(sums)] = sums
    dist.all_reduce_sum(seen)
    mean, *rest = seen.tolist()
    voted = rest[len(networks.terms) :]
    terms = dict(zip(networks.terms, rest, strict=False))
    if not valid:
        nothing = dict.fromkeys(networks.terms, math.nan)
        return StepResult(math.nan, nothing, networks.engine.step(lr, lambda norm: True), 0, voted, None)
    grad_norm, refused = guarded_step(networks.engine, lr, lambda norm: refuse(mean, norm), dist)
    return StepResult(mean, terms, grad_norm, valid, voted, refused)


def guarded_step(
    engine: Engine, lr: float, refuse: Callable[[float], str | None], dist: Dist
) -> tuple[float, str | None]:
    """Step, unless some rank has a reason against this gradient norm. Returns the norm and the reason, or None."""
    reason: str | None = None

    def is_refused(norm: float) -> bool:
        nonlocal reason
        reason = refuse(norm)
        if dist.any(reason is not None):
            reason = reason or "another rank refused it"
        return reason is not None

    norm = engine.step(lr, is_refused)
    return norm, reason if math.isfinite(norm) else refuse(norm)  # which the engine leaves out without asking


def step_keys(batches: list[Batch], dist: Dist) -> list[str]:
    """The keys of the global batch in its order, from every rank's micro-batches. Collective."""
    own = [(int(at), key) for batch in batches for at, key in zip(batch.positions, batch.keys, strict=True)]
    placed = {at: key for part in dist.gather(own) for at, key in part}  # ranks that share samples have the same
    return [placed[at] for at in sorted(placed)]


def raise_lost(lost: str | None, dist: Dist, consequence: str) -> NoReturn:
    """Raises:
    UserError: always, on all ranks, with what the first of those that lost something could not read.
    """
    first = next(problem for problem in dist.gather(lost) if problem is not None)
    raise UserError(f"{first}; {consequence}; restore it and run again")
