"""How samples are read and decoded, in processes beside training: a job in, a batch out.

Shapes: B samples of a micro-batch, F frames, H height, W width.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from data.batch import Batch, Bucket
from data.buckets import Floats, Ints
from data.decode import BadSample, decode_clip
from data.shards import Index, LostShard, read_member
from lingen.config import DataConfig

GREY = 128  # pixels of a hole
# Slurm and Ctrl-C send these to every process of a job; the workers must outlive the step that is saved.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
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
    """The jobs' batches, in the order of the jobs, from ``data.workers`` processes. They end with the iterator."""
    batches = _decode(index, data, jobs)
    _under_way.add(batches)
    return batches


@atexit.register
def _end_workers() -> None:
    """What a crash's traceback still holds: multiprocessing would wait for ever for workers that ignore its SIGTERM."""
    for batches in list(_under_way):
        batches.close()


def _decode(index: Index, data: DataConfig, jobs: Iterator[Job]) -> Batches:
    loader = DataLoader(
        _Decoder(index, data.verify_checksums),
        batch_size=None,
        sampler=jobs,
        num_workers=data.workers,
        prefetch_factor=data.prefetch if data.workers else None,
        worker_init_fn=_start_worker,
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # until each worker ignores them
    try:
        batches = iter(loader)  # starts the workers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from batches


class _Decoder(Dataset[tuple[Batch, list[Hole]]]):
    def __init__(self, index: Index, verify: bool) -> None:
        self.index, self.verify = index, verify

    def __getitem__(self, job: Job) -> tuple[Batch, list[Hole]]:
        count, shape = len(job.rows), job.bucket
        pixels = torch.full((count, 3, shape.frames, shape.height, shape.width), GREY, dtype=torch.uint8)
        valid = torch.zeros(count, dtype=torch.bool)
        captions, holes = [""] * count, []
        keys = [self.index.key[row] if row != PADDING else "" for row in job.rows]
        for n, row in enumerate(job.rows):
            if row == PADDING:
                continue
            try:
                pixels[n] = self._clip(int(row), job, float(job.starts[n]))  # (3, F, H, W)
            except BadSample as bad:
                holes.append(Hole(keys[n], bad.reason, bad.detail))
                continue
            except LostShard as error:
                valid[:] = False
                return Batch(shape, pixels, captions, keys, valid, torch.from_numpy(job.positions), str(error)), []
            captions[n], valid[n] = self.index.caption[row], True
        return Batch(shape, pixels, captions, keys, valid, torch.from_numpy(job.positions)), holes

    def _clip(self, row: int, job: Job, start: float) -> torch.Tensor:
        media = read_member(self.index, row, verify=self.verify)
        shape = job.bucket
        return decode_clip(
            media,
            frames=shape.frames,
            height=shape.height,
            width=shape.width,
            fps=job.fps,
            start=start,
            begin=float(self.index.begin[row]),
            end=float(self.index.end[row]),
        )


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
