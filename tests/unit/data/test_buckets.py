"""Eligibility, the hold-out, the order of an epoch and the bucket of a step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.batch import Bucket
from data.buckets import bucket_of_step, eligible, epoch_order, split, starts, stream_seed
from data.shards import Index
from lingen.config import DataConfig

DATA = DataConfig(path="unused")


def make_index(frames: list[int], fps: list[float]) -> Index:
    count = len(frames)
    ones = np.ones(count, np.int64)
    return Index(
        path=Path("unused"),
        shards=["shard-000000.tar"],
        key=[f"k{n}" for n in range(count)],
        caption=["c"] * count,
        frames=np.array(frames, np.int64),
        fps=np.array(fps),
        height=ones,
        width=ones,
        bytes=ones,
        shard=0 * ones,
        offset=0 * ones,
        sha256=["0"] * count,
        fingerprint="f",
        begin=np.zeros(count),
        end=np.zeros(count),
        root=Path("unused"),
    )


@pytest.mark.parametrize(
    ("frames", "source_fps", "bucket_frames", "fps", "fits"),
    [
        (17, 8.0, 17, 8.0, True),  # exactly enough
        (16, 8.0, 17, 8.0, False),  # one frame short
        (17, 8.0, 17, 7.99, False),  # 16 / 7.99 s is 2.5 ms more than the clip has
        (120, 29.97002997002997, 17, 4.0298, True),  # 3.9704 of 3.9706 s
        (120, 29.97002997002997, 17, 4.02, False),
        (33, 8.0, 65, 16.0, True),  # a faster bucket repeats frames
        (1, 0.0, 17, 8.0, False),  # an image is no video
        (1, 0.0, 1, 8.0, True),
        (17, 8.0, 1, 8.0, False),  # a video is no image, unless the configuration says so
    ],
)
def test_eligible(frames: int, source_fps: float, bucket_frames: int, fps: float, fits: bool) -> None:
    rows = eligible(make_index([frames], [source_fps]), Bucket(bucket_frames, 8, 8), fps=fps, data=DATA)
    assert rows.tolist() == ([0] if fits else [])


def test_videos_as_images() -> None:
    index = make_index([1, 17], [0.0, 8.0])
    data = DATA.model_copy(update={"video_frames_as_images": True})
    assert eligible(index, Bucket(1, 8, 8), fps=8, data=data).tolist() == [0, 1]


def test_split_is_stable_and_near_its_share() -> None:
    index = make_index([1] * 4000, [0.0] * 4000)
    train, holdout = split(index, 0.1)
    assert (train ^ holdout).all()
    assert 0.08 < holdout.mean() < 0.12
    fewer = replace(index, key=index.key[::3])
    assert (split(fewer, 0.1)[1] == holdout[::3]).all()  # other samples do not matter
    assert not split(index, 0.0)[1].any()
    assert (holdout <= split(index, 0.2)[1]).all()  # a larger share keeps what was held out


def test_epoch_order_is_a_permutation_inside_windows_of_shards() -> None:
    shard_of = np.repeat(np.arange(10), 7)
    members = np.flatnonzero(np.arange(70) % 5 != 0)
    order = epoch_order(members, shard_of, seed=3, epoch=0, window_shards=4)
    assert sorted(order) == members.tolist()
    ends = [max(np.flatnonzero(shard_of[order] == s)) for s in range(10)]
    begins = [min(np.flatnonzero(shard_of[order] == s)) for s in range(10)]
    # the shards of a window all end before any shard of the next window begins
    by_begin = sorted(range(10), key=lambda s: begins[s])
    groups = [by_begin[0:4], by_begin[4:8], by_begin[8:10]]
    for before, after in pairwise(groups):
        assert max(ends[s] for s in before) < min(begins[s] for s in after)
    # inside a window the shards are mixed
    assert min(ends[s] for s in groups[0]) > max(begins[s] for s in groups[0])


def test_epoch_order_depends_on_seed_and_epoch_alone() -> None:
    shard_of, members = np.repeat(np.arange(5), 20), np.arange(100)

    def order(seed: int, epoch: int) -> list[int]:
        return epoch_order(members, shard_of, seed=seed, epoch=epoch, window_shards=8).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


def test_orders_never_change() -> None:
    """A checkpoint's position is a place in this order: a change of the hash would silently reorder running jobs."""
    order = epoch_order(
        np.arange(12), np.repeat(np.arange(3), 4), seed=stream_seed(0, "a", "1x8x8"), epoch=1, window_shards=2
    )
    assert order.tolist() == [3, 11, 10, 8, 0, 2, 1, 9, 4, 6, 7, 5]
    assert starts(7, np.arange(3)).round(6).tolist() == [0.506935, 0.415087, 0.558558]


def test_starts_are_uniform() -> None:
    values = starts(5, np.arange(20_000))
    assert values.min() >= 0 and values.max() < 1
    assert np.abs(np.histogram(values, 10, (0, 1))[0] / 2000 - 1).max() < 0.1


@pytest.mark.parametrize("shares", [[1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1.0, 1.0, 1.0, 1e-3], [0.37, 0.41, 0.22, 5.0]])
def test_each_bucket_gets_its_share_of_every_stretch(shares: list[float]) -> None:
    steps = 3000
    schedule = np.array([bucket_of_step(shares, step) for step in range(steps)])
    for bucket, share in enumerate(shares):
        due = np.arange(1, steps + 1) * share / sum(shares)
        assert np.abs(np.cumsum(schedule == bucket) - due).max() < 2


@pytest.mark.parametrize("shares", [[3.0, 1.0], [0.5, 0.3, 0.2], [1.0, 1.0, 1e-3], [1.0, 1.0, 1.0]])
def test_a_step_draws_from_what_is_due_in_turn(shares: list[float]) -> None:
    """As when every bucket's due times are listed from the beginning and sorted; ties go to the first."""
    steps = 200_000
    due = sorted(((k + 0.5) / share, i) for i, share in enumerate(shares) for k in range(steps))
    asked = [*range(1000), *range(10_000, 100_000, 997)]
    assert [bucket_of_step(shares, step) for step in asked] == [due[step][1] for step in asked]
    assert bucket_of_step(shares, 10**12) in range(len(shares))  # at once


@pytest.mark.parametrize(
    ("shares", "cycle"),
    [
        ([3.0, 1.0], [3, 1]),
        ([0.75, 0.25], [3, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([1.5, 3.0, 1.0], [3, 6, 2]),
        ([1.0, 1e-3], [1000, 1]),
        ([1 / 3, 2 / 3], [1, 2]),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 10**6])  # cycles
def test_each_cycle_has_every_share_exactly(shares: list[float], cycle: list[int], before: int) -> None:
    """Three steps of video to one of images are three to one, not nearly so, after each four."""
    length = sum(cycle)
    drawn = [bucket_of_step(shares, step) for step in range(before * length, (before + 3) * length)]
    for n in range(3):
        counts = np.bincount(drawn[n * length : (n + 1) * length], minlength=len(shares))
        assert counts.tolist() == cycle
