"""Files that are either the old one or the whole new one, also after a power cut."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO


def write_file(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file that has all of ``content``."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as stream:
        stream.write(content)
        sync(stream)
    rename(aside, path)


def sync(stream: IO[bytes]) -> None:
    """Force what was written to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def rename(path: Path, to: Path) -> None:
    """Rename a file or folder within its folder, and make the folder remember it."""
    path.replace(to)
    sync_path(to.parent)


def sync_path(path: Path) -> None:
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
