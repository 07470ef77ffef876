"""Shards that other tools wrote (img2dataset, video2dataset): where each sample lies in its tar.

Nothing is unpacked: the members' headers are read, and what they say is where a member lies and how large it is.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.collect.entries import BESIDE, MEDIA, Entry, Member, escape, refuse_outside
from data.decode import BadSample

CAPTION_SUFFIXES = {suffix.removeprefix("."): n for n, suffix in enumerate(BESIDE)}  # a .txt comes before a .json
MEDIA_SUFFIXES = {suffix.removeprefix("."): n for n, suffix in enumerate(MEDIA)}  # a video before its poster


class _File(NamedTuple):
    suffix: str
    offset: int
    size: int


def scan_shard(root: Path, name: str) -> list[Entry]:
    """The samples of a tar below ``root`` (resolved), in their order; members of one key stand side by side.

    What cannot be used is an entry with a problem: a member that is no file or whose name leaves the folder, a key
    without media, and, last, a tar that is cut or damaged, whose samples before that place are all there.
    """
    entries: list[Entry] = []
    try:
        escape(name)  # the index names it
        refuse_outside(root / name, root)
        with tarfile.open(root / name, "r:") as tar:
            for key, files in _samples(tar, name, entries):
                entries.append(_entry(name, key, files))
            _check_end(tar, root / name)
    except BadSample as bad:
        entries.append(Entry(name, problem=(bad.reason, bad.detail)))
    except OSError as error:
        entries.append(Entry(name, problem=("cannot be read", str(error))))
    except (tarfile.TarError, ValueError, RecursionError) as error:
        cut = "unexpected end of data" in str(error)
        entries.append(Entry(name, problem=("truncated shard" if cut else "damaged shard", str(error)[:200])))
    return entries


def _samples(tar: tarfile.TarFile, name: str, entries: list[Entry]) -> Iterator[tuple[str, list[_File]]]:
    """Each key with its files; refused members go to ``entries``. A sample that a cut tar ends in is left out."""
    key, files = "", list[_File]()
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else the headers of all members stay in memory
        if member.isdir():
            continue
        where = f"{name}:{member.name[:200]}"
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            entries.append(Entry(where, problem=("path leaves the shard", "")))
            continue
        if not member.isreg() or member.issparse():
            entries.append(Entry(where, problem=("not a plain file", "a link, a device or a sparse file")))
            continue
        stem, _, suffix = path.name.partition(".")
        own = str(path.parent / stem)
        if own != key and files:
            yield key, files
            files = []
        key = own
        files.append(_File(suffix.lower(), member.offset_data, member.size))
    if files:
        yield key, files


def _entry(name: str, key: str, files: list[_File]) -> Entry:
    media = [file for file in files if file.suffix in MEDIA_SUFFIXES]
    if not media:
        suffixes = ", ".join(file.suffix for file in files)
        return Entry(f"{name}:{key}", problem=("neither a video nor an image", suffixes[:200]))
    media.sort(key=lambda file: MEDIA_SUFFIXES[file.suffix])
    captions = [file for file in files if file.suffix in CAPTION_SUFFIXES]
    captions.sort(key=lambda file: CAPTION_SUFFIXES[file.suffix])
    first = media[0]
    beside = (f".{captions[0].suffix}", captions[0].offset, captions[0].size) if captions else None
    return Entry(name, member=Member(key, f".{first.suffix}", first.offset, first.size, beside))


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """tarfile takes a damaged header, and the end of the file between two members, for the end of the archive.

    Raises:
        BadSample: the archive does not end in a block of zeros.
    """
    with path.open("rb") as stream:
        stream.seek(tar.offset)
        block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise BadSample("truncated shard", f"it ends at byte {tar.offset}, without an end mark")
    if any(block):
        raise BadSample("damaged shard", f"no member's header at byte {tar.offset}")
