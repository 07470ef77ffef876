"""How samples are read and decoded, in processes beside training: a job in, a batch out.

Shapes: B samples of a micro-batch, F frames, H height, W width.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from weakref import WeakSet

import numpy as np
import torch

from data.batch import Batch, Bucket, States
from data.blocks import SPARE, Block, Blocks
from data.buckets import Floats, Ints
from data.decode import decode_into
from data.keeper import Keeper, Outcome, WorkerError, make
from data.latents import Layout, read_into
from data.shards import Index, LostShard, read_member
from data.shelf import ReadAhead, Shelf
from lingen.config import DataConfig
from lingen.errors import UserError

GREY = 128  # pixels of a hole
PADDING = -1  # in the place of a row: a hole that fills up a batch


@dataclass(frozen=True)
class Job:
    """One micro-batch to decode."""

    bucket: Bucket
    fps: float
    rows: Ints  # (B,) of the index
    starts: Floats  # (B,) where each clip's window lies
    positions: Ints  # (B,) in the global batch


@dataclass(frozen=True)
class Hole:
    """A sample that could not be used, and why."""

    key: str
    reason: str
    detail: str


Batches = Generator[tuple[Batch, list[Hole]], None, None]
_under_way: WeakSet[Batches] = WeakSet()


def decode(index: Index, data: DataConfig, jobs: Iterator[Job]) -> Iterator[tuple[Batch, list[Hole]]]:
    """The jobs' batches, in the order of the jobs, from ``data.workers`` processes. They end with the iterator.

    Without workers a decoder that crashes ends this process.

    Raises:
        UserError: the shards are remote, and ``data.cache_gb`` is less than two windows of them.
    """
    if index.shelf:
        shelf = index.shelf.moved(data.cache_dir, data.cache_gb, data.window_shards)
        batches = _reading_ahead(replace(index, shelf=shelf), shelf, data, jobs)
    else:
        batches = _decode(index, data, jobs)
    _under_way.add(batches)
    return batches


@atexit.register
def _end_workers() -> None:
    """What a crash's traceback still holds: multiprocessing would wait for ever for those that ignore its SIGTERM."""
    for batches in list(_under_way):
        batches.close()


def _decode(index: Index, data: DataConfig, jobs: Iterator[Job]) -> Batches:
    return _with_workers(index, data, jobs) if data.workers else _without_workers(index, data, jobs)


