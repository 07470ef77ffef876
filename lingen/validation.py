"""A loss that can be compared between models, stages and runs: fixed held-out samples, fixed sigmas, fixed noise.

The training loss is confounded by the timestep shift and by the mix of buckets; this one is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from data.batch import Batch
from lingen.config import BucketConfig, StageConfig
from lingen.curriculum import bucket_shares
from lingen.dist import Dist
from lingen.errors import UserError
from lingen.step import Trainee, raise_lost

HeldOut = Callable[[BucketConfig], Iterator[Batch]]  # a bucket -> this rank's held-out batches, anew at each call


@torch.no_grad()
def bucket_means(
    networks: Trainee, batches: Iterator[Batch], dist: Dist, stop: Callable[[], bool]
) -> tuple[torch.Tensor, int] | None:
    """The mean of ``Trainee.measure`` over one bucket's held-out samples, (M,) fp64, and how many of these were valid;
    the same on every rank. None where ``stop``, asked before each batch, said so on some rank."""
    totals = torch.zeros(1, dtype=torch.float64, device=networks.device)  # the count, then a sum for each number
    for batch in batches:
        seen = torch.tensor([float(batch.lost is not None), float(stop())], device=networks.device)
        dist.all_reduce_sum(seen)
        if seen[0]:
            raise_lost(batch.lost, dist, "nothing was measured")
        if seen[1]:
            return None
        measured = networks.measure(batch)  # (M, B)
        valid = dist.agreed(batch.valid).double()  # (B,)
        sums = torch.stack([valid.sum(), *((row.double() * valid).sum() for row in measured)])
        totals = totals + sums
    dist.all_reduce_sum(totals)
    # Ranks that share their samples each counted them, in the losses as in their number.
    return (totals[1:] / totals[0]).cpu(), int(totals[0]) // dist.sequence


def validate(
    networks: Trainee,
    stage: StageConfig,
    held_out: HeldOut,
    dist: Dist,
    stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """The validation record of a stage: what ``Trainee.summary`` makes of it, and the ``valid`` samples a bucket.

    ``stop`` is asked before each batch: where it is true on some rank, nothing was measured (None).

    Raises:
        UserError: not one held-out sample of a bucket can be decoded, or a shard cannot be read.
    """
    means: dict[str, torch.Tensor] = {}
    valid: dict[str, int] = {}
    for bucket in stage.buckets:
        measured = bucket_means(networks, held_out(bucket), dist, stop)
        if measured is None:
            return None
        means[str(bucket)], valid[str(bucket)] = measured
    for name, count in valid.items():
        if not count:
            raise UserError(
                f"stage {stage.name}: every held-out sample of bucket {name} is broken; "
                "bad_samples-rank*.jsonl names them"
            )
    shares = torch.tensor(bucket_shares(stage), dtype=torch.float64)  # (buckets,)
    return networks.summary(means, shares) | {"valid": valid}
