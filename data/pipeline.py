"""The resumable loader: which samples a step trains on, and how they reach this rank.

Each bucket has its samples (``data.buckets.assign``), and their order is a pure function. Of a bucket's stream,
global sample number g is sample g % M of epoch g // M, M being the bucket's samples. A step takes the next
G = batch_size numbers of one bucket; rank r of W takes the r-th of W equal parts of them, cut into micro-batches. So
the whole state is how many samples of each bucket were consumed: ranks, workers and restarts change who decodes a
sample, never which samples a step sees.

Shapes: B samples of a micro-batch, F frames, H height, W width; M samples of a bucket, N of the index.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data.batch import Batch, Bucket
from data.buckets import (
    Ints,
    assign,
    bucket_of_step,
    epoch_order,
    split,
    starts,
    stream_seed,
)
from data.counts import why_empty
from data.latents import refuse_other_buckets
from data.shards import Index
from data.workers import PADDING, Hole, Job, decode, sample_bytes
from lingen.config import BucketConfig, DataConfig, StageConfig
from lingen.errors import LocalError, UserError
from lingen.stage_config import multiple_hint


@dataclass(frozen=True)
class Position:
    """Where a stage stands: its steps, and for each bucket (by its name, such as "17x64x64") the samples consumed.

    ``skipped`` of these, over all buckets, were left out by a rollback: no step of the stage counts them.
    """

    step: int = 0
    consumed: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0

    @property
    def counted(self) -> int:
        """The samples of the stage's steps so far."""
        return sum(self.consumed.values()) - self.skipped

    def as_dict(self) -> dict[str, Any]:
        return {"step": self.step, "consumed": dict(self.consumed), "skipped": self.skipped}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Position:
        consumed = {str(key): int(count) for key, count in state["consumed"].items()}
        return cls(int(state["step"]), consumed, int(state["skipped"]))

    def after(self, bucket: BucketConfig) -> Position:
        """The position when a step of this bucket is done."""
        name = str(bucket)
        consumed = {**self.consumed, name: self.consumed.get(name, 0) + bucket.batch_size}
        return Position(self.step + 1, consumed, self.skipped)

    def past(self, later: Position) -> Position:
        """This position's steps again, on the data after ``later``: where a rollback goes on."""
        left_out = sum(later.consumed.values()) - sum(self.consumed.values())
        return Position(self.step, later.consumed, self.skipped + left_out)


class StageLoader:
    """The batches of one stage for one rank, from a position on.

    Iterating gives one list per optimizer step: ``grad_accumulation`` micro-batches of one bucket. It ends when the
    stage's samples are consumed, but for those skipped. ``position`` stands after the steps handed out so far, ``bad``
    counts this rank's holes by reason since it started; whether they are too many is for the loop to say, which knows
    all ranks'. ``lost`` names the shard that the step handed out last could not read, and why; else it is None.

    Args:
        bad_log: every hole is appended to this JSONL file, with the rank put into its name; None writes no log.

    Raises:
        UserError: a bucket is empty, or its batch_size is not a multiple of world * grad_accumulation.
    """

    def __init__(
        self,
        index: Index,
        stage: StageConfig,
        data: DataConfig,
        *,
        seed: int,
        rank: int,
        world: int,
        grad_accumulation: int,
        position: Position | None = None,
        bad_log: Path | None = None,
    ) -> None:
        self.index, self.stage, self.data = index, stage, data
        self.rank, self.world, self.grad_accumulation = rank, world, grad_accumulation
        self.position = position or Position()
        self.bad: Counter[str] = Counter()
        self.lost: str | None = None
        self._bad_log = bad_log
        for bucket in stage.buckets:
            if bucket.batch_size % (world * grad_accumulation):
                raise UserError(
                    f"stage {stage.name}: bucket {bucket} has batch_size={bucket.batch_size}, which is not a multiple "
                    f"of {world} ranks * engine.grad_accumulation={grad_accumulation}"
                    f"{multiple_hint(stage, world * grad_accumulation)}"
                )
        refuse_other_buckets(index, [stage])
        train, _ = split(index, data.holdout_share)
        assigned = assign(index, stage, data).rows
        self._streams = []
        for bucket in stage.buckets:
            rows = assigned[str(bucket)]
            members = rows[train[rows]]  # (M,)
            if not len(members):
                why = why_empty(index, stage, bucket, data)
                raise UserError(f"stage {stage.name}: bucket {bucket} is empty: {why}")
            self._streams.append(_Stream(index, bucket, members, stage, data, seed))
        _check_memory(index, stage, data, world * grad_accumulation)

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = decode(self.index, self.data, self._jobs())
        for stream, _ in self._steps():
            micro_batches = []
            for _ in range(self.grad_accumulation):
                batch, holes = next(batches)
                self.bad.update(hole.reason for hole in holes)
                log_holes(self._bad_log, self.rank, self.position.step, holes)
                micro_batches.append(batch)
            self.lost = next((batch.lost for batch in micro_batches if batch.lost), None)
            self.position = self.position.after(stream.bucket)
            yield micro_batches

    def _steps(self) -> Iterator[tuple[_Stream, int]]:
        """For each step from the position to the stage's end: its stream, and the first sample number it takes."""
        position, shares = self.position, [bucket.share for bucket in self.stage.buckets]
        while position.counted < self.stage.samples:
            stream = self._streams[bucket_of_step(shares, position.step)]
            yield stream, position.consumed.get(str(stream.bucket), 0)
            position = position.after(stream.bucket)

    def _jobs(self) -> Iterator[Job]:
        """This rank's micro-batches, in order; the workers run ahead of the steps handed out."""
        for stream, first in self._steps():
            for places in rank_slices(stream.bucket.batch_size, self.rank, self.world, self.grad_accumulation):
                yield stream.job(first, places)


