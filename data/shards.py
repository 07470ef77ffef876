"""WebDataset tar shards with an index: written by ``write_shards``, read by offset with ``read_member``.

A folder of shards holds shard-000000.tar, ... (KEY.mp4 or KEY.png and so on, beside KEY.txt or KEY.json; any WebDataset
reader takes them) and index.json, which is written last: a folder without it is not finished.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import webdataset
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.decode import BadSample, ClipInfo
from lingen.errors import UserError
from lingen.files import rename, sync, write_file

INDEX = "index.json"
# Seconds before a read is tried again: a file server may be away for a moment.
PAUSES = (0.1, 0.4, 1.6)
PARTIAL_INDEX = "index.partial.json"  # what a run that was stopped had written until then

Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Bytes = Annotated[int, Field(ge=1, lt=1 << 62)]  # ... and a Place together fit an int64
Place = Annotated[int, Field(ge=0, lt=1 << 62)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _ShardEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    bytes: int


class _Columns(BaseModel):
    """One list a column, one place a sample."""

    model_config = ConfigDict(extra="forbid")
    key: list[str] = []
    caption: list[str] = []
    frames: list[Count] = []
    fps: list[Rate] = []
    height: list[Count] = []
    width: list[Count] = []
    bytes: list[Bytes] = []
    shard: list[Place] = []
    offset: list[Place] = []
    sha256: list[str] = []


class _IndexFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal["lingen-shards-1"] = "lingen-shards-1"
    shards: list[_ShardEntry] = []
    samples: _Columns = _Columns()


class LostShard(UserError):
    """A shard that is gone, cut or on a disk that fails, as opposed to one with damaged samples (``BadSample``)."""


@dataclass(frozen=True)
class Index:
    """What the shards hold, a column each; N samples."""

    path: Path  # the folder
    shards: list[str]
    key: list[str]
    caption: list[str]
    frames: npt.NDArray[np.int64]  # (N,); 1 for an image
    fps: npt.NDArray[np.float64]  # (N,); (frames - 1) / fps is the time from the first to the last; 0 for an image
    height: npt.NDArray[np.int64]  # (N,)
    width: npt.NDArray[np.int64]  # (N,)
    bytes: npt.NDArray[np.int64]  # (N,) of the media
    shard: npt.NDArray[np.int64]  # (N,) place in ``shards``
    offset: npt.NDArray[np.int64]  # (N,) of the media in its shard
    sha256: list[str]
    fingerprint: str  # sha256 of the file index.json

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def shard_paths(self) -> list[Path]:
        return [self.path / name for name in self.shards]

    @cached_property
    def key_hash(self) -> npt.NDArray[np.uint64]:
        """(N,) the first eight bytes of each key's BLAKE2b; counted once, since ten million take seconds."""
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in self.key)
        return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


@dataclass(frozen=True)
class Record:
    """One sample to write. ``sidecar`` is the caption's suffix and bytes: ("txt", b"a red circle")."""

    key: str
    caption: str
    media: bytes
    suffix: str  # of the media, without a dot
    info: ClipInfo
    sidecar: tuple[str, bytes]


@dataclass(frozen=True)
class Summary:
    """What ``write_shards`` wrote."""

    samples: int
    shards: int
    bytes: int


def load_index(path: str | Path) -> Index:
    """Read DIR/index.json and check it against the shards beside it.

    Raises:
        UserError: the folder, the index or a shard is missing, damaged or empty, or a shard has another size.
    """
    folder = Path(path)
    file = folder / INDEX
    if not file.is_file():
        found = (
            f"it holds {PARTIAL_INDEX}, a run that was stopped" if (folder / PARTIAL_INDEX).exists() else "no such file"
        )
        raise UserError(
            f"data.path={path}: {file} is missing ({found}); write it with: "
            f"python scripts/make_shards.py input=DIR output={path}"
        )
    content = file.read_bytes()
    try:
        index = _IndexFile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"data.path={path}: {file} is damaged ({where}: {first['msg']}); write the shards again"
        ) from error
    _check(folder, index)
    samples = index.samples
    columns: dict[str, Any] = {name: getattr(samples, name) for name in type(samples).model_fields}
    for name in ("frames", "height", "width", "bytes", "shard", "offset"):
        columns[name] = np.array(columns[name], dtype=np.int64)
    columns["fps"] = np.array(columns["fps"], dtype=np.float64)
    return Index(
        path=folder,
        shards=[shard.name for shard in index.shards],
        fingerprint=hashlib.sha256(content).hexdigest(),
        **columns,
    )


def _check(folder: Path, index: _IndexFile) -> None:
    """The columns fit together, and every shard is there, whole."""
    where, samples = f"data.path={folder}", index.samples
    count = len(samples.key)
    if any(len(getattr(samples, name)) != count for name in type(samples).model_fields):
        raise UserError(f"{where}: {INDEX} is damaged (its columns have different lengths); write the shards again")
    if not count:
        raise UserError(f"{where}: {INDEX} lists no sample; write the shards again from a folder with clips")
    for shard in index.shards:
        file = folder / shard.name
        if Path(shard.name).name != shard.name:
            raise UserError(f"{where}: {INDEX} names the shard '{shard.name}', which is not inside the folder")
        if not file.is_file():
            raise UserError(f"{where}: the shard {file} is missing; copy it again or write the shards again")
        if file.stat().st_size != shard.bytes:
            raise UserError(
                f"{where}: the shard {file} has {file.stat().st_size} bytes where {INDEX} says {shard.bytes}: "
                "it was cut or changed; copy it again or write the shards again"
            )
    sizes = np.array([shard.bytes for shard in index.shards] or [0])
    place = np.array(samples.shard)
    ends = np.array(samples.offset) + np.array(samples.bytes)
    if (place >= len(index.shards)).any() or (ends > sizes[place]).any():
        raise UserError(f"{where}: {INDEX} is damaged (it places samples outside their shards); write the shards again")
    if ((np.array(samples.fps) > 0) != (np.array(samples.frames) > 1)).any():
        raise UserError(f"{where}: {INDEX} is damaged (it has videos without a rate); write the shards again")