def _reading_ahead(index: Index, shelf: Shelf, data: DataConfig, jobs: Iterator[Job]) -> Batches:
    """While a window's shards are read, the next window's are fetched; more where buckets are in windows of their own,
    and the cache has room."""
    ahead, window = ReadAhead(shelf), data.window_shards
    distance = max(2 * window, min(4 * window, shelf.room * 3 // 4))
    try:
        yield from _decode(index, data, ahead.before(jobs, partial(_shards, index), distance))
    finally:
        ahead.close()


def _shards(index: Index, job: Job) -> set[int]:
    """Those that a job's samples are in."""
    return {int(n) for n in index.shard[job.rows[job.rows != PADDING]]}


def _without_workers(index: Index, data: DataConfig, jobs: Iterator[Job]) -> Batches:
    work = partial(_work_on(index), index, data)
    for job in jobs:
        memory = torch.empty(_bytes(index, job), dtype=torch.uint8)
        outcomes: dict[int, Outcome] = {}
        lost = None
        for n in _places(job):
            outcome = make(work, job, n, memory)
            if isinstance(outcome, LostShard):
                lost = outcome
                break
            if isinstance(outcome, UserError | WorkerError):
                raise outcome
            outcomes[n] = outcome
        yield _batch(index, job, memory, lost or outcomes)


def _with_workers(index: Index, data: DataConfig, jobs: Iterator[Job]) -> Batches:
    """Job n goes to keeper n modulo their number; each has ``data.prefetch`` jobs ahead."""
    work, blocks, room = partial(_work_on(index), index, data), Blocks(), data.workers * data.prefetch + 2 * SPARE
    keepers = [Keeper(work, data.worker_memory_mb, room) for _ in range(data.workers)]
    waiting: deque[tuple[Keeper[Job], Job, Block]] = deque()

    def send(keeper: Keeper[Job], job: Job) -> None:
        block = blocks.take(_bytes(index, job))
        waiting.append((keeper, job, block))
        keeper.send(job, _places(job), block, _bytes(index, job))

    try:
        for keeper, job in zip(keepers * data.prefetch, jobs, strict=False):
            send(keeper, job)
        while waiting:
            keeper, job, block = waiting[0]
            outcomes: dict[int, Outcome] | LostShard
            try:
                outcomes = keeper.receive()
            except LostShard as error:
                outcomes = error
            waiting.popleft()
            following = next(jobs, None)
            if following is not None:
                send(keeper, following)
            yield _batch(index, job, blocks.lend(block, _bytes(index, job)), outcomes)
    finally:
        for keeper in keepers:
            keeper.close()
        for _, _, block in waiting:
            block.drop()
        blocks.close()


def _places(job: Job) -> list[int]:
    """The samples to make."""
    return [int(n) for n in np.flatnonzero(job.rows != PADDING)]


def _bytes(index: Index, job: Job) -> int:
    """Of a job's samples."""
    return len(job.rows) * sample_bytes(index, job.bucket)


def sample_bytes(index: Index, shape: Bucket) -> int:
    """What one sample takes in memory."""
    return Layout(index.latents, shape).bytes if index.latents else 3 * shape.frames * shape.height * shape.width


def _work_on(index: Index) -> Callable[[Index, DataConfig, Job, int, torch.Tensor], None]:
    """How to make a sample."""
    return partial(_read_sample, cache(partial(Layout, index.latents))) if index.latents else _decode_sample


def _read_sample(
    layout: Callable[[Bucket], Layout], index: Index, data: DataConfig, job: Job, n: int, memory: torch.Tensor
) -> None:
    """As ``_decode_sample``, from latents."""
    read_into(memory, n, index, int(job.rows[n]), layout(job.bucket), verify=data.verify_checksums)


def _decode_sample(index: Index, data: DataConfig, job: Job, n: int, pixels: torch.Tensor) -> None:
    """Fill in the n-th of the job's samples. ``pixels`` has ``_bytes(index, job)`` of them.

    Raises:
        BadSample: it cannot be used.
        LostShard: its shard cannot be read.
    """
    row, shape = int(job.rows[n]), job.bucket
    clips = pixels.view(len(job.rows), 3, shape.frames, shape.height, shape.width)
    decode_into(
        clips[n],
        read_member(index, row, verify=data.verify_checksums),
        fps=job.fps,
        start=float(job.starts[n]),
        begin=float(index.begin[row]),
        end=float(index.end[row]),
        decoder=data.decoder,
    )


def _batch(
    index: Index, job: Job, memory: torch.Tensor, outcomes: dict[int, Outcome] | LostShard
) -> tuple[Batch, list[Hole]]:
    """The batch, with its holes greyed; ``outcomes`` may be the error that lost all of it."""
    count = len(job.rows)
    keys = [index.key[row] if row != PADDING else "" for row in job.rows]
    captions, holes = [""] * count, []
    valid, positions = torch.zeros(count, dtype=torch.bool), torch.from_numpy(job.positions)
    lost = str(outcomes) if isinstance(outcomes, LostShard) else None
    for n, outcome in {} if isinstance(outcomes, LostShard) else outcomes.items():
        if outcome is None:
            captions[n], valid[n] = index.caption[job.rows[n]], True
        else:
            holes.append(Hole(keys[n], outcome.reason, outcome.detail))
    pixels, latents, states = _content(index, job, memory, valid)
    return Batch(job.bucket, pixels, captions, keys, valid, positions, lost, latents, states), holes


def _content(
    index: Index, job: Job, memory: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, States | None]:
    """The pixels, the latents and the states of a batch, in its memory; holes are emptied."""
    count, shape = len(job.rows), job.bucket
    holes = torch.nonzero(~valid).flatten().tolist()  # what is no hole is not touched here
    if index.latents is None:
        pixels = memory.view(count, 3, shape.frames, shape.height, shape.width)
        for n in holes:
            pixels[n] = GREY
        return pixels, None, None
    layout = Layout(index.latents, shape)
    for n in holes:
        layout.clear(memory, n)
    none = torch.empty(count, 3, 0, shape.height, shape.width, dtype=torch.uint8)
    return none, *layout.read(memory)