def log_holes(bad_log: Path | None, rank: int, step: int | None, holes: list[Hole]) -> None:
    """Name the holes in this rank's JSONL file; ``step`` is the stage's, None for held-out samples.

    Raises:
        LocalError: it cannot be written.
    """
    if holes and bad_log:
        own = bad_log.with_stem(f"{bad_log.stem}-rank{rank}")
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
            with own.open("a") as log:
                log.writelines(json.dumps({"step": step, **vars(hole)}) + "\n" for hole in holes)
        except OSError as error:
            raise LocalError(f"{own} cannot be written ({error.strerror}): mend it, then run again") from error


def rank_slices(batch_size: int, rank: int, world: int, grad_accumulation: int) -> list[Ints]:
    """The positions in the global batch of each of a rank's micro-batches."""
    part = np.arange(batch_size, dtype=np.int64).reshape(world, grad_accumulation, -1)
    return list(part[rank])


class _Stream:
    """The endless sequence of samples of one bucket, epoch after epoch."""

    def __init__(
        self, index: Index, bucket: BucketConfig, members: Ints, stage: StageConfig, data: DataConfig, seed: int
    ) -> None:
        self.bucket, self.fps = bucket, stage.fps
        self.shape = shape_of(bucket)
        self.members = members  # (M,)
        self._shards, self._window = index.shard, data.window_shards
        self._seed = stream_seed(seed, stage.name, str(bucket))
        self._orders: dict[int, Ints] = {}  # epoch -> (M,); the two that a batch may span

    def job(self, first: int, positions: Ints) -> Job:
        """The samples at ``positions`` of the global batch that begins with number ``first``."""
        numbers = first + positions  # (B,)
        epochs, offsets = np.divmod(numbers, len(self.members))
        rows = np.array([self._order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)], dtype=np.int64)
        return Job(self.shape, self.fps, rows, starts(self._seed, numbers), positions)

    def _order(self, epoch: int) -> Ints:
        if epoch not in self._orders:
            order = epoch_order(self.members, self._shards, seed=self._seed, epoch=epoch, window_shards=self._window)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
        return self._orders[epoch]


def shape_of(bucket: BucketConfig) -> Bucket:
    """What a batch knows of a configured bucket."""
    return Bucket(bucket.frames, bucket.height, bucket.width)


def holdout_batches(
    index: Index,
    stage: StageConfig,
    bucket: BucketConfig,
    data: DataConfig,
    *,
    limit: int,
    batch_size: int,
    rank: int,
    world: int,
    bad_log: Path | None = None,
) -> Iterator[Batch]:
    """The fixed validation set of one of the stage's buckets: its first ``limit`` held-out samples by the hash of their
    key, in that order.

    The window lies in the middle of each clip. ``positions`` are the places in the set; rank r has r, r + W, r + 2W ...
    Every rank gets equally many and equally large batches: where the set does not divide, holes fill it up (their
    positions go on after the set's last), so that collective calls stay in step; a lost batch does not end it either,
    and who validates must look at ``Batch.lost``. Empty where nothing is held out.
    """
    _, holdout = split(index, data.holdout_share)
    shape, rows = shape_of(bucket), assign(index, stage, data).rows[str(bucket)]
    rows = rows[holdout[rows]]  # (M,)
    rows = rows[np.argsort(index.key_hash[rows], kind="stable")][:limit]
    rows = np.concatenate([rows, np.full(-len(rows) % world, PADDING)])[rank::world]
    jobs = (
        Job(shape, stage.fps, part, np.full(len(part), 0.5), rank + world * np.arange(at, at + len(part)))
        for at in range(0, len(rows), batch_size)
        for part in [rows[at : at + batch_size]]
    )
    for batch, holes in decode(index, data, jobs):
        log_holes(bad_log, rank, None, holes)
        yield batch


def _check_memory(index: Index, stage: StageConfig, data: DataConfig, parts: int) -> None:
    """Refuse what would end in a killed process: the workers' batches wait in memory."""
    largest = max(b.batch_size // parts * sample_bytes(index, shape_of(b)) for b in stage.buckets)
    needed, free = largest * data.workers * data.prefetch, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"data.workers={data.workers} * data.prefetch={data.prefetch} micro-batches of {largest >> 20} MiB do not "
            f"fit into memory ({free >> 20} MiB free): lower data.prefetch or data.workers"
        )