def read_member(index: Index, i: int, *, verify: bool = True) -> bytes:
    """The media of sample ``i``: one read at its offset, checked against its sha256 where ``verify``.

    Raises:
        BadSample: the bytes are not those that were written.
        LostShard: there are no such bytes, also after some pauses.
    """
    media = _read(index.shard_paths[index.shard[i]], int(index.bytes[i]), int(index.offset[i]))
    if verify and hashlib.sha256(media).hexdigest() != index.sha256[i]:
        raise BadSample("wrong checksum")
    return media


def _read(path: Path, size: int, offset: int) -> bytes:
    problem = ""
    for attempt, pause in enumerate((0.0, *PAUSES)):
        if attempt == 1:
            print(f"{path}: {problem}; trying again for {sum(PAUSES):.1f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        try:
            with path.open("rb", buffering=0) as shard:
                media = os.pread(shard.fileno(), size, offset)
        except OSError as error:
            problem = error.strerror or str(error)
            continue
        if len(media) == size:
            return media
        problem = f"it was cut: it ends at byte {offset + len(media)}, inside a sample that ends at {offset + size}"
    raise LostShard(f"shard {path} cannot be read: {problem}")


def write_shards(
    records: Iterable[Record], output: str | Path, *, samples_per_shard: int = 256, shard_bytes: int = 1 << 30
) -> Summary:
    """Write samples, in their order, as shards with an index.

    A shard is closed at ``samples_per_shard`` samples or ``shard_bytes`` bytes of media. Keys must be distinct and
    without dots (WebDataset ends a key at its first dot). Where ``records`` raises, what came before is kept: the
    shard under way is closed, index.partial.json lists all samples (renamed to index.json it is a good index), and the
    error goes on.

    Raises:
        UserError: ``output`` holds something already, or there is no record at all.
    """
    folder = Path(output)
    refuse_used(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder, samples_per_shard, shard_bytes)
    try:
        for record in records:
            writer.add(record)
    except BaseException:
        if writer.samples.key:
            writer.finish(PARTIAL_INDEX)
        raise
    if not writer.samples.key:
        raise UserError(f"output={output}: there is no sample to write")
    return writer.finish(INDEX)


def refuse_used(output: Path) -> None:
    """Raises:
    UserError: the folder holds shards or an index; nothing is ever written over.
    """
    if any(output.glob("shard-*.tar")) or any((output / name).exists() for name in (INDEX, PARTIAL_INDEX)):
        raise UserError(
            f"output={output} already holds shards; choose another folder, or remove this one to write it again"
        )


class _Writer:
    """The shard under way has the suffix .tmp; it gets its name when it is whole and on the disk."""

    def __init__(self, folder: Path, samples_per_shard: int, shard_bytes: int) -> None:
        self.folder, self.samples_per_shard, self.shard_bytes = folder, samples_per_shard, shard_bytes
        self.shards: list[_ShardEntry] = []
        self.samples = _Columns()
        self.stream: BinaryIO | None = None
        self.media_names: list[str] = []  # of the shard under way
        self.media_bytes = 0

    def add(self, record: Record) -> None:
        if not record.key or "." in record.key:
            raise ValueError(f"key '{record.key}' is empty or has a dot, where WebDataset would end it")
        if self.stream is None:
            self.stream = self._temporary().open("wb")
            # PAX has no limit on names; a fixed time makes equal input give equal shards.
            self.tar = webdataset.TarWriter(self.stream, encoder=False, mtime=0, format="PAX_FORMAT")
        suffix, caption = record.sidecar
        self.tar.write({"__key__": record.key, record.suffix: record.media, suffix: caption})
        self.media_names.append(f"{record.key}.{record.suffix}")
        self.media_bytes += len(record.media)
        row = {
            "key": record.key,
            "caption": record.caption,
            **asdict(record.info),
            "bytes": len(record.media),
            "shard": len(self.shards),
            "sha256": hashlib.sha256(record.media).hexdigest(),
        }
        for name, value in row.items():
            getattr(self.samples, name).append(value)
        if len(self.media_names) == self.samples_per_shard or self.media_bytes >= self.shard_bytes:
            self.close_shard()

    def close_shard(self) -> None:
        if self.stream is None:
            return
        self.tar.close()
        sync(self.stream)
        self.stream.close()
        self.stream = None
        path = self._temporary()
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        self.samples.offset.extend(offsets[name] for name in self.media_names)
        self.media_names, self.media_bytes = [], 0
        name = path.name.removesuffix(".tmp")
        self.shards.append(_ShardEntry(name=name, bytes=path.stat().st_size))
        rename(path, self.folder / name)

    def finish(self, name: str) -> Summary:
        self.close_shard()
        index = _IndexFile(shards=self.shards, samples=self.samples)
        write_file(self.folder / name, index.model_dump_json().encode())
        return Summary(len(self.samples.key), len(self.shards), sum(shard.bytes for shard in self.shards))

    def _temporary(self) -> Path:
        return self.folder / f"shard-{len(self.shards):06d}.tar.tmp"
