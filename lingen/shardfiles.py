"""Optimizer fragments as safetensors files: one a rank, readable at any other world size or ZeRO level.

A file holds flat fp32 pieces under the keys ``KIND/PARAMETER`` (kinds: master, ema, exp_avg, exp_avg_sq); its metadata
say for each parameter its whole shape and where the piece starts. Pieces of all files together cover every parameter.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lingen.ema import Ema
from lingen.engine import Fragment

KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")


class Damaged(Exception):
    """A checkpoint is not what its manifest or its layout says; the message tells what is wrong."""


def write_shard(path: Path, fragments: list[Fragment], ema: Ema) -> dict[str, Any]:
    """Write this rank's fragments and make them last. Returns the file's size and sha256."""
    tensors: dict[str, torch.Tensor] = {}
    for f in fragments:
        parts = (f.master, ema.averages[f.name], f.exp_avg, f.exp_avg_sq)
        for kind, part in zip(KINDS, parts, strict=True):
            # A copy, since safetensors refuses views that share one flat memory.
            tensors[f"{kind}/{f.name}"] = part.detach().to("cpu", copy=True)
    layout = {f.name: {"shape": list(f.shape), "start": f.start} for f in fragments}
    save_file(tensors, path, metadata={"layout": json.dumps(layout)})
    sync(path)
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def write_synced(path: Path, text: str) -> None:
    """Write a small file and make it last."""
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
                shape = tuple(where["shape"])
                sizes = {tuple(file.get_slice(f"{kind}/{name}").get_shape()) for kind in KINDS}
                if len(sizes) != 1 or self.shapes.setdefault(name, shape) != shape:
                    raise Damaged(f"{path.name} contradicts itself or another file about {name}")
                self._pieces.setdefault(name, []).append(_Piece(file, where["start"], prod(sizes.pop())))
                keys -= {f"{kind}/{name}" for kind in KINDS}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
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
