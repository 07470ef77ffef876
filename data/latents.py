"""Latent shards: what an autoencoder made of each clip's window, and perhaps the text encoders' states of its caption.

A member KEY.safetensors holds ``latents`` (C, T, h, w) and, by encoder, ``text.NAME`` (N, S): N tokens of S numbers.
index.json says with which networks, and for which buckets, they were made. Nothing in a shard is ever unpickled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from data.batch import Bucket, States, Tokens
from data.decode import BadSample
from data.index_file import Latents
from data.shards import Index, read_beside, read_member
from lingen.config import BucketConfig, StageConfig
from lingen.errors import UserError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ALIGNED = 64  # bytes
SUFFIX = "safetensors"  # of a member
EMPTY = f"empty.{SUFFIX}"  # the states of the empty caption, which stands for "no condition"
MAKE = "python scripts/precompute.py data=SHARDS out={out}"


def pack(latents: torch.Tensor | None, tokens: Tokens, autoencoder: str) -> bytes:
    """A member's bytes. ``autoencoder`` is the fingerprint: a member tells by itself what it is."""
    tensors = {f"text.{name}": states.contiguous() for name, states in tokens.items()}
    if latents is not None:
        tensors["latents"] = latents.contiguous()
    return save(tensors, {"autoencoder": autoencoder})


def read_latents(index: Index, i: int, *, verify: bool = True) -> tuple[torch.Tensor, Tokens]:
    """The latents (C, T, h, w) of sample ``i`` in the index's dtype, and the states of its caption by encoder, where
    they are stored.

    Raises:
        BadSample: the bytes are not those that were written, or not of the shape and type that the index says.
        LostShard: the shard cannot be read.
    """
    about = described(index)
    content = read_member(index, i, verify=False)
    if verify and check_of(content) != about.checks[i]:
        content = read_member(index, i)  # whose sha256 decides
    tensors = _parse(content)
    latents = tensors.pop("latents", None)
    shape = about.shape(int(index.frames[i]), int(index.height[i]), int(index.width[i]))
    if latents is None or latents.shape != shape or latents.dtype != DTYPES[about.dtype]:
        found = "none" if latents is None else f"{tuple(latents.shape)} {latents.dtype}"
        raise BadSample("other latents", f"{found}, where the index says {shape} {about.dtype}")
    return latents, _tokens(tensors, about)


def read_empty(index: Index) -> Tokens:
    """The states of the empty caption by encoder.

    Raises:
        UserError: the file is missing or damaged.
    """
    about, path = described(index), index.path / EMPTY
    try:
        content = read_beside(index, EMPTY)
        if hashlib.sha256(content).hexdigest() != about.empty_sha256:
            raise BadSample("wrong checksum")
        return _tokens(_parse(content), about)
    except (OSError, BadSample) as error:
        raise UserError(f"data.path={index.path}: {path} cannot be read ({error}); copy it again") from error


def check_of(content: bytes) -> int:
    """The sum of the bytes as little-endian words of 64 bits, modulo 2**64; the last word is filled up with zeros.

    It finds what disks and networks do (a changed bit, zeros, other bytes in the place of some), at memory's speed.
    """
    words = len(content) // 8
    total = np.frombuffer(content, "<u8", words).sum(dtype=np.uint64)
    return (int(total) + int.from_bytes(content[8 * words :], "little")) % 2**64


def described(index: Index) -> Latents:
    """How an index's latents were made.

    Raises:
        ValueError: it holds none.
    """
    if index.latents is None:
        raise ValueError(f"{index.path} holds no latents")
    return index.latents


