"""A loss that can be compared between models, stages and runs: fixed held-out samples, fixed sigmas, fixed noise.

The training loss is confounded by the timestep shift and by the mix of buckets; this one is not. Its random numbers
depend on nothing but the sample's number in the held-out set and the sigma's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from data.batch import Batch
from lingen.config import BucketConfig, StageConfig, ValidationConfig
from lingen.curriculum import bucket_shares
from lingen.dist import Dist
from lingen.errors import UserError
from lingen.flow import generator, interpolate, sample_losses
from lingen.step import Networks, raise_lost

HeldOut = Callable[[BucketConfig], Iterator[Batch]]  # a bucket -> this rank's held-out batches, anew at each call


def fixed_sigmas(config: ValidationConfig) -> torch.Tensor:
    """The centres of ``config.sigmas`` equal parts of (0, 1), rising: (S,)."""
    return (torch.arange(config.sigmas) + 0.5) / config.sigmas


@torch.no_grad()
def bucket_losses(
    networks: Networks, batches: Iterator[Batch], sigmas: torch.Tensor, dist: Dist, stop: Callable[[], bool]
) -> tuple[torch.Tensor, int] | None:
    """The mean loss at each sigma over one bucket's held-out samples, (S,) fp64, and how many of these were valid; the
    same on every rank. None where ``stop``, asked before each batch, said so on some rank."""
    totals = torch.zeros(len(sigmas) + 1, dtype=torch.float64, device=networks.device)  # a sum a sigma, then the count
    for batch in batches:
        seen = torch.tensor([float(batch.lost is not None), float(stop())], device=networks.device)
        dist.all_reduce_sum(seen)
        if seen[0]:
            raise_lost(batch.lost, dist, "nothing was measured")
        if seen[1]:
            return None
        latents = networks.latents(batch)  # (B, C, T, H, W)
        text = networks.read(batch, batch.captions, [])
        valid = dist.agreed(batch.valid).double()  # (B,)
        for i, sigma in enumerate(sigmas.tolist()):
            noise = torch.stack(
                [
                    torch.randn(latents.shape[1:], generator=generator("cpu", "validation", int(n), i))
                    for n in batch.positions
                ]
            ).to(networks.device)
            sigma_each = torch.full((len(latents),), sigma, device=networks.device)
            velocity = networks.velocity(interpolate(latents, noise, sigma_each), sigma_each, text)
            totals[i] += (sample_losses(velocity, latents, noise).double() * valid).sum()
        totals[-1] += valid.sum()
    dist.all_reduce_sum(totals)
    # Ranks that share their samples each counted them, in the losses as in their number.
    return (totals[:-1] / totals[-1]).cpu(), int(totals[-1]) // dist.sequence


def validate(
    networks: Networks,
    stage: StageConfig,
    held_out: HeldOut,
    config: ValidationConfig,
    dist: Dist,
    stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """The validation record of a stage: ``loss`` (mean over the buckets by their share), ``bucket_loss`` and
    ``bin_loss`` (mean over bins of neighbouring sigmas, from the data to the noise); ``valid`` samples a bucket.

    ``stop`` is asked before each batch: where it is true on some rank, nothing was measured (None).

    Raises:
        UserError: not one held-out sample of a bucket can be decoded, or a shard cannot be read.
    """
    sigmas = fixed_sigmas(config)
    losses: dict[str, torch.Tensor] = {}
    valid: dict[str, int] = {}
    for bucket in stage.buckets:
        measured = bucket_losses(networks, held_out(bucket), sigmas, dist, stop)
        if measured is None:
            return None
        losses[str(bucket)], valid[str(bucket)] = measured
    for name, count in valid.items():
        if not count:
            raise UserError(
                f"stage {stage.name}: every held-out sample of bucket {name} is broken; "
                "bad_samples-rank*.jsonl names them"
            )
    shares = torch.tensor(bucket_shares(stage), dtype=torch.float64)  # (buckets,)
    by_sigma = torch.stack([losses[str(bucket)] for bucket in stage.buckets])  # (buckets, S)
    mixed = shares @ by_sigma  # (S,)
    return {
        "loss": mixed.mean().item(),
        "bucket_loss": {name: loss.mean().item() for name, loss in losses.items()},
        "valid": valid,
        "bin_loss": mixed.view(config.bins, -1).mean(1).tolist(),
    }
