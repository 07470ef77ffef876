"""How many samples each bucket of a stage has, how many are in none, and why a bucket is empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from data.buckets import assign, eligible, nearest_of, split
from data.latents import refuse_other_buckets
from data.shards import Index
from lingen.config import BucketConfig, DataConfig, StageConfig


class BucketCount(NamedTuple):
    """The samples of a bucket."""

    train: int
    holdout: int
    empty: str  # why there is none to train on, and what would help; else ""


class StageCount(NamedTuple):
    """Where the samples of an index are in a stage."""

    buckets: dict[str, BucketCount]  # by the bucket's name
    none: dict[str, int]  # samples in no bucket, by the reason


def check_buckets(index: Index, stages: Sequence[StageConfig], data: DataConfig) -> dict[str, StageCount]:
    """For each stage how many samples each of its buckets has, and how many are in none.

    Raises:
        UserError: the samples are latents, and a bucket is not one that they were made for.
    """
    refuse_other_buckets(index, stages)
    train, _ = split(index, data.holdout_share)
    counts: dict[str, StageCount] = {}
    for stage in stages:
        assigned, buckets = assign(index, stage, data), {}
        for bucket in stage.buckets:
            rows = assigned.rows[str(bucket)]
            own = int(train[rows].sum())
            empty = "" if own else why_empty(index, stage, bucket, data)
            buckets[str(bucket)] = BucketCount(own, len(rows) - own, empty)
        counts[stage.name] = StageCount(buckets, assigned.none)
    return counts


def why_empty(index: Index, stage: StageConfig, bucket: BucketConfig, data: DataConfig) -> str:
    """Why there is no sample to train on in one of the stage's buckets, and what would fill it."""
    fits = eligible(index, bucket, fps=stage.fps, data=data)
    nearest = nearest_of(index, fits, stage, data, images=bucket.frames == 1)
    seconds = (bucket.frames - 1) / stage.fps
    if str(bucket) in nearest:
        return (
            f"all {nearest[str(bucket)]} samples of it are held out; lower data.holdout_share={data.holdout_share}, or "
            "add some"
        )
    if nearest:
        others = ", ".join(f"{name} ({count})" for name, count in nearest.items())
        length = f" of {seconds:.2f} s" if bucket.frames > 1 else ""
        return (
            f"the {len(fits)} samples in {index.path} that could fill it are all nearer to {others}; add some{length} "
            f"of about {bucket.width}x{bucket.height} (width x height), or take the bucket out"
        )
    if bucket.frames == 1:
        return f"{index.path} has no images; add some, or set data.video_frames_as_images=true to take frames of videos"
    videos = index.frames > 1
    longest = index.footage.seconds[videos].max(initial=0.0)
    return (
        f"{bucket.frames} frames at fps={stage.fps:g} need {seconds:.2f} s of footage, and the longest of "
        f"{int(videos.sum())} videos in {index.path} has {longest:.2f} s; add longer clips, or take the bucket out"
    )
