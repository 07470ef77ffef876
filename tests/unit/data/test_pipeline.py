"""The loader: exact order and set under kills, worlds, workers and accumulation; holes; the limit on bad samples."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch import Batch, Bucket
from data.buckets import epoch_order, split, stream_seed
from data.counts import check_buckets
from data.pipeline import Position, StageLoader, holdout_batches, rank_slices
from data.shards import Index, load_index, read_member
from lingen.config import BucketConfig, DataConfig, StageConfig
from lingen.errors import UserError

MakeConfig = Callable[..., DataConfig]


def make_stage(*, samples: int = 10_000, images: int = 24, clips: int = 12, name: str = "stage") -> StageConfig:
    buckets = [
        BucketConfig(frames=1, height=8, width=8, batch_size=images, share=2),
        BucketConfig(frames=5, height=8, width=8, batch_size=clips, share=1),
    ]
    return StageConfig(name=name, buckets=buckets, samples=samples, lr=1e-3, fps=8)


def make_loader(
    index: Index,
    stage: StageConfig,
    data: DataConfig,
    *,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    position: Position | None = None,
    bad_log: Path | None = None,
) -> StageLoader:
    return StageLoader(
        index,
        stage,
        data,
        seed=5,
        rank=rank,
        world=world,
        grad_accumulation=accumulation,
        position=position,
        bad_log=bad_log,
    )


Step = list[tuple[str, bytes]]  # (key, pixels) of a global batch, by position


def run_world(
    index: Index,
    stage: StageConfig,
    data: DataConfig,
    position: Position,
    *,
    steps: int,
    world: int = 1,
    accumulation: int = 1,
) -> tuple[list[Step], Position]:
    """Some steps of all ranks, and the position as a checkpoint would bring it back."""
    loaders = [
        make_loader(index, stage, data, rank=rank, world=world, accumulation=accumulation, position=position)
        for rank in range(world)
    ]
    iterators = [iter(loader) for loader in loaders]
    done = []
    for _ in range(steps):
        parts = [next(iterator) for iterator in iterators]
        assert all(len(part) == accumulation for part in parts)
        done.append(merge([batch for part in parts for batch in part]))
        assert len({json.dumps(loader.position.as_dict()) for loader in loaders}) == 1
    return done, Position.from_dict(json.loads(json.dumps(loaders[0].position.as_dict())))


def merge(batches: list[Batch]) -> Step:
    """The global batch; every position is there once, and all is of one bucket."""
    assert len({batch.bucket for batch in batches}) == 1 and len({len(batch.keys) for batch in batches}) == 1
    rows = {
        int(at): (key, pixels.numpy().tobytes())
        for batch in batches
        for at, key, pixels in zip(batch.positions, batch.keys, batch.pixels, strict=True)
    }
    assert sorted(rows) == list(range(sum(len(batch.keys) for batch in batches)))
    return [rows[at] for at in sorted(rows)]


def test_kills_with_changing_worlds_workers_and_accumulation(index: Index, data_config: MakeConfig) -> None:
    stage, total = make_stage(), 30
    reference, _ = run_world(index, stage, data_config(), Position(), steps=total)
    chance = random.Random(1)
    done: list[Step] = []
    position, lives = Position(), 0
    while len(done) < total:
        workers = chance.choice([0, 0, 0, 1, 2])
        steps = min(chance.randint(1, 4), total - len(done))
        world, accumulation = chance.choice([(1, 1), (2, 1), (4, 1), (1, 3), (2, 2), (4, 3), (3, 2)])
        more, position = run_world(
            index,
            stage,
            data_config(workers=workers),
            position,
            steps=steps,
            world=world,
            accumulation=accumulation,
        )
        done, lives = done + more, lives + 1
    assert lives > 8
    assert done == reference  # keys, order and every pixel
    assert position.step == total


def test_every_epoch_has_every_sample_once_in_the_published_order(index: Index, data_config: MakeConfig) -> None:
    stage, data = make_stage(), data_config()
    steps, _ = run_world(index, stage, data, Position(), steps=30)
    streams: dict[str, list[str]] = defaultdict(list)
    for step in steps:
        streams[step[0][0].split("-")[0]] += [key for key, _ in step]
    train, _ = split(index, data.holdout_share)
    for kind, bucket in (("image", "1x8x8"), ("clip", "5x8x8")):
        members = np.array([n for n, key in enumerate(index.key) if key.startswith(kind) and train[n]])
        epochs = len(streams[kind]) // len(members)
        assert epochs >= 3
        for epoch in range(epochs):
            seed = stream_seed(5, "stage", bucket)
            order = epoch_order(members, index.shard, seed=seed, epoch=epoch, window_shards=3)
            got = streams[kind][epoch * len(members) : (epoch + 1) * len(members)]
            assert got == [index.key[n] for n in order]
            assert len(set(got)) == len(members)


def test_shares_of_steps_and_end_of_stage(index: Index, data_config: MakeConfig) -> None:
    stage = make_stage(samples=24 * 4 + 12 * 2)
    loader = make_loader(index, stage, data_config())
    counts = Counter(str(batches[0].bucket) for batches in loader)
    assert counts == {"1x8x8": 4, "5x8x8": 2}
    assert loader.position.consumed == {"1x8x8": 96, "5x8x8": 24}
    assert list(loader) == []  # finished


def test_resuming_far_on_reads_nothing_before(
    index: Index, data_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def counted(index: Index, n: int, **kwargs: bool) -> bytes:
        reads.append(n)
        return read_member(index, n, **kwargs)

    monkeypatch.setattr("data.workers.read_member", counted)
    train = check_buckets(index, [make_stage()], data_config())["stage"].buckets["1x8x8"].train
    far = Position(2 * 10**6, {"1x8x8": train * 10**5 - 3, "5x8x8": 7})
    stage = make_stage(samples=10**9)
    loader = make_loader(index, stage, data_config(), position=far)
    batches = next(iter(loader))
    assert len(reads) == len(batches[0].keys) == 24


def test_the_window_differs_between_epochs_and_stages(index: Index, data_config: MakeConfig) -> None:
    def pixels(name: str) -> dict[str, set[bytes]]:
        seen = defaultdict(set)
        for step in run_world(index, make_stage(name=name), data_config(), Position(), steps=30)[0]:
            for key, value in step:
                seen[key].add(value)
        return seen

    one, two = pixels("one"), pixels("two")
    clips = [key for key in one if key.startswith("clip")]
    assert sum(len(one[key]) > 1 for key in clips) > len(clips) / 2
    assert any(one[key] != two.get(key) for key in clips)
    assert all(len(one[key]) == 1 for key in one if key.startswith("image"))


def test_the_stream_does_not_depend_on_the_batch_size(index: Index, data_config: MakeConfig) -> None:
    def stream(clips: int, steps: int) -> list[tuple[str, bytes]]:
        done, _ = run_world(index, make_stage(clips=clips), data_config(), Position(), steps=steps)
        return [row for step in done for row in step if row[0].startswith("clip")]

    assert stream(12, 6) == stream(6, 12)


def test_rank_slices_are_contiguous() -> None:
    parts = [rank_slices(24, rank, 2, 3) for rank in range(2)]
    assert [part.tolist() for part in parts[1]] == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]
    assert sorted(int(n) for part in parts for micro in part for n in micro) == list(range(24))


def damage(folder: Path, out: Path, keys: list[str]) -> Index:
    """A copy of the shards where one byte in the middle of these samples is flipped."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    index = load_index(out)
    for key in keys:
        n = index.key.index(key)
        with (out / index.shards[index.shard[n]]).open("r+b") as shard:
            shard.seek(int(index.offset[n] + index.bytes[n] // 2))
            byte = shard.read(1)[0]
            shard.seek(-1, os.SEEK_CUR)
            shard.write(bytes([byte ^ 0xFF]))
    return load_index(out)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_a_hole(
    index: Index, mixed_shards: Path, data_config: MakeConfig, tmp_path: Path, workers: int
) -> None:
    stage = make_stage(samples=300)
    reference, _ = run_world(index, stage, data_config(), Position(), steps=9)
    bad_keys = {reference[0][3][0], reference[2][1][0]}
    hurt = damage(mixed_shards, tmp_path / "hurt", sorted(bad_keys))
    log, data = tmp_path / "logs" / "bad.jsonl", data_config(max_bad_share=0.2, workers=workers)
    loader = make_loader(hurt, stage, data, bad_log=log)
    holes = 0
    for expected, (batch,) in zip(reference, loader, strict=False):
        for n, (key, pixels) in enumerate(expected):
            assert batch.keys[n] == key and int(batch.positions[n]) == n
            assert bool(batch.valid[n]) == (key not in bad_keys)
            if batch.valid[n]:
                assert batch.pixels[n].numpy().tobytes() == pixels and batch.captions[n] == f"caption of {key}"
            else:
                holes += 1
                assert (batch.pixels[n] == 128).all() and batch.captions[n] == ""
    assert holes >= 2 and loader.bad == {"wrong checksum": holes}
    lines = [json.loads(line) for line in (log.parent / "bad-rank0.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == bad_keys and len(lines) == holes
    assert all(line["reason"] == "wrong checksum" for line in lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_lost_and_no_hole(
    mixed_shards: Path, data_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("data.shards.PAUSES", (0.001,))
    hurt = damage(mixed_shards, tmp_path / "hurt", [])
    shard = tmp_path / "hurt" / hurt.shards[0]
    shard.rename(tmp_path / "away")
    loader = make_loader(hurt, make_stage(samples=200), data_config(workers=workers))
    gone = {key for key, place in zip(hurt.key, hurt.shard, strict=True) if place == 0}
    problem = f"shard {shard} cannot be read: No such file or directory"
    seen = set()
    for (batch,) in loader:
        assert loader.lost == batch.lost == (problem if gone & set(batch.keys) else None)
        assert not (batch.lost and batch.valid.any())
        seen.add(loader.lost)
    assert seen == {problem, None} and not loader.bad  # nothing is said against the samples
    bucket, half = make_stage().buckets[0], data_config(holdout_share=0.5)
    held_out = list(holdout_batches(hurt, make_stage(), bucket, half, limit=30, batch_size=5, rank=0, world=1))
    assert {batch.lost for batch in held_out} == {problem, None}
    (tmp_path / "away").rename(shard)
    assert not any(batch.lost for (batch,) in make_loader(hurt, make_stage(samples=200), data_config()))


def test_workers_end_with_the_loop_and_outlive_signals(index: Index, data_config: MakeConfig) -> None:
    before = set(multiprocessing.active_children())
    loader = make_loader(index, make_stage(), data_config(workers=2))
    batches = iter(loader)
    assert isinstance(batches, Generator)
    next(batches)  # the second worker may still be starting
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:  # what Slurm and Ctrl-C send to every process of a job
        assert worker.pid is not None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
    for _ in range(12):
        next(batches)
    assert all(worker.is_alive() for worker in workers)
    began = time.monotonic()
    batches.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    assert time.monotonic() - began < 10


def test_position_is_plain_json_and_counts_steps(index: Index, data_config: MakeConfig) -> None:
    _, position = run_world(index, make_stage(), data_config(), Position(), steps=4)
    assert position.as_dict() == {"step": 4, "consumed": {"1x8x8": 72, "5x8x8": 12}, "skipped": 0}
    assert Position.from_dict(position.as_dict()) == position
    rolled_back = Position(2, {"1x8x8": 48}).past(position)
    assert Position.from_dict(json.loads(json.dumps(rolled_back.as_dict()))) == rolled_back


@pytest.mark.parametrize("world", [1, 2])
def test_rollbacks_skip_data_and_no_step(index: Index, data_config: MakeConfig, world: int) -> None:
    """Each bucket's samples come in their order, but for the skipped; the steps are those of an undisturbed stage."""
    samples, data = 9 * 24 + 4 * 12, data_config()
    stage, endless = make_stage(samples=samples), make_stage()
    undisturbed = [str(batches[0].bucket) for batches in make_loader(index, stage, data)]
    streams: dict[str, list[Step]] = defaultdict(list)  # what a stage without end would see of each bucket
    for step in run_world(index, endless, data, Position(), steps=40)[0]:
        streams["1x8x8" if step[0][0].startswith("image") else "5x8x8"].append(step)

    done: list[Step] = []
    wanted: list[Step] = []
    position, left = Position(), {bucket: iter(steps) for bucket, steps in streams.items()}
    for saved, failed in ((3, 2), (4, 3), (len(undisturbed) - 7, 0)):  # steps until a checkpoint; then, to a rollback
        trained, saved_at = run_world(index, stage, data, position, steps=saved, world=world)
        refused, failed_at = run_world(index, stage, data, saved_at, steps=failed, world=world)
        done += trained
        position = saved_at.past(failed_at)
        assert position.step == len(done)
        assert position.skipped - saved_at.skipped == sum(map(len, refused))
        names = undisturbed[len(done) - saved : len(done) + failed]
        steps = [next(left[name]) for name in names]
        wanted += steps[:saved]
        assert refused == steps[saved:]
    assert done == wanted and len(done) == len(undisturbed)
    assert position.counted == sum(map(len, done)) >= samples and position.skipped > 0
    assert list(make_loader(index, stage, data, position=position)) == []  # finished


def test_batch_size_must_divide(index: Index, data_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"batch_size=24.*5 ranks"):
        make_loader(index, make_stage(), data_config(), world=5)


def test_more_batches_ahead_than_memory_holds_are_refused(index: Index, data_config: MakeConfig) -> None:
    bucket = BucketConfig(frames=5, height=80_000, width=80_000, batch_size=64)
    stage = StageConfig(name="s", buckets=[bucket], samples=8, lr=1, fps=8)
    with pytest.raises(UserError, match=r"data\.prefetch"):
        make_loader(index, stage, data_config(workers=4))


def test_batches_are_what_the_contract_says(index: Index, data_config: MakeConfig) -> None:
    loader = make_loader(index, make_stage(), data_config(), rank=1, world=2, accumulation=2)
    batch = next(iter(loader))[1]
    assert batch.bucket == Bucket(1, 8, 8)
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (6, 3, 1, 8, 8)
    assert batch.positions.dtype == torch.int64 and batch.positions.tolist() == [18, 19, 20, 21, 22, 23]
    assert batch.valid.dtype == torch.bool and len(batch.captions) == len(batch.keys) == 6
    levels = batch.pixels[:, 0, 0, 0, 0].tolist()
    assert [f"image-{level}" for level in levels] == batch.keys
