"""Which samples fill a bucket, which are held out, in which order they come, and which bucket a step draws from.

Everything here is a pure function of its arguments: no state, no rank, no machine. The random numbers come from one
integer hash (SplitMix64), so that an order outlives a change of library versions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data.batch import Bucket
from data.shards import Index
from lingen.config import DataConfig

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]

SLACK_S = 1e-3  # less than decode's own, so that what is eligible also decodes


def eligible(index: Index, bucket: Bucket, *, fps: float, data: DataConfig) -> Ints:
    """The rows of the index that can fill a bucket at ``fps``.

    A clip shows its last frame (frames - 1) / rate seconds after its first one; a bucket needs (bucket.frames - 1) /
    fps of that. A bucket of one frame takes images, and videos only where ``data.video_frames_as_images`` says so.
    Latents fill the bucket that they were made for.
    """
    if index.latents is not None:
        made = (index.frames == bucket.frames) & (index.height == bucket.height) & (index.width == bucket.width)
        return np.flatnonzero(made & ((bucket.frames == 1) | (index.fps == fps))).astype(np.int64)
    still = index.frames == 1  # (N,)
    if bucket.frames == 1:
        fits = np.ones_like(still) if data.video_frames_as_images else still
    else:
        span = (index.frames - 1) / np.where(still, 1.0, index.fps)  # (N,) seconds
        fits = ~still & ((bucket.frames - 1) / fps <= span + SLACK_S)
    return np.flatnonzero(fits).astype(np.int64)


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
