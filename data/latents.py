"""Latent shards: what an autoencoder made of each clip's window, and perhaps the text encoders' states of its caption.

A member KEY.safetensors holds ``latents`` (C, T, h, w) and, by encoder, ``text.NAME`` (N, S): N tokens of S numbers.
index.json says with which networks, and for which buckets, they were made. Nothing in a shard is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save

from data.batch import Bucket, States, Tokens
from data.decode import BadSample
from data.index_file import Latents
from data.shards import Index, from_shard, read_at, read_beside, read_member
from lingen.config import BucketConfig, StageConfig
from lingen.errors import UserError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors calls them
ALIGNED = 64  # bytes
HEAD, MOST = 1 << 10, 1 << 20  # bytes in which a member's header mostly ends, and always
CHUNK = 1 << 19  # bytes that are summed before they leave the processor's cache
Bytes = npt.NDArray[np.uint8]
SUFFIX = "safetensors"  # of a member
EMPTY = f"empty.{SUFFIX}"  # the states of the empty caption, which stands for "no condition"
MAKE = "python scripts/precompute.py data=SHARDS out={out}"


def pack(latents: torch.Tensor | None, tokens: Tokens, autoencoder: str) -> bytes:
    """A member's bytes. ``autoencoder`` is the fingerprint: a member tells by itself what it is."""
    tensors = {f"text.{name}": states.contiguous() for name, states in tokens.items()}
    if latents is not None:
        tensors["latents"] = latents.contiguous()
    return save(tensors, {"autoencoder": autoencoder})


def read_into(memory: torch.Tensor, n: int, index: Index, i: int, layout: Layout, *, verify: bool = True) -> None:
    """Put sample ``i`` into place ``n`` of a batch's memory, straight from the disk: nothing is copied.

    Raises:
        BadSample: the bytes are not those that were written, or not of the shape and type that the index says.
        LostShard: the shard cannot be read.
    """
    size = int(index.bytes[i])

    def from_disk(handle: int, offset: int) -> int:
        return layout.fill(memory, n, size, lambda part, at: read_at(handle, part, offset + at), verify=verify)

    try:
        if from_shard(index, i, from_disk) == described(index).checks[i] or not verify:
            return
    except BadSample:
        if not verify:
            raise
    content = read_member(index, i)  # whose sha256 decides, and which fetches a shard again

    def from_content(part: memoryview, at: int) -> None:
        part[:] = content[at : at + len(part)]

    layout.fill(memory, n, size, from_content)


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
        _refuse_others(_header(content[8 : 8 + int.from_bytes(content[:8], "little")]), about, None)
        return {name.removeprefix("text."): states for name, states in load(content).items()}
    except (OSError, BadSample) as error:
        raise UserError(f"data.path={index.path}: {path} cannot be read ({error}); copy it again") from error


def check_of(content: bytes) -> int:
    """The sum of the bytes as little-endian words of 64 bits, modulo 2**64; the last word is filled up with zeros.

    It finds what disks and networks do (a changed bit, zeros, other bytes in the place of some), at memory's speed.
    """
    return _sum(np.frombuffer(content, np.uint8), 0) % 2**64


def _sum(part: Bytes, at: int) -> int:
    """What the bytes from place ``at`` on add to ``check_of`` their whole."""
    before = min(-at % 8, len(part))  # bytes of a word that began in another part
    words = (len(part) - before) // 8
    behind = part[before + 8 * words :]
    total = int(part[before : before + 8 * words].view("<u8").sum(dtype=np.uint64))
    return total + int.from_bytes(behind, "little") + (int.from_bytes(part[:before], "little") << at % 8 * 8)


def described(index: Index) -> Latents:
    """How an index's latents were made.

    Raises:
        ValueError: it holds none.
    """
    if index.latents is None:
        raise ValueError(f"{index.path} holds no latents")
    return index.latents


