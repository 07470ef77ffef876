"""Which samples a bucket has, which are held out, in which order they come, and which bucket a step draws from.

Everything here is a pure function of its arguments: no state, no rank, no machine. The random numbers come from one
integer hash (SplitMix64), so that an order outlives a change of library versions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.batch import Bucket
from data.shards import Index
from lingen.config import BucketConfig, DataConfig, StageConfig

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int16]

SLACK_S = 1e-3  # less than decode's own, so that what is eligible also decodes


@dataclass(frozen=True)
class Assignment:
    """The samples of an index, shared out among the buckets of a stage."""

    rows: dict[str, Ints]  # of each bucket, by its name, in the stage's order; each ascending
    none: dict[str, int]  # how many samples are in no bucket, by the reason


def assign(index: Index, stage: StageConfig, data: DataConfig) -> Assignment:
    """A clip goes to one bucket of the stage: the one that keeps the most of it.

    Of a clip of aspect a, cut to a bucket of aspect b, min(a/b, b/a) of each picture is kept, and the bucket's seconds
    of the clip's: the product is largest for the bucket that is nearest in log(aspect) and log(seconds) together, among
    those that the clip is long enough for. Where several keep as much (one shape at several resolutions), it is the
    largest that need not be upscaled, else the smallest, else the first. Images share out the buckets of one frame by
    aspect alone; videos do so too, beside their own bucket, with ``data.video_frames_as_images``.

    Latents are assigned as the clips that they were made of, and only those are drawn that were made for that bucket.
    """
    rows: dict[str, Ints] = {}
    used = np.zeros(len(index), dtype=bool)  # (N,)
    for alike in ([b for b in stage.buckets if b.frames == 1], [b for b in stage.buckets if b.frames > 1]):
        nearest = _nearest(index, alike, stage.fps, data)  # (N,)
        for place, bucket in enumerate(alike):
            drawn = nearest == place
            if index.latents is not None:
                drawn &= _made_for(index, bucket, stage.fps)
            rows[str(bucket)] = np.flatnonzero(drawn).astype(np.int64)
            used |= drawn
    return Assignment({str(b): rows[str(b)] for b in stage.buckets}, _reasons(index, stage, ~used))


def eligible(index: Index, bucket: Bucket | BucketConfig, *, fps: float, data: DataConfig) -> Ints:
    """The rows of the index that can fill a bucket at ``fps``, whichever other buckets there are.

    A clip shows its last frame (frames - 1) / rate seconds after its first one; a bucket needs (bucket.frames - 1) /
    fps of that. A bucket of one frame takes images, and videos only where ``data.video_frames_as_images`` says so.
    Latents fill the bucket that they were made for.
    """
    fits = _long_enough(index, bucket, fps, data)
    if index.latents is not None:
        fits &= _made_for(index, bucket, fps)
    return np.flatnonzero(fits).astype(np.int64)


def nearest_of(index: Index, rows: Ints, stage: StageConfig, data: DataConfig, *, images: bool) -> dict[str, int]:
    """How many of these rows are nearest to which bucket of the stage, the most first."""
    alike = [bucket for bucket in stage.buckets if (bucket.frames == 1) == images]
    counts = np.bincount(_nearest(index, alike, stage.fps, data)[rows] + 1, minlength=len(alike) + 1)[1:]
    found = sorted(zip(counts.tolist(), map(str, alike), strict=True), key=lambda one: -one[0])
    return {name: count for count, name in found if count}


def _nearest(index: Index, buckets: Sequence[BucketConfig], fps: float, data: DataConfig) -> Places:
    """(N,) the place among ``buckets`` of each sample's own; -1 for none. They are all of images, or all of videos.

    Integers and one division decide, which are exact or rounded alike everywhere: no machine sees another tie.
    """
    _, height, width = index.footage  # (N,) each
    nearest = np.full(len(index), -1, dtype=np.int16)
    most, largest = np.zeros(len(index)), np.zeros(len(index), dtype=np.int64)
    for place, bucket in enumerate(buckets):
        across, down = width * bucket.height, height * bucket.width  # a / b is their quotient
        kept = np.minimum(across, down) / np.maximum(across, down) * max(1, bucket.frames - 1)
        covers, area = (height >= bucket.height) & (width >= bucket.width), bucket.height * bucket.width
        size = np.where(covers, area, -area)
        better = (kept > most) | ((kept == most) & (size > largest))
        better &= _long_enough(index, bucket, fps, data)
        nearest[better], most[better], largest[better] = place, kept[better], size[better]
    return nearest


def _long_enough(index: Index, bucket: Bucket | BucketConfig, fps: float, data: DataConfig) -> Mask:
    """(N,) whether the sample, or what it was made of, has the footage of a bucket."""
    seconds, still = index.footage.seconds, index.footage.seconds == 0  # (N,)
    if bucket.frames == 1:
        return np.ones_like(still) if data.video_frames_as_images else still
    fits: Mask = ~still & ((bucket.frames - 1) / fps <= seconds + SLACK_S)
    return fits


def _made_for(index: Index, bucket: Bucket | BucketConfig, fps: float) -> Mask:
    """(N,) whether latents are of a bucket."""
    shaped = (index.frames == bucket.frames) & (index.height == bucket.height) & (index.width == bucket.width)
    made: Mask = shaped & ((bucket.frames == 1) | (index.fps == fps))
    return made


def _reasons(index: Index, stage: StageConfig, left: Mask) -> dict[str, int]:
    """Why the samples of a mask (N,) are in no bucket: how many for each reason."""
    still = index.footage.seconds == 0
    needed = [(bucket.frames - 1) / stage.fps for bucket in stage.buckets if bucket.frames > 1]
    short = f"shorter than {min(needed):.2f} s" if needed else "videos, and no bucket has several frames"
    if index.latents is not None:
        ours = np.any([_made_for(index, bucket, stage.fps) for bucket in stage.buckets], axis=0)
        why = {"latents of other buckets": ~ours, "latents of clips that are another bucket's here": ours}
    else:
        why = {short: ~still, "images, and no bucket has one frame": still}
    counts = {reason: int((left & mask).sum()) for reason, mask in why.items()}
    return {reason: count for reason, count in counts.items() if count}


def split(index: Index, holdout_share: float) -> tuple[Mask, Mask]:
    """Masks (N,) of the samples to train on and of those to validate on.

    A sample's side depends on its own key alone, so it never changes when samples are added.
    """
    holdout: Mask = index.key_hash < np.uint64(min(int(holdout_share * 2.0**64), 2**64 - 1))
    return ~holdout, holdout


def epoch_order(members: Ints, shard_of: Ints, *, seed: int, epoch: int, window_shards: int) -> Ints:
    """The members in the order of one epoch: shards permuted, then samples permuted inside windows of shards.

    Args:
        members: (M,) rows of the index, at least one.
        shard_of: (N,) the shard of every row of the index.
        seed: any integer that names the stream; its low 64 bits count.
        window_shards: so many shards are read at a time, which bounds what a cache of remote shards must hold.
    """
    shard = shard_of[members]  # (M,)
    shards = np.flatnonzero(np.bincount(shard))  # (S,) those with members
    window_of = np.zeros(int(shards[-1]) + 1, dtype=np.min_scalar_type(len(shards)))  # small numbers sort faster
    window_of[shards[np.argsort(_mix(seed, epoch, 0, shards))]] = np.arange(len(shards)) // window_shards
    by_word = np.argsort(_mix(seed, epoch, 1, members))  # (M,); no two words are equal, so any kind of sort will do
    order = by_word[np.argsort(window_of[shard[by_word]], kind="stable")]
    ordered: Ints = members[order]
    return ordered


def starts(seed: int, ids: Ints) -> Floats:
    """In [0, 1) for each global sample number: where in a clip its window lies."""
    return (_mix(seed, 2, ids) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def stream_seed(*words: object) -> int:
    """64 bits that name a stream, from for example (seed, stage, bucket)."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little")


def bucket_of_step(shares: Sequence[float], step: int) -> int:
    """Which bucket (its place in ``shares``) a step of a stage draws from.

    After any number of steps each bucket has had its share of them to within a step or two, and the same on every rank.

    Bucket i is due at the times (k + 1/2) / share_i; the steps take what is due in turn (Sainte-Lague's apportionment).
    Until a time T it was due floor(T * share_i + 1/2) times, so only what is due about the step's own time is listed:
    step 10**9 costs what step 0 costs.
    """
    total, around = sum(shares), len(shares) + 1
    passed = [max(0, math.floor((step - around) * share / total + 0.5)) for share in shares]
    coming = [math.floor((step + around) * share / total + 0.5) + 1 for share in shares]
    due = [((k + 0.5) / share, i) for i, share in enumerate(shares) for k in range(passed[i], coming[i])]
    return sorted(due)[step - sum(passed)][1]


def _mix(*words: int | Ints) -> Words:
    """SplitMix64 over the words: each (broadcast) tuple of integers to 64 random bits."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            bits = np.uint64(word % 2**64) if isinstance(word, int) else word.astype(np.uint64)
            state = (state ^ bits) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state
