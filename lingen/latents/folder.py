"""The folder that latents go into: what is whole in it, who writes which shard, and the index at the end.

    precompute.json    what is to be made, and with what; written first
    parts/NNNNNN.json  the rows of a shard, written when it is whole
    index.json         written last, from the parts, which are then removed

Any number of processes write side by side, each a shard at a time that it has locked. None waits for another; whoever
finds that all is there writes the index.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from data.index_file import INDEX, Columns, IndexFile, Latents, ShardEntry
from data.latents import EMPTY
from data.shards import PLAN, load_index
from lingen.autoencoder_config import TileConfig
from lingen.errors import UserError
from lingen.files import write_file

PARTS, LOCK = "parts", ".lock"
REPORT, REJECTED = "report.json", "rejected.jsonl"
BEGINNING = 1 << 40  # the byte of the lock that is no shard's


class Plan(BaseModel):
    """What the folder is to hold. Two runs of one plan write the same bytes."""

    model_config = ConfigDict(extra="forbid")
    latents: Latents
    samples: int  # windows of clips, good or bad
    samples_per_shard: int
    batch_size: int
    autoencoder_dtype: str  # with the tiles: the same latent space, but other bits
    tile: TileConfig | None


class Rejected(BaseModel):
    """A clip that gave no latents for a bucket."""

    model_config = ConfigDict(extra="forbid")
    key: str
    bucket: str
    reason: str
    detail: str


class Part(BaseModel):
    """What one unit gave."""

    model_config = ConfigDict(extra="forbid")
    shard: ShardEntry | None = None  # None: nothing in it was good
    rows: Columns = Columns()
    rejected: list[Rejected] = []
    numbers: int = 0  # latent numbers a channel
    checks: list[int] = []  # of each row's bytes
    sources: list[tuple[float, int, int]] = []  # of each row's clip: seconds, height, width
    sums: list[float] = []  # of each channel
    squares: list[float] = []

    def count(self, latents: torch.Tensor) -> None:
        """Add (C, T, h, w) to the statistics."""
        each = latents.double().flatten(1)  # (C, N)
        before = zip(self.sums or [0.0] * len(each), self.squares or [0.0] * len(each), strict=True)
        sums, squares = each.sum(1).tolist(), each.square().sum(1).tolist()
        both = [(a + c, b + d) for (a, b), c, d in zip(before, sums, squares, strict=True)]
        self.sums, self.squares = [a for a, _ in both], [b for _, b in both]
        self.numbers += each.shape[1]


class Folder:
    """``out``, opened for a plan."""

    def __init__(self, out: str, plan: Plan, empty: bytes) -> None:
        """``empty`` is the content of the file of the empty caption's states; none is written where it is empty.

        Raises:
            UserError: something else lies there.
        """
        self.path, self.plan = Path(out), plan
        self._good: set[int] = set()
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT)
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, BEGINNING)
        try:
            self._begin(out, empty)
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, BEGINNING)

    def _begin(self, out: str, empty: bytes) -> None:
        file, wanted = self.path / PLAN, self.plan.model_dump_json(indent=1).encode()
        if not file.exists():
            if any(self.path.glob("*.tar")) or (self.path / INDEX).exists():
                raise UserError(f"out={out} holds other shards; choose another folder")
            (self.path / PARTS).mkdir(exist_ok=True)
            if empty:
                write_file(self.path / EMPTY, empty)
            write_file(file, wanted)
            return
        try:
            before = Plan.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise UserError(f"out={out}: {PLAN} is damaged; remove this folder to write it again") from error
        other = _differences(before, self.plan)
        if other:
            raise UserError(f"out={out} was begun with {'; '.join(other)}; choose another folder, or remove this one")

    def close(self) -> None:
        """Let go of the locks; no claims after that."""
        os.close(self._lock)
        if self.complete:
            (self.path / LOCK).unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Whether the index is written."""
        return (self.path / INDEX).exists()

    def has(self, number: int) -> bool:
        """Whether a unit's shard and rows are there."""
        if number not in self._good and self._part(number).exists():
            shard = self.part(number).shard
            file = self.path / shard.name if shard else None
            if file is None or shard is None or (file.is_file() and file.stat().st_size == shard.bytes):
                self._good.add(number)
        return number in self._good

    def claim(self, number: int) -> bool:
        """Whether a unit is this process's to make now: not there, and nobody else's. It is until ``release``."""
        if self.complete or self.has(number):
            return False
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        if self.complete or self.has(number):
            self.release(number)
            return False
        return True

    def release(self, number: int) -> None:
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, number)

    def add(self, number: int, part: Part) -> None:
        """Tell of a unit whose shard is on the disk."""
        write_file(self._part(number), part.model_dump_json().encode())
        self._good.add(number)

    def part(self, number: int) -> Part:
        """Raises:
        UserError: it is damaged.
        """
        try:
            return Part.model_validate_json(self._part(number).read_bytes())
        except ValidationError as error:
            raise UserError(f"{self._part(number)} is damaged; remove it and run this again") from error

    def _part(self, number: int) -> Path:
        return self.path / PARTS / f"{number:06d}.json"

    def finish(self, units: int, max_bad_share: float) -> bool:
        """Write the index where all units are there; whether it is written.

        Raises:
            UserError: more than ``max_bad_share`` of the samples are bad, or all of them.
        """
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, BEGINNING)
        try:
            if not self.complete and all(self.has(number) for number in range(units)):
                self._write_index([self.part(number) for number in range(units)], max_bad_share)
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, BEGINNING)
        return self.complete

    def _write_index(self, parts: list[Part], max_bad_share: float) -> None:
        rejected = [one for part in parts for one in part.rejected]
        lines = "".join(one.model_dump_json() + "\n" for one in rejected)
        write_file(self.path / REJECTED, lines.encode(errors="replace"))
        reasons = dict(Counter(one.reason for one in rejected).most_common())
        if len(rejected) > max(max_bad_share * self.plan.samples, 1.0 if max_bad_share else 0.0):
            raise UserError(
                f"{len(rejected)} of {self.plan.samples} samples are bad ({reasons}), more than "
                f"data.max_bad_share={max_bad_share:g}; {self.path / REJECTED} names them"
            )
        checks = [check for part in parts for check in part.checks]
        sources = [source for part in parts for source in part.sources]
        more = {"checks": checks, "sources": sources, **statistics(parts)}
        latents = self.plan.latents.model_copy(update=more)
        index = IndexFile(latents=latents)
        for part in parts:
            if part.shard is not None:
                part.rows.shard = [len(index.shards)] * len(part.rows.key)
                index.shards.append(part.shard)
                index.samples.extend(part.rows)
        if not index.samples.key:
            raise UserError(f"out={self.path}: no sample gave latents ({reasons}); {self.path / REJECTED} names them")
        write_file(self.path / REPORT, json.dumps(report(index, reasons), indent=2).encode() + b"\n")
        write_file(self.path / INDEX, index.to_json())
        load_index(self.path)  # which looks at the shards once more
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        for left in self.path.glob("*.tmp"):  # of processes that were killed
            left.unlink(missing_ok=True)


