"""What there is to collect: one ``Entry`` for each media that a folder, a manifest or others' shards name."""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import NamedTuple

from data.decode import BadSample

VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MEDIA = VIDEOS + IMAGES
BESIDE = (".txt", ".json")  # caption files


class Part(NamedTuple):
    """A row of a manifest: some seconds of a file, and what they show."""

    caption: str
    begin: float = 0.0
    end: float = 0.0  # 0: the file's own


class Member(NamedTuple):
    """Where a sample lies in a shard that others wrote."""

    key: str
    suffix: str  # of the media, with its dot
    offset: int
    size: int
    caption: tuple[str, int, int] | None  # suffix, offset and size of the .txt or .json


class Entry(NamedTuple):
    """A media that the input names."""

    name: str  # as the user wrote it: a path below the input, or a line of the manifest
    parts: tuple[Part, ...] = ()  # of a manifest; none: the whole, with the caption that lies beside it
    member: Member | None = None  # of the shard ``name``; None: ``name`` is a file
    problem: tuple[str, str] | None = None  # reason and detail, where it is known already that it cannot be used

    @property
    def label(self) -> str:
        """What a list of the rejected calls it."""
        return f"{self.name}:{self.member.key}" if self.member else self.name

    @property
    def samples(self) -> int:
        return max(1, len(self.parts))


def hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def find_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The paths below a folder, relative to it and sorted, that end so. Hidden ones are left out; links to folders are
    not followed."""
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes)
    return [str(path) for path in files if not hidden(path) and not (folder / path).is_dir()]


def locate(root: Path, name: str) -> Path:
    """The file that an entry names. A relative path must stay below ``root`` (resolved); an absolute one is taken as
    it is.

    Raises:
        BadSample: it leaves the folder, also by a link, or is no path at all.
    """
    file = Path(os.path.normpath(root / name))
    try:
        if not Path(name).is_absolute():
            refuse_outside(file, root)
        else:
            file.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a loop of links
        raise BadSample("bad path", str(error)) from error
    return file


def refuse_outside(file: Path, root: Path) -> None:
    """Raises:
    BadSample: a file that is outside ``root``, or a link that leads out of it.
    """
    if not (file.is_relative_to(root) and file.resolve().is_relative_to(root)):
        raise BadSample("path leaves the input folder", str(file))


def key_of(file: Path, root: Path) -> str:
    """The key of a file: its path below ``root``, else the whole, without its suffix.

    Raises:
        BadSample: the name cannot be written down as text.
    """
    path = file.relative_to(root) if file.is_relative_to(root) else file.relative_to(file.anchor)
    return escape(path.with_suffix("").as_posix())


def printable(name: str) -> str:
    """A name on the disk or in a tar need not be UTF-8; what is written about it is."""
    return name.encode(errors="backslashreplace").decode()


def escape(name: str) -> str:
    """WebDataset ends a key at its first dot, and behind an @ we name a part of a video: both are escaped, and %."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadSample("bad path", "the name is not UTF-8") from error
    return name.replace("%", "%25").replace(".", "%2E").replace("@", "%40")
