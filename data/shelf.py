"""Remote shards on a local disk: whole files, the least recently used of which make room.

All processes of a node share a folder. A shard is written aside under a lock and appears under its name when it is
whole, so that one process fetches it and the others wait. A shard that is removed while somebody reads it stays until
that reader closes it.

    CACHE/FINGERPRINT/shard-000000.tar[.part]    CACHE/locks/NNNN
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import quote

from data.keeper import start_process, wait_for
from data.remote import Source, Unreachable
from lingen.errors import UserError
from lingen.files import rename, sync

J = TypeVar("J")
DEFAULT_BYTES = 50 * 10**9
LOCKS = 1024  # files; two shards may share one
PART, FAILED = ".part", ".failed"
TRANSFERS = 4  # at a time, of those that are read ahead; fewer where the cache is small


def default_folder() -> Path:
    """A user's own, on the disk for temporary files, which is a node's own too."""
    return Path(tempfile.gettempdir()) / f"lingen-shards-{os.getuid()}"


@dataclass(frozen=True)
class Shelf:
    """The shards of one index."""

    source: Source
    names: Sequence[str]
    sizes: Sequence[int]
    fingerprint: str  # of the index, so that shards which were written again are other shards
    folder: Path
    limit: int  # bytes
    forgotten: set[int] = field(default_factory=set)  # by this process

    @property
    def room(self) -> int:
        """How many shards fit."""
        return self.limit // max(self.sizes)

    def moved(self, folder: str | None, gb: float, window_shards: int) -> Shelf:
        """This with other settings; None is the default folder.

        Raises:
            UserError: it could not hold the shards that are read and those that come next.
        """
        needed = sum(sorted(self.sizes)[-2 * window_shards :])
        if needed > gb * 1e9:
            raise UserError(
                f"data.cache_gb={gb:g}: two windows of data.window_shards={window_shards} shards take "
                f"{needed / 1e9:.3g} GB; set data.cache_gb={math.ceil(needed / 1e7) / 100:g}, or lower "
                "data.window_shards"
            )
        return replace(self, folder=Path(folder).expanduser() if folder else default_folder(), limit=int(gb * 1e9))

    def open(self, n: int) -> BinaryIO:
        """A shard, for reading; it is fetched where it is not there.

        Raises:
            Unreachable: it cannot be fetched.
            OSError: the folder cannot be written to.
        """
        path = self._path(n)
        while True:
            with suppress(FileNotFoundError):
                stream = path.open("rb", buffering=0)
                if os.fstat(stream.fileno()).st_size == self.sizes[n]:
                    os.utime(stream.fileno())  # it was used
                    return stream
                stream.close()
                path.unlink(missing_ok=True)  # a disk that was full, or somebody else
            self.fetch(n)

    def fetch(self, n: int, *, wait: bool = True) -> None:
        """Bring a shard. Without ``wait`` it is left to another process that is at it already.

        Raises:
            Unreachable: it cannot be fetched; where another process tried in vain meanwhile, at once.
            OSError: the folder cannot be written to.
        """
        path, since = self._path(n), time.time()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._shard_lock(path.name, wait=wait) as locked:
            if not locked or path.exists():
                return
            failed, part = path.with_name(path.name + FAILED), path.with_name(path.name + PART)
            with suppress(FileNotFoundError):
                if failed.stat().st_mtime >= since:
                    raise Unreachable(failed.read_text())
            self._make_room(part, self.sizes[n])
            try:
                self.source.download(self.names[n], self.sizes[n], part)
                with part.open("rb") as stream:
                    sync(stream)
                with self._lock("folder", wait=True):  # who counts the files meanwhile would miss it
                    rename(part, path)
                failed.unlink(missing_ok=True)
            except Unreachable as error:
                failed.write_text(str(error))
                raise
            finally:
                part.unlink(missing_ok=True)

    def forget(self, n: int) -> bool:
        """Have a shard fetched again, whose bytes are not what they should be; False if that was tried before."""
        first = n not in self.forgotten
        if first:
            self.forgotten.add(n)
            self._path(n).unlink(missing_ok=True)
        return first

    def _path(self, n: int) -> Path:
        return self.folder / self.fingerprint[:16] / quote(self.names[n], safe="")

    def _make_room(self, part: Path, size: int) -> None:
        """Set ``part`` to its size, which counts from now on, and remove what was not used for longest."""
        with self._lock("folder", wait=True):
            files = {}
            for file in self.folder.glob("*/*"):
                with suppress(FileNotFoundError):  # another process may remove it
                    if file.parent.name != "locks" and not file.name.endswith(FAILED):
                        files[file] = file.stat()
            left = sum(stat.st_size for file, stat in files.items() if file != part) + size - self.limit
            for file, stat in sorted(files.items(), key=lambda item: item[1].st_mtime):
                if left <= 0:
                    break
                if file != part and self._remove(file):
                    left -= stat.st_size
            part.unlink(missing_ok=True)  # a command whose reader was killed may still write to that file
            with part.open("wb") as stream:
                stream.truncate(size)

    def _remove(self, file: Path) -> bool:
        """Unless it is being written."""
        if not file.name.endswith(PART):
            file.unlink(missing_ok=True)
            return True
        with self._shard_lock(file.name.removesuffix(PART), wait=False) as abandoned:
            if abandoned:
                file.unlink(missing_ok=True)
            return abandoned

    def _shard_lock(self, name: str, *, wait: bool) -> AbstractContextManager[bool]:
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % LOCKS
        return self._lock(f"{number:04d}", wait=wait)

    @contextmanager
    def _lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Whether it was got; the kernel gives it back when a process dies."""
        path = self.folder / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


class ReadAhead:
    """A process that fetches shards before they are needed."""

    def __init__(self, shelf: Shelf) -> None:
        self._connection, self._process = start_process(_fetch_all, shelf)

    def before(self, jobs: Iterator[J], shards: Callable[[J], set[int]], distance: int) -> Iterator[J]:
        """The jobs, while the shards of those that come after are fetched: ``distance`` distinct ones."""
        coming: deque[J] = deque()
        needed: Counter[int] = Counter()  # by how many of the coming jobs

        def look_ahead() -> None:
            while len(needed) < distance and (job := next(jobs, None)) is not None:
                coming.append(job)
                for n in shards(job) - needed.keys():
                    self._ask(n)
                needed.update(shards(job))

        look_ahead()
        while coming:
            job = coming.popleft()
            needed.subtract(shards(job))
            for n in [n for n, count in needed.items() if not count]:
                del needed[n]
            look_ahead()
            yield job

    def _ask(self, n: int) -> None:
        with suppress(OSError):  # without it, shards are fetched when they are needed
            self._connection.send(n)

    def close(self) -> None:
        """End it, also in the middle of a transfer."""
        self._connection.close()
        self._process.kill()
        self._process.join()


def _fetch_all(connection: Connection, shelf: Shelf, parent: int) -> None:
    """The process's whole life: it ends with its parent."""

    def fetch(n: int) -> None:
        with suppress(Unreachable, OSError):  # the worker that needs it tries again, and says so
            shelf.fetch(n, wait=False)

    pool = ThreadPoolExecutor(max(1, min(TRANSFERS, shelf.room // 4)))
    with suppress(EOFError, OSError):
        while True:
            wait_for(connection, parent)
            pool.submit(fetch, connection.recv())
    os._exit(0)  # not waiting for transfers