def statistics(parts: list[Part]) -> dict[str, list[float]]:
    """``mean`` and ``std`` of each channel over all latents, in the order of the parts."""
    counted = [part for part in parts if part.numbers]
    numbers = max(1, sum(part.numbers for part in counted))
    sums = [sum(each) for each in zip(*(part.sums for part in counted), strict=True)]
    squares = [sum(each) for each in zip(*(part.squares for part in counted), strict=True)]
    mean = [one / numbers for one in sums]
    std = [max(one / numbers - m * m, 0.0) ** 0.5 for one, m in zip(squares, mean, strict=True)]
    return {"mean": mean, "std": std}


def report(index: IndexFile, reasons: dict[str, int]) -> dict[str, Any]:
    """report.json."""
    assert index.latents is not None
    samples = index.samples
    shapes = Counter(zip(samples.frames, samples.height, samples.width, samples.fps, strict=True))
    return {
        "samples": len(samples.key),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "rejected": reasons,
        "buckets": {str(b): shapes[b.frames, b.height, b.width, b.fps] for b in index.latents.buckets},
        "mean": index.latents.mean,
        "std": index.latents.std,
    }


def _differences(before: Plan, now: Plan) -> list[str]:
    """'NAME=OLD, not NEW', for each that differs."""
    old, new = ({**plan.model_dump(mode="json"), **plan.model_dump(mode="json")["latents"]} for plan in (before, now))
    names = [name for name in new if name != "latents" and old[name] != new[name]]
    return [f"{name}={_short(old[name])}, not {_short(new[name])}" for name in names]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
