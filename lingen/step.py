"""One optimizer step of flow matching, as it is done on every rank.

Shapes: B samples of a micro-batch, F frames, C channels, T x H x W latent positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from data.batch import Batch
from lingen.autoencoders import Autoencoder
from lingen.config import FlowConfig
from lingen.dist import Dist
from lingen.engine import Engine
from lingen.errors import UserError
from lingen.flow import draw, draw_left_out, interpolate, sample_losses
from lingen.models import Backbone
from lingen.text.encoders import TextEncoder
from lingen.text.join import Text, moved


@dataclass(frozen=True)
class Networks:
    """The trained model inside its engine, and the two frozen networks before it."""

    engine: Engine
    model: Backbone  # the same weights without the engine around them: for what only asks about shapes
    autoencoder: Autoencoder
    text: TextEncoder
    device: torch.device
    dtype: torch.dtype  # of the model's activations
    _flops: dict[tuple[int, int, int], int] = field(default_factory=dict, init=False, repr=False)

    @torch.no_grad()
    def latents(self, batch: Batch) -> torch.Tensor:
        """A batch's latents (B, C, T, H, W) fp32: as they were stored, or encoded from its pixels."""
        if batch.latents is not None:
            return batch.latents.to(self.device).float()
        return self.autoencoder.encode(batch.pixels.to(self.device))

    def read(self, batch: Batch, captions: list[str], left_out: list[set[str]]) -> Text:
        """The states of a batch's captions, some of which may have become empty: stored ones, or encoded now."""
        return self.text.encode(captions, left_out, batch.states.rows() if batch.states else None)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        """The model's velocity at ``x`` (B, C, T, H, W) and ``sigma`` (B,), in fp32."""
        states, mask = moved(text, self.device, self.dtype)
        velocity: torch.Tensor = self.engine.model(x.to(self.dtype), sigma, states, mask)
        return velocity.float()

    def forward_flops(self, grid: tuple[int, int, int]) -> int:
        """FLOPs of the model's forward for one sample of ``grid`` = (T, H, W) tokens."""
        if grid not in self._flops:  # counted layer by layer, which takes half a millisecond
            self._flops[grid] = int(self.model.flops(grid, self.text.lengths))
        return self._flops[grid]


@dataclass(frozen=True)
class StepResult:
    """What one step measured, over all ranks; the same on every rank."""

    loss: float  # mean over the valid samples; NaN where there are none
    grad_norm: float  # before clipping
    valid: int  # samples that were not holes
    votes: list[float]  # the sums of what the ranks' ``votes`` gave
    refused: str | None  # why the weights were left as they were


def train_step(
    networks: Networks,
    batches: list[Batch],
    *,
    lr: float,
    seed: int,
    samples_seen: int,
    shift: float,
    flow: FlowConfig,
    dist: Dist,
    votes: Callable[[], Sequence[float]],
    refuse: Callable[[float, float], str | None],
    lost: str | None,
) -> StepResult:
    """Noise, predict, backward over this rank's micro-batches, then one step.

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
    loss_sum = torch.zeros((), device=device)
    for batch, mask in zip(batches, masks, strict=True):
        losses = batch_losses(networks, batch, seed=seed, samples_seen=samples_seen, shift=shift, flow=flow)  # (B,)
        loss = (losses * mask).sum() / valid_total.clamp(min=1)
        networks.engine.backward(loss)
        loss_sum += loss.detach()
    seen = torch.tensor([0.0, *votes()], device=device)
    seen[0] = loss_sum
    dist.all_reduce_sum(seen)
    mean, *sums = seen.tolist()
    if not valid:
        return StepResult(math.nan, networks.engine.step(lr, lambda norm: True), 0, sums, None)
    grad_norm, refused = guarded_step(networks.engine, lr, lambda norm: refuse(mean, norm), dist)
    return StepResult(mean, grad_norm, valid, sums, refused)


def batch_losses(
    networks: Networks, batch: Batch, *, seed: int, samples_seen: int, shift: float, flow: FlowConfig
) -> torch.Tensor:
    """The loss (B,) of each sample of a micro-batch, holes included, with the graph behind it."""
    latents = networks.latents(batch)  # (B, C, T, H, W)
    drawn = draw(
        batch.positions.tolist(),
        tuple(latents.shape[1:]),  # type: ignore[arg-type]
        seed=seed,
        samples_seen=samples_seen,
        shift=shift,
        flow=flow,
        device=networks.device,
    )
    captions = ["" if drop else text for text, drop in zip(batch.captions, drawn.drop_caption, strict=True)]
    left_out = draw_left_out(batch.positions.tolist(), networks.text.dropout, seed=seed, samples_seen=samples_seen)
    x = interpolate(latents, drawn.noise, drawn.sigma)
    velocity = networks.velocity(x, drawn.sigma, networks.read(batch, captions, left_out))
    return sample_losses(velocity, latents, drawn.noise)


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
