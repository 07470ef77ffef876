"""The exact position: resumed anywhere, by anybody, a stage sees the samples that it would have seen, at no cost.

No clip is decoded here: a sample's pixels tell its row and where its window lies.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.buckets import assign, bucket_of_step, epoch_order, split, starts, stream_seed
from data.pipeline import Position, StageLoader
from data.shards import Index
from lingen.config import BucketConfig, DataConfig, StageConfig
from tests.conftest import ENVIRONMENT, ROOT

SEED, STEPS = 11, 120
SIZE = 16  # bytes of a member
BUCKETS = [
    BucketConfig(frames=1, height=8, width=8, batch_size=24, share=3),
    BucketConfig(frames=9, height=8, width=8, batch_size=12, share=1.5),
    BucketConfig(frames=17, height=8, width=8, batch_size=36, share=1),
]
STAGE = StageConfig(name="stage", buckets=BUCKETS, samples=10**12, lr=1e-3, fps=8)
WAYS = [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (4, 1), (4, 3), (6, 2)]  # (world, grad_accumulation)
Step = tuple[str, list[tuple[int, float]]]  # a global batch: its bucket, and (row, start) of each place


def make_index(folder: Path, count: int) -> Index:
    """As many images as clips of 9 and of 17 frames, 32 a shard; the members are zeros."""
    rows = np.arange(count)
    shards = [f"shard-{n:06d}.tar" for n in range(rows[-1] // 32 + 1)]
    for name in shards:
        with (folder / name).open("wb") as file:
            file.truncate(32 * SIZE)
    frames = np.array([1, 9, 17])[rows % 3]
    return Index(
        path=folder, shards=shards, key=[f"k{n}" for n in rows], caption=[""] * count, frames=frames,
        fps=np.where(frames > 1, 8.0, 0.0), height=np.full(count, 8), width=np.full(count, 8),
        bytes=np.full(count, SIZE), shard=rows // 32, offset=rows % 32 * SIZE, sha256=[""] * count, fingerprint="f",
        begin=np.zeros(count), end=np.zeros(count), root=folder,
    )  # fmt: skip


def data_config(workers: int = 0) -> DataConfig:
    return DataConfig(path="unused", workers=workers, prefetch=2, window_shards=2, verify_checksums=False)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forks, so they have it too."""

    def tell(_: Index, i: int, *, verify: bool = True) -> bytes:
        return struct.pack("<q", i)

    def show(clip: torch.Tensor, media: bytes, *, start: float, **_: object) -> None:
        clip.zero_().view(-1)[:16] = torch.frombuffer(bytearray(media + struct.pack("<d", start)), dtype=torch.uint8)

    monkeypatch.setattr("data.workers.read_member", tell)
    monkeypatch.setattr("data.workers.decode_into", show)


def merge(batches: list[Batch]) -> Step:
    """The global batch out of all ranks' micro-batches."""
    (shape,) = {batch.bucket for batch in batches}
    places: dict[int, tuple[int, float]] = {}
    for batch in batches:
        assert batch.valid.all()
        for at, pixels, key in zip(batch.positions.tolist(), batch.pixels, batch.keys, strict=True):
            row, start = struct.unpack("<qd", pixels.view(-1)[:16].numpy().tobytes())
            assert key == f"k{row}" and at not in places
            places[at] = row, start
    assert sorted(places) == list(range(len(places)))
    return f"{shape.frames}x{shape.height}x{shape.width}", [places[at] for at in range(len(places))]


def live(
    index: Index, position: Position, steps: int, world: int = 1, accumulation: int = 1, workers: int = 0
) -> tuple[list[Step], Position]:
    """Some steps on all ranks, and where their checkpoint stands. What workers had prepared beyond it is lost."""
    loaders = [
        StageLoader(
            index, STAGE, data_config(workers), seed=SEED, rank=rank, world=world, grad_accumulation=accumulation,
            position=position,
        )
        for rank in range(world)
    ]  # fmt: skip
    ranks = [iter(loader) for loader in loaders]
    done = [merge([batch for rank in ranks for batch in next(rank)]) for _ in range(steps)]
    states = {json.dumps(loader.position.as_dict()) for loader in loaders}
    assert len(states) == 1
    return done, Position.from_dict(json.loads(states.pop()))