def _parse(content: bytes) -> dict[str, torch.Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a type that is not known
        raise BadSample("no safetensors", str(error)[:200]) from error


def _tokens(tensors: Mapping[str, torch.Tensor], about: Latents) -> Tokens:
    if set(tensors) != {f"text.{name}" for name in about.text}:
        raise BadSample("other latents", f"it has {sorted(tensors)}, where the index says text {sorted(about.text)}")
    tokens = {}
    for name, stored in about.text.items():
        states = tensors[f"text.{name}"]
        right = states.ndim == 2 and len(states) <= stored.length and states.shape[1] == stored.dim
        if not right or states.dtype != DTYPES[stored.dtype]:
            raise BadSample("other latents", f"text.{name} is {tuple(states.shape)} {states.dtype}")
        tokens[name] = states
    return tokens


class Layout:
    """Where the samples of a batch lie in one block of memory, so that a worker can fill them in: of each sample the
    number of tokens of each encoder, the latents, and each encoder's states in room for the longest caption."""

    def __init__(self, about: Latents, bucket: Bucket) -> None:
        self.shape = about.shape(bucket.frames, bucket.height, bucket.width)
        self.text = about.text
        self._parts: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}  # begin, end, type and shape
        self.bytes = 0  # a sample
        self._add("counts", torch.int64, (len(about.text),))
        self._add("latents", DTYPES[about.dtype], self.shape)
        for name, stored in about.text.items():
            self._add(f"text.{name}", DTYPES[stored.dtype], (stored.length, stored.dim))

    def _add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        end = self.bytes + math.prod(shape) * dtype.itemsize
        self._parts[name] = self.bytes, end, dtype, shape
        self.bytes = -(-end // ALIGNED) * ALIGNED

    def _part(self, memory: torch.Tensor, name: str) -> torch.Tensor:
        """(B * bytes,) uint8 -> that part of all samples, (B, *shape), the same memory."""
        begin, end, dtype, shape = self._parts[name]
        count = len(memory) // self.bytes
        return memory.view(count, self.bytes)[:, begin:end].view(dtype).view(count, *shape)

    def fill(self, memory: torch.Tensor, n: int, latents: torch.Tensor, tokens: Tokens) -> None:
        """Put in sample ``n``."""
        self._part(memory, "latents")[n] = latents
        for place, name in enumerate(self.text):
            self._part(memory, "counts")[n, place] = len(tokens[name])
            self._part(memory, f"text.{name}")[n, : len(tokens[name])] = tokens[name]

    def clear(self, memory: torch.Tensor, n: int) -> None:
        """Make a hole of sample ``n``."""
        self._part(memory, "latents")[n] = 0
        self._part(memory, "counts")[n] = 0

    def read(self, memory: torch.Tensor) -> tuple[torch.Tensor, States | None]:
        """The latents (B, C, T, h, w), and the states where there are any."""
        padded = {name: self._part(memory, f"text.{name}") for name in self.text}
        states = States(padded, self._part(memory, "counts")) if padded else None
        return self._part(memory, "latents"), states


def has_bucket(about: Latents, bucket: BucketConfig, fps: float) -> bool:
    """Whether latents were made for a bucket at that rate; an image has none."""
    shape = (bucket.frames, bucket.height, bucket.width, 0.0 if bucket.frames == 1 else fps)
    return any((one.frames, one.height, one.width, one.fps) == shape for one in about.buckets)


def refuse_other_buckets(index: Index, stages: Sequence[StageConfig]) -> None:
    """Raises:
    UserError: a stage has a bucket that the latents were not made for, at its rate.
    """
    for stage in stages if index.latents else ():
        for bucket in stage.buckets:
            if not has_bucket(described(index), bucket, stage.fps):
                made = ", ".join(map(str, described(index).buckets))
                raise UserError(
                    f"stages.{stage.name}.buckets: data.path={index.path} holds no latents for {bucket} at "
                    f"fps={stage.fps:g}, but for {made}; make them with: {MAKE.format(out='DIR')} stage={stage.name}"
                )


def refuse_other_latents(index: Index, fingerprint: str, autoencoder_path: str, holdout_share: float) -> None:
    """Raises:
    UserError: the latents are another autoencoder's, or another share of the clips was held out of them.
    """
    about = described(index)
    if about.autoencoder != fingerprint:
        raise UserError(
            f"data.path={index.path} holds latents of another autoencoder (fingerprint {about.autoencoder[:12]}) than "
            f"autoencoder.path={autoencoder_path} ({fingerprint[:12]}); name that one, or make latents of this one: "
            f"{MAKE.format(out='DIR')}"
        )
    if about.holdout_share != holdout_share:
        raise UserError(
            f"data.holdout_share={holdout_share:g}, but the latents in data.path={index.path} were made with "
            f"{about.holdout_share:g}, which decides their windows; set data.holdout_share={about.holdout_share:g}"
        )


def refuse_latents(index: Index, key: str) -> None:
    """Raises:
    UserError: the shards hold latents, and pixels are needed. ``key`` names them, as 'data=DIR'.
    """
    if index.latents is not None:
        raise UserError(f"{key} holds latents, and this needs the shards of clips that they were made of")
