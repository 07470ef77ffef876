"""What is to be made: for each bucket of the stages, which windows of which clips, cut into shards.

A *unit* is the content of one shard, of one bucket. Units are a pure function of the index and the configuration, so
whoever makes one makes the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data.buckets import Floats, Ints, assign, split
from data.counts import why_empty
from data.index_file import LatentBucket
from data.pipeline import shape_of
from data.shards import Index
from data.workers import Job
from lingen.config import BucketConfig, DataConfig, StageConfig
from lingen.errors import UserError


@dataclass(frozen=True)
class Unit:
    """Windows of clips for one shard; n of them."""

    number: int  # of the shard
    place: int  # of the bucket among all
    bucket: BucketConfig
    fps: float
    rows: Ints  # (n,) of the index
    starts: Floats  # (n,) in [0, 1), where each window lies
    windows: Ints  # (n,) which of its clip's it is

    def jobs(self, size: int) -> Iterator[Job]:
        """The windows to decode, ``size`` at a time; their positions are those in the unit."""
        for at in range(0, len(self.rows), size):
            part = slice(at, at + size)
            positions = np.arange(len(self.rows), dtype=np.int64)[part]
            yield Job(shape_of(self.bucket), self.fps, self.rows[part], self.starts[part], positions)

    def key(self, index: Index, n: int) -> str:
        """Of the unit's n-th sample. What is before the first @ decides whether a sample is held out."""
        return f"{index.key[self.rows[n]]}@{self.bucket}-{self.place}-{self.windows[n]}"

    def window(self, index: Index, n: int) -> tuple[float, float]:
        """[begin, end) in seconds after the source's first frame; twice 0 for an image."""
        row = self.rows[n]
        if index.frames[row] == 1:
            return 0.0, 0.0
        slack = _slack(index, self.rows[n : n + 1], self.bucket, self.fps)[0]
        begin = float(index.begin[row] + self.starts[n] * slack)
        return begin, begin + _needed(self.bucket, self.fps) + 1 / float(index.fps[row])

    def source(self, index: Index, n: int) -> tuple[float, int, int]:
        """Seconds, height and width of the whole clip."""
        seconds, height, width = (column[self.rows[n]] for column in index.footage)
        return float(seconds), int(height), int(width)


def buckets_of(stages: Iterable[StageConfig]) -> dict[LatentBucket, tuple[BucketConfig, float]]:
    """The stages' buckets, each once, with the rate to decode at. Images have none, so any stage's will do."""
    found: dict[LatentBucket, tuple[BucketConfig, float]] = {}
    for stage in stages:
        for bucket in stage.buckets:
            rate = 0.0 if bucket.frames == 1 else stage.fps
            one = LatentBucket(frames=bucket.frames, height=bucket.height, width=bucket.width, fps=rate)
            found.setdefault(one, (bucket, stage.fps))
    return found


def make_units(
    index: Index, stages: Iterable[StageConfig], data: DataConfig, *, windows: int, samples_per_shard: int
) -> list[Unit]:
    """The units of all buckets, bucket after bucket: of each the clips that some stage draws for it.

    A clip has ``windows`` windows, evenly spread; fewer where it is so short that two would be the same. A held-out
    clip has one, in its middle: what a validation from pixels sees.

    Raises:
        UserError: a stage has no sample for one of its buckets.
    """
    stages = list(stages)
    _, holdout = split(index, data.holdout_share)
    drawn = _drawn(index, stages, data)
    units: list[Unit] = []
    for place, (shape, (bucket, fps)) in enumerate(buckets_of(stages).items()):
        rows = drawn[shape]
        moves = np.floor(_slack(index, rows, bucket, fps) * index.fps[rows] + 1e-6)  # by a frame of the source
        counts = np.where(holdout[rows], 1, np.minimum(windows, 1 + moves)).astype(np.int64)  # (M,)
        number = np.concatenate([np.full(int((counts > k).sum()), k) for k in range(int(counts.max()))])
        chosen = np.concatenate([np.flatnonzero(counts > k) for k in range(int(counts.max()))])
        starts = (number + 0.5) / counts[chosen]
        for at in range(0, len(chosen), samples_per_shard):
            part = slice(at, at + samples_per_shard)
            units.append(Unit(len(units), place, bucket, fps, rows[chosen[part]], starts[part], number[part]))
    return units


def _drawn(index: Index, stages: list[StageConfig], data: DataConfig) -> dict[LatentBucket, Ints]:
    """The rows of each bucket: those of any stage, since a stage with other buckets beside it draws others."""
    drawn: dict[LatentBucket, Ints] = {}
    for stage in stages:
        assigned = assign(index, stage, data)
        for shape, (bucket, fps) in buckets_of([stage]).items():
            rows = assigned.rows[str(bucket)]
            if not len(rows):
                why = why_empty(index, stage, bucket, data)
                raise UserError(f"stage {stage.name}: bucket {bucket} at fps={fps:g} is empty: {why}")
            drawn[shape] = np.union1d(drawn.get(shape, rows), rows)
    return drawn


def _slack(index: Index, rows: Ints, bucket: BucketConfig, fps: float) -> Floats:
    """How far a window can be moved in each clip, in seconds; 0 for an image."""
    rate = np.where(index.frames[rows] == 1, 1.0, index.fps[rows])
    slack: Floats = np.maximum((index.frames[rows] - 1) / rate - _needed(bucket, fps), 0.0)
    return slack


def _needed(bucket: BucketConfig, fps: float) -> float:
    return (bucket.frames - 1) / fps