class Stored(NamedTuple):
    """A tensor in a member: ``bytes`` of them, from ``begin`` on behind the header."""

    dtype: torch.dtype | None  # None: not one of ours
    shape: tuple[int, ...]
    begin: int
    bytes: int


@lru_cache(maxsize=1024)
def _header(content: bytes) -> dict[str, Stored]:
    """The tensors that a safetensors header names, in their order in the file, where they lie side by side."""
    tensors, end = {}, 0
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, behind) = TYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            count = math.prod(shape) * dtype.itemsize if dtype else behind - begin
            if begin != end or behind - begin != count or not all(type(side) is int and side >= 0 for side in shape):
                raise ValueError(f"{name} has bytes {begin} to {behind}, not {end} to {end + count}")
            tensors[name], end = Stored(dtype, shape, begin, count), behind
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSample("no safetensors", str(error)[:200]) from error
    return tensors


def _refuse_others(tensors: Mapping[str, Stored], about: Latents, shape: tuple[int, ...] | None) -> None:
    """Raises:
    BadSample: these are not latents of this shape, or not none where it is None, with states as the index says.
    """
    latents = tensors.get("latents")
    if (latents and latents[:2]) != (shape and (DTYPES[about.dtype], shape)):
        found = f"{latents.shape} {latents.dtype}" if latents else "none"
        raise BadSample("other latents", f"{found}, where the index says {shape} {about.dtype}")
    states = {name: one for name, one in tensors.items() if name != "latents"}
    if set(states) != {f"text.{name}" for name in about.text}:
        raise BadSample("other latents", f"it has {sorted(states)}, where the index says text {sorted(about.text)}")
    for name, stored in about.text.items():
        dtype, size, *_ = states[f"text.{name}"]
        if dtype != DTYPES[stored.dtype] or len(size) != 2 or size[0] > stored.length or size[1] != stored.dim:
            raise BadSample("other latents", f"text.{name} is {size} {dtype}")


Read = Callable[[memoryview, int], None]  # fill a buffer with a member's bytes from a place on


class Layout:
    """Where the samples of a batch lie in one block of memory, so that a worker can fill them in: of each sample the
    number of tokens of each encoder, the latents, and each encoder's states in room for the longest caption, where
    anything may lie behind the last token."""

    def __init__(self, about: Latents, bucket: Bucket) -> None:
        self.shape = about.shape(bucket.frames, bucket.height, bucket.width)
        self.about, self.text = about, about.text
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

    def fill(self, memory: torch.Tensor, n: int, size: int, read: Read, *, verify: bool = False) -> int:
        """Put in sample ``n``, a member of ``size`` bytes.

        Returns:
            ``check_of`` the member, if ``verify``; else nothing of use.

        Raises:
            BadSample: it is not as the index says.
        """
        head = np.empty(min(size, HEAD), np.uint8)
        read(head.data, 0)
        begin = 8 + int.from_bytes(head[:8], "little")
        if not 8 < begin <= min(size, MOST):
            raise BadSample("no safetensors", f"a header of {begin - 8} bytes in {size}")
        if begin > len(head):
            head = np.empty(begin, np.uint8)
            read(head.data, 0)
        tensors = _header(head[8:begin].tobytes())
        if size != begin + sum(one.bytes for one in tensors.values()):
            raise BadSample("no safetensors", f"its tensors do not have {size - begin} bytes")
        _refuse_others(tensors, self.about, self.shape)
        place = memory.numpy()[n * self.bytes : (n + 1) * self.bytes]
        total = _sum(head[:begin], 0)
        for name, one in tensors.items():
            for at in range(0, one.bytes, CHUNK):
                part = place[self._parts[name][0] :][at : min(at + CHUNK, one.bytes)]
                read(part.data, begin + one.begin + at)
                total += _sum(part, begin + one.begin + at) if verify else 0
        for at, name in enumerate(self.text):
            self._part(memory, "counts")[n, at] = tensors[f"text.{name}"].shape[0]
        return total % 2**64

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
