"""Optimizer fragments as safetensors files: one a rank, readable at any other world size or ZeRO level.

A file holds flat fp32 pieces under the keys ``KIND/PARAMETER`` (kinds: master, ema, exp_avg, exp_avg_sq); its metadata
say for each parameter its whole shape and where the piece starts. Pieces of all files together cover every parameter.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lingen.ema import Ema
from lingen.engine import Fragment
from lingen.files import sha256

KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")
CHUNK = 16 * 2**20  # bytes that are written at once

log = logging.getLogger(__name__)


class Damaged(Exception):
    """A checkpoint is not what its manifest or its layout says; the message tells what is wrong."""


@dataclass(frozen=True)
class Snapshot:
    """A rank's fragments at one moment, as its file will hold them. The optimizer may go on."""

    pieces: list[tuple[str, tuple[int, ...], int, int]]  # parameter, whole shape, start of the piece, its elements
    body: torch.Tensor  # (4 * elements,) fp32 on the CPU: piece after piece, of each its ``KINDS``

    def head(self) -> bytes:
        """What stands before the body in a safetensors file."""
        layout = {name: {"shape": list(shape), "start": start} for name, shape, start, _ in self.pieces}
        entries: dict[str, Any] = {"__metadata__": {"layout": json.dumps(layout)}}
        end = 0
        for name, _, _, length in self.pieces:
            for kind in KINDS:
                begin, end = end, end + length * self.body.itemsize
                entries[f"{kind}/{name}"] = {"dtype": "F32", "shape": [length], "data_offsets": [begin, end]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        return len(text).to_bytes(8, "little") + text


class Recorder:
    """Takes snapshots into memory that it keeps: 16 bytes for each element that this rank owns. One at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    @torch.no_grad()
    def take(self, fragments: list[Fragment], ema: Ema) -> Snapshot:
        """One copy of everything; the snapshot before this one is overwritten.

        Raises:
            RuntimeError: there is not enough memory.
        """
        on_gpu = any(f.master.is_cuda for f in fragments)
        needed = len(KINDS) * sum(f.master.numel() for f in fragments)
        if self._memory.numel() < needed:
            self._memory = torch.empty(0)  # let it go before more is asked for
            self._memory = _pinned(needed) if on_gpu else torch.empty(needed)
        end = 0
        for f in fragments:
            for part in (f.master, ema.averages[f.name], f.exp_avg, f.exp_avg_sq):
                begin, end = end, end + part.numel()
                self._memory[begin:end].copy_(part, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return Snapshot([(f.name, f.shape, f.start, f.master.numel()) for f in fragments], self._memory[:needed])


def _pinned(elements: int) -> torch.Tensor:
    """Memory that a GPU copies into at full speed, where the system grants it."""
    try:
        return torch.empty(elements, pin_memory=True)
    except RuntimeError as error:
        log.warning(
            "no %d bytes of pinned memory: the copy for a checkpoint will take longer (%s)", 4 * elements, error
        )
        return torch.empty(elements)


def write_shard(path: Path, snapshot: Snapshot, moved: Callable[[], None]) -> dict[str, Any]:
    """Write a snapshot, make it last and read it back. Returns the file's size and sha256.

    ``moved`` is called before each part of the file; what it raises ends the writing.

    Raises:
        OSError: it cannot be written, or reads back as something else.
    """
    digest = hashlib.sha256()
    body = snapshot.body.view(torch.uint8).numpy().data
    try:
        with path.open("wb", buffering=0) as file:
            for part in (memoryview(snapshot.head()), *(body[i : i + CHUNK] for i in range(0, len(body), CHUNK))):
                moved()
                digest.update(part)
                while part:  # a write may be cut short, as by a disk that is almost full
                    part = part[file.write(part) :]
            os.fsync(file.fileno())
            if sys.platform == "linux":  # so that it is read from the disk, and shards keep their place in memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        moved()
        if sha256(path) != digest.hexdigest():
            raise OSError(errno.EIO, "reads back as something else than was written")
    except OSError as error:
        error.filename = str(path)  # not every call tells
        raise
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class _Piece:
    file: Any  # an open safetensors file
    start: int
    length: int


class ShardReader:
    """Reads any range of any parameter out of a checkpoint's files, without loading the rest. A context manager."""

    def __init__(self, paths: list[Path]) -> None:
        """Opens the files and reads their headers.

        Raises:
            Damaged: a file is no safetensors file of ours, or the pieces do not cover each parameter exactly once.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._open = ExitStack()
        try:
            for path in paths:
                self._add(path)
            self._check_cover()
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """Elements [start, start + length) of a flattened parameter: (length,) fp32 on the CPU."""
        out = torch.empty(length)
        for piece in self._pieces[name]:
            low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
            if low < high:
                part = piece.file.get_slice(f"{kind}/{name}")[low - piece.start : high - piece.start]
                out[low - start : high - start] = part
        return out

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        """Every parameter in its shape, on the CPU."""
        return {name: self.read(kind, name, 0, prod(shape)).view(shape) for name, shape in self.shapes.items()}

    def _add(self, path: Path) -> None:
        try:
            file = self._open.enter_context(safe_open(path, framework="pt"))
            keys = set(file.keys())
            for name, where in json.loads(file.metadata()["layout"]).items():
                shape, start = tuple(int(n) for n in where["shape"]), int(where["start"])
                sizes = {tuple(file.get_slice(f"{kind}/{name}").get_shape()) for kind in KINDS}
                if len(sizes) != 1 or self.shapes.setdefault(name, shape) != shape:
                    raise Damaged(f"{path.name} contradicts itself or another file about {name}")
                self._pieces.setdefault(name, []).append(_Piece(file, start, prod(sizes.pop())))
                keys -= {f"{kind}/{name}" for kind in KINDS}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{path.name} cannot be read: {error}") from error
        if keys:
            raise Damaged(f"{path.name} holds tensors outside of its layout, such as {min(keys)}")

    def _check_cover(self) -> None:
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda p: p.start)
            end = 0
            for piece in pieces:
                if piece.start != end:
                    raise Damaged(f"the pieces of {name} do not join at element {end}")
                end += piece.length
            if end != prod(self.shapes[name]):
                raise Damaged(f"the pieces of {name} end at element {end} of {prod(self.shapes[name])}")