def published(index: Index, steps: int) -> list[Step]:
    """What docs/data.md promises, said without the loader."""
    train, _ = split(index, data_config().holdout_share)
    assigned = assign(index, STAGE, data_config()).rows
    taken: Counter[int] = Counter()
    promised = []
    for step in range(steps):
        n = bucket_of_step([bucket.share for bucket in BUCKETS], step)
        seed = stream_seed(SEED, STAGE.name, str(BUCKETS[n]))
        rows = assigned[str(BUCKETS[n])]
        members = rows[train[rows]]
        numbers = np.arange(taken[n], taken[n] + BUCKETS[n].batch_size)
        taken[n] += BUCKETS[n].batch_size
        orders = {
            epoch: epoch_order(members, index.shard, seed=seed, epoch=epoch, window_shards=2)
            for epoch in set((numbers // len(members)).tolist())
        }
        drawn = [int(orders[g // len(members)][g % len(members)]) for g in numbers.tolist()]
        promised.append((str(BUCKETS[n]), list(zip(drawn, starts(seed, numbers).tolist(), strict=True))))
    return promised


def test_an_uninterrupted_stage_sees_what_is_promised(tmp_path: Path) -> None:
    index = make_index(tmp_path, 200)
    assert live(index, Position(), STEPS)[0] == published(index, STEPS)


@pytest.mark.parametrize("seed", range(3))
def test_resumed_by_others_it_sees_the_same(tmp_path: Path, seed: int) -> None:
    """After kills at random steps, with every world size, accumulation and number of workers."""
    index, chance = make_index(tmp_path, 200), random.Random(seed)
    done: list[Step] = []
    position, ways = Position(), set()
    while len(done) < STEPS:
        way = (*chance.choice(WAYS), chance.choice([0, 0, 0, 0, 1, 2]))
        if way[0] > 2 and way[2]:
            continue  # a dozen processes show nothing that four do not
        steps = min(chance.choice([0, 1, 1, 2, 3, 5, 8]), STEPS - len(done))
        more, position = live(index, position, steps, *way)
        done += more
        ways.add(way)
    assert done == published(index, STEPS)
    assert {workers for *_, workers in ways} == {0, 1, 2} and {world for world, *_ in ways} == {1, 2, 3, 4, 6}
    assert position.step == STEPS


def test_no_sample_of_an_epoch_is_lost_or_repeated(tmp_path: Path) -> None:
    """Changing hands after every step, across the borders of epochs, which lie inside batches."""
    index, position = make_index(tmp_path, 200), Position()
    streams: dict[str, list[int]] = defaultdict(list)
    for step in range(STEPS):
        ((name, samples),), position = live(index, position, 1, *WAYS[step % len(WAYS)])
        streams[name] += [row for row, _ in samples]
    train, _ = split(index, data_config().holdout_share)
    for bucket in BUCKETS:
        rows = assign(index, STAGE, data_config()).rows[str(bucket)]
        members, seen = rows[train[rows]].tolist(), streams[str(bucket)]
        assert len(seen) > 2 * len(members) and len(members) % bucket.batch_size
        for begin in range(0, len(seen) - len(members) + 1, len(members)):
            assert sorted(seen[begin : begin + len(members)]) == members


def test_the_end_of_an_epoch_costs_what_its_beginning_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 100,000 samples: as many reads, and about the time, until the first batch is there."""
    monkeypatch.undo()
    monkeypatch.setattr("data.workers.decode_into", lambda clip, media, **_: clip.zero_())
    reads, pread = [], os.pread

    def counted(*where: Any) -> bytes:
        reads.append(where)
        return pread(*where)

    monkeypatch.setattr("os.pread", counted)
    index = make_index(tmp_path, 100_000)
    epoch = int(split(index, data_config().holdout_share)[0][index.frames == 1].sum())

    def step_of_images(after: int) -> int:
        return next(n for n in itertools.count(after) if not bucket_of_step([bucket.share for bucket in BUCKETS], n))

    places = {
        "beginning": Position(),
        "end": Position(step_of_images(10**4), {"1x8x8": epoch - 25, "9x8x8": 10**6, "17x8x8": 10**6}),
        "border": Position(step_of_images(10**4), {"1x8x8": epoch - 12, "9x8x8": 10**6, "17x8x8": 10**6}),
        "far": Position(step_of_images(10**9), {"1x8x8": 10**10, "9x8x8": 10**10, "17x8x8": 10**10}),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(5):
        for place, position in places.items():
            reads.clear()
            began = time.process_time()
            loader = StageLoader(
                index, STAGE, data_config(), seed=SEED, rank=0, world=1, grad_accumulation=1, position=position
            )
            next(iter(loader))
            seconds[place].append(time.process_time() - began)
            assert len(reads) == BUCKETS[0].batch_size
    best = {place: min(times) for place, times in seconds.items()}
    assert max(best.values()) < 1.5 * best["beginning"] + 0.01, best


CRASH = """
import sys
from pathlib import Path
from data.pipeline import StageLoader
from tests.integration.test_order import STAGE, data_config, make_index
index = make_index(Path(sys.argv[1]), 200)
steps = iter(StageLoader(index, STAGE, data_config(workers=1), seed=0, rank=0, world=1, grad_accumulation=1))
next(steps)
raise ValueError("a bug")
"""


def test_a_crash_ends_although_its_workers_ignore_signals(tmp_path: Path) -> None:
    """The traceback holds the steps until the end of the process, which must come."""
    command, environment = [sys.executable, "-c", CRASH, str(tmp_path)], os.environ | ENVIRONMENT
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ValueError: a bug" in done.stderr.splitlines()
