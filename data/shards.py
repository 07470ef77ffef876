"""WebDataset tar shards with an index: written by ``write_shards``, read by offset with ``read_member``.

A folder of shards holds shard-000000.tar, ... (KEY.mp4 or KEY.png and so on, beside KEY.txt or KEY.json; any WebDataset
reader takes them) and index.json, which is written last: a folder without it is not finished.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from data.decode import BadSample
from data.index_file import INDEX, PARTIAL_INDEX, Columns, IndexFile, Latents, ShardEntry
from data.remote import Source, Unreachable, is_remote, shown
from data.shelf import DEFAULT_BYTES, Shelf, default_folder
from data.writer import Record as Record
from data.writer import ShardWriter
from lingen.errors import UserError
from lingen.files import write_file

PLAN = "precompute.json"  # in a folder of latents: what is to be written there
# Seconds before a read is tried again: a file server may be away for a moment.
PAUSES = (0.1, 0.4, 1.6)
T = TypeVar("T")


class LostShard(UserError):
    """A shard that is gone, cut or on a disk that fails, as opposed to one with damaged samples (``BadSample``)."""


class Footage(NamedTuple):
    """Of each sample the clip that it is; of latents, the clip that they were made of. An image has 0 seconds."""

    seconds: npt.NDArray[np.float64]  # (N,) from the first frame to the last
    height: npt.NDArray[np.int64]  # (N,)
    width: npt.NDArray[np.int64]  # (N,)


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
    begin: npt.NDArray[np.float64]  # (N,) a sample is the frames in [begin, end) seconds after the media's first one
    end: npt.NDArray[np.float64]  # (N,) ... and 0 where it goes on to the media's own end
    fingerprint: str  # sha256 of the file index.json
    root: Path  # where the shards lie: ``path``, unless others wrote them
    latents: Latents | None = None  # how they were made, where the media are latents
    home: Source | None = None  # where index.json is, if it is remote; ``path`` then says so in words
    shelf: Shelf | None = None  # of the shards, if they are remote; ``root`` then says where in words

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def shard_paths(self) -> list[Path]:
        return [self.root / name for name in self.shards]

    @cached_property
    def footage(self) -> Footage:
        """What decides which bucket a sample belongs in."""
        if self.latents is not None:
            seconds, height, width = np.array(self.latents.sources, dtype=np.float64).T
            return Footage(seconds, height.astype(np.int64), width.astype(np.int64))
        still = self.frames == 1
        return Footage((self.frames - 1) / np.where(still, 1.0, self.fps), self.height, self.width)

    @cached_property
    def key_hash(self) -> npt.NDArray[np.uint64]:
        """(N,) the first eight bytes of the BLAKE2b of each key; counted once, since ten million take seconds.

        Of a key that names a part of a video ("clip@0-5000ms") only what is before the @ counts, so that all parts of
        a video lie on the same side of a split.
        """
        videos = (key.partition("@")[0] for key in self.key)
        digests = b"".join(hashlib.blake2b(video.encode(), digest_size=8).digest() for video in videos)
        return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


@dataclass(frozen=True)
class Summary:
    """What ``write_shards`` wrote."""

    samples: int
    shards: int
    bytes: int


def load_index(path: str | Path) -> Index:
    """Read PATH/index.json and check it against the shards beside it. PATH is a folder, or a base (``data.remote``).

    Raises:
        UserError: the folder, the index or a shard is missing, damaged or empty, or a shard has another size (of remote
            shards that is seen when they are fetched); a library for a base is missing.
    """
    home = Source(str(path)) if is_remote(path) else None
    folder = Path(shown(str(path)) if home else path)
    file = folder / INDEX
    try:
        content = home.read(INDEX) if home else _read_local(file)
    except Unreachable as error:
        raise UserError(f"data.path={shown(str(path))}: {error}") from error
    try:
        index = IndexFile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"data.path={folder}: {file} is damaged ({where}: {first['msg']}); write the shards again"
        ) from error
    samples = index.samples
    if not samples.begin and not samples.end:
        samples.begin, samples.end = [0.0] * len(samples.key), [0.0] * len(samples.key)
    base = index.root or (home.base if home else None)
    source = Source(base) if base is not None and is_remote(base) else None
    root = Path(shown(source.base) if source else base or folder)
    _check(folder, None if source else root, index)
    names, sizes = [shard.name for shard in index.shards], [shard.bytes for shard in index.shards]
    fingerprint = hashlib.sha256(content).hexdigest()
    columns: dict[str, Any] = {name: getattr(samples, name) for name in type(samples).model_fields}
    for name in ("frames", "height", "width", "bytes", "shard", "offset"):
        columns[name] = np.array(columns[name], dtype=np.int64)
    for name in ("fps", "begin", "end"):
        columns[name] = np.array(columns[name], dtype=np.float64)
    return Index(
        path=folder,
        root=root,
        latents=index.latents,
        home=home,
        shelf=Shelf(source, names, sizes, fingerprint, default_folder(), DEFAULT_BYTES) if source else None,
        shards=names,
        fingerprint=fingerprint,
        **columns,
    )


def _read_local(file: Path) -> bytes:
    """index.json; an error says how to write it."""
    folder = file.parent
    if not file.is_file():
        if (folder / PLAN).exists():
            raise UserError(f"data.path={folder}: its latents are not complete; run scripts/precompute.py as before")
        found = (
            f"it holds {PARTIAL_INDEX}, a run that was stopped" if (folder / PARTIAL_INDEX).exists() else "no such file"
        )
        raise UserError(
            f"data.path={folder}: {file} is missing ({found}); write it with: "
            f"python scripts/make_shards.py input=DIR output={folder}"
        )
    return file.read_bytes()


def _check(folder: Path, root: Path | None, index: IndexFile) -> None:
    """The columns fit together, and every shard is there, whole, below ``root`` (None: elsewhere)."""
    where, samples = f"data.path={folder}", index.samples
    count = len(samples.key)
    if any(len(getattr(samples, name)) != count for name in type(samples).model_fields):
        raise UserError(f"{where}: {INDEX} is damaged (its columns have different lengths); write the shards again")
    if index.latents is not None and not len(index.latents.checks) == len(index.latents.sources) == count:
        raise UserError(f"{where}: {INDEX} is damaged (it has not one check and one source a sample); write it again")
    if not count:
        raise UserError(f"{where}: {INDEX} lists no sample; write the shards again from a folder with clips")
    for shard in index.shards:
        inside = PurePosixPath(shard.name)
        if inside.is_absolute() or ".." in inside.parts:
            raise UserError(f"{where}: {INDEX} names the shard '{shard.name}', which is not inside the folder")
        if root is None:
            continue
        file = root / shard.name
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
    begin, end = np.array(samples.begin), np.array(samples.end)
    if ((end > 0) & (end <= begin)).any():
        raise UserError(f"{where}: {INDEX} is damaged (it has samples that end before they begin); write them again")


def read_member(index: Index, i: int, *, verify: bool = True) -> bytes:
    """The media of sample ``i``: one read at its offset, checked against its sha256 where ``verify``.

    Raises:
        BadSample: the bytes are not those that were written; of a remote shard, also after it was fetched once more.
        LostShard: there are no such bytes, also after some pauses.
    """
    media = _read(index, i)
    if verify and hashlib.sha256(media).hexdigest() != index.sha256[i]:
        if index.shelf is None or not index.shelf.forget(int(index.shard[i])):
            raise BadSample("wrong checksum")
        media = _read(index, i)
        if hashlib.sha256(media).hexdigest() != index.sha256[i]:
            raise BadSample("wrong checksum")
    return media


def read_beside(index: Index, name: str) -> bytes:
    """A small file that lies beside index.json.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return (index.path / name).read_bytes() if index.home is None else index.home.read(name)
    except Unreachable as error:
        raise OSError(str(error)) from error


