"""WebDataset tar shards, one after the other, and the rows of the index that tell where each sample lies."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import webdataset

from data.decode import ClipInfo
from data.index_file import Columns, ShardEntry
from lingen.files import rename, sync


@dataclass(frozen=True)
class Record:
    """One sample to write. ``sidecar`` is the caption's suffix and bytes: ("txt", b"a red circle")."""

    key: str
    caption: str
    media: bytes
    suffix: str  # of the media, without a dot
    info: ClipInfo
    sidecar: tuple[str, bytes]


class Window(NamedTuple):
    """A sample that is a part of a stored media: the frames in [begin, end) seconds after its first one; an end of 0
    is the media's own."""

    key: str
    caption: str
    info: ClipInfo  # of the part
    begin: float = 0.0
    end: float = 0.0


class ShardWriter:
    """Writes shard-000000.tar, ... into a folder, from the number ``first`` on.

    The shard under way has the suffix .tmp; it gets its name when it is whole and on the disk, and then its rows go
    from ``pending`` to ``ready``. Who writes decides when a shard ends (``close``).
    """

    def __init__(self, folder: Path, *, first: int = 0) -> None:
        self.folder, self.number = folder, first
        self.pending = Columns()  # all but the offsets
        self.media_bytes = 0  # in the shard under way
        self._names: list[str] = []  # of each pending row's media
        self._stream: BinaryIO | None = None

    def add(self, record: Record) -> None:
        """Write a sample that is a whole media."""
        window = Window(record.key, record.caption, record.info)
        self.add_media(record.key, record.media, record.suffix, record.sidecar, [window])

    def add_media(
        self,
        key: str,
        media: bytes,
        suffix: str,
        sidecar: tuple[str, bytes],
        windows: Sequence[Window],
        *,
        sha256: str | None = None,
    ) -> None:
        """Write one media, of which the checksum may be known, with its caption file, as the samples ``windows``.

        Keys must be distinct and without dots: WebDataset ends a key at its first dot.
        """
        if not key or "." in key:
            raise ValueError(f"key '{key}' is empty or has a dot, where WebDataset would end it")
        if self._stream is None:
            self._stream = self._temporary().open("wb")
            # PAX has no limit on names; a fixed time makes equal input give equal shards.
            self._tar = webdataset.TarWriter(self._stream, encoder=False, mtime=0, format="PAX_FORMAT")
        self._tar.write({"__key__": key, suffix: media, sidecar[0]: sidecar[1]})
        self.media_bytes += len(media)
        digest = sha256 or hashlib.sha256(media).hexdigest()
        for window in windows:
            self._names.append(f"{key}.{suffix}")
            add_row(self.pending, window, size=len(media), shard=self.number, sha256=digest)

    def close(self) -> tuple[ShardEntry, Columns] | None:
        """Finish the shard under way: its name and size, and its rows of the index. None where there is none."""
        if self._stream is None:
            return None
        self._tar.close()
        sync(self._stream)
        self._stream.close()
        self._stream = None
        path = self._temporary()
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        rows, self.pending = self.pending, Columns()
        rows.offset.extend(offsets[name] for name in self._names)
        self._names, self.media_bytes = [], 0
        shard = ShardEntry(name=path.name.removesuffix(".tmp"), bytes=path.stat().st_size)
        rename(path, self.folder / shard.name)
        self.number += 1
        return shard, rows

    def drop(self) -> None:
        """Forget the shard under way, as after an error of the disk."""
        if self._stream is not None:
            for part in (self._tar, self._stream):
                with suppress(OSError):  # what it still wanted to write
                    part.close()
            self._stream = None
        self._temporary().unlink(missing_ok=True)
        self.pending, self._names, self.media_bytes = Columns(), [], 0

    def _temporary(self) -> Path:
        return self.folder / f"shard-{self.number:06d}.tar.tmp"


def add_row(columns: Columns, window: Window, *, size: int, shard: int, sha256: str) -> None:
    """Put a sample behind the others; its offset is for the caller to add."""
    row = {
        "key": window.key,
        "caption": window.caption,
        **{name: value for name, value in asdict(window.info).items() if name in ("frames", "fps", "height", "width")},
        "bytes": size,
        "shard": shard,
        "sha256": sha256,
        "begin": window.begin,
        "end": window.end,
    }
    for name, value in row.items():
        getattr(columns, name).append(value)