def _read(index: Index, i: int) -> bytes:
    size = int(index.bytes[i])

    def whole(handle: int, offset: int) -> bytes:
        media = os.pread(handle, size, offset)
        _check_end(offset, len(media), size)
        return media

    return from_shard(index, i, whole)


def from_shard(index: Index, i: int, read: Callable[[int, int], T]) -> T:
    """What ``read(handle, offset)`` gives, with sample ``i``'s shard and its media's place there. Where it raises an
    OSError, it is called again after some pauses.

    Raises:
        LostShard: it raised one each time, or the shard cannot be opened.
    """
    shard, problem = int(index.shard[i]), ""
    path = index.shard_paths[shard]
    for attempt, pause in enumerate((0.0, *PAUSES)):
        if attempt == 1:
            print(f"{path}: {problem}; trying again for {sum(PAUSES):.1f} s", file=sys.stderr, flush=True)
        if pause:  # a sleep of none lets others go first
            time.sleep(pause)
        try:
            with path.open("rb", buffering=0) if index.shelf is None else index.shelf.open(shard) as stream:
                return read(stream.fileno(), int(index.offset[i]))
        except Unreachable as error:  # that took its own pauses
            raise LostShard(f"shard cannot be read: {error}") from error
        except OSError as error:
            problem = error.strerror or str(error)
    raise LostShard(f"shard {path} cannot be read: {problem}")


def read_at(handle: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer with what a file has at a place.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    _check_end(offset, os.preadv(handle, [buffer], offset), len(buffer))


def _check_end(offset: int, count: int, wanted: int) -> None:
    if count < wanted:
        raise OSError(f"it was cut: it ends at byte {offset + count}, inside a sample that ends at {offset + wanted}")


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
    writer, index = ShardWriter(folder), IndexFile()
    try:
        for record in records:
            writer.add(record)
            if len(writer.pending.key) >= samples_per_shard or writer.media_bytes >= shard_bytes:
                add_shard(index, writer.close())
    except BaseException as error:
        write_partial(folder, index, writer, whole=not isinstance(error, OSError))
        raise
    add_shard(index, writer.close())
    if not index.samples.key:
        raise UserError(f"output={output}: there is no sample to write")
    write_file(folder / INDEX, index.to_json())
    return Summary(len(index.samples.key), len(index.shards), sum(shard.bytes for shard in index.shards))


def add_shard(index: IndexFile, written: tuple[ShardEntry, Columns] | None) -> None:
    """Put what a writer closed behind the rest."""
    if written is not None:
        index.shards.append(written[0])
        index.samples.extend(written[1])


def write_partial(folder: Path, index: IndexFile, writer: ShardWriter, *, whole: bool) -> None:
    """Keep what a run wrote that stops here: ``whole`` closes the shard under way, else it is dropped, and
    index.partial.json lists the rest. A disk that is full may have no room for that either."""
    with suppress(OSError):
        try:
            if whole:
                add_shard(index, writer.close())
        finally:
            writer.drop()
        if index.samples.key:
            write_file(folder / PARTIAL_INDEX, index.to_json())


def refuse_used(output: Path) -> None:
    """Raises:
    UserError: the folder holds shards or an index; nothing is ever written over.
    """
    if any(output.glob("shard-*.tar")) or any((output / name).exists() for name in (INDEX, PARTIAL_INDEX)):
        raise UserError(
            f"output={output} already holds shards; choose another folder, or remove this one to write it again"
        )
