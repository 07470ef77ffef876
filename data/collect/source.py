"""Which kind of input it is, what it holds, and a fingerprint that tells when it has changed."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from data.collect.entries import BESIDE, MEDIA, Entry, find_files
from data.collect.foreign import scan_shard
from data.collect.manifest import MANIFESTS, read_manifest
from data.collect.pool import Lost, ordered
from data.collect.words import Words
from data.index_file import ShardEntry
from lingen.errors import UserError

SHARD = (".tar",)


class Source(NamedTuple):
    """An input."""

    root: Path  # what names are relative to; resolved
    entries: list[Entry]
    shards: list[ShardEntry]  # that others wrote; empty for files
    fingerprint: str


def find_source(words: Words) -> Source:
    """What the words name.

    Raises:
        UserError: there is nothing, a manifest cannot be read, or it is not certain what is meant.
    """
    given = Path(words.input)
    if given.suffix.lower() in MANIFESTS and given.is_file():
        if words.manifest is not None:
            raise UserError(f"manifest={words.manifest} goes with a folder, and input={given} is a manifest itself")
        return from_manifest(given, given.parent)
    if not given.is_dir():
        raise UserError(
            f"input={given} is not a folder; give the one that holds the videos and images or the .tar shards, or a "
            f"manifest ({', '.join(MANIFESTS)})"
        )
    if words.manifest is not None:
        manifest = Path(words.manifest)
        if not manifest.is_file() or manifest.suffix.lower() not in MANIFESTS:
            raise UserError(f"manifest={manifest} is not a .csv or .jsonl file, nor a .parquet one")
        return from_manifest(manifest, given)
    found = find_files(given, SHARD + MEDIA + BESIDE)
    shards, files = ([name for name in found if ends(name, kind)] for kind in (SHARD, MEDIA))
    if shards and files:
        raise UserError(
            f"input={given} holds both shards ({shards[0]}) and loose files ({files[0]}); name a folder with one kind"
        )
    if shards:
        return from_shards(words, given.resolve(), shards)
    manifests = sorted(file for file in given.iterdir() if ends(file.name, MANIFESTS) and file.is_file())
    if len(manifests) > 1:
        names = ", ".join(file.name for file in manifests)
        raise UserError(f"input={given} holds several manifests ({names}); say which with manifest=FILE")
    if manifests:
        return from_manifest(manifests[0], given)
    if not files:
        raise UserError(f"input={given} holds no videos or images ({', '.join(MEDIA)}); add some, with captions")
    return Source(given.resolve(), [Entry(name) for name in files], [], fingerprint(given, found))


def ends(name: str, suffixes: tuple[str, ...]) -> bool:
    return Path(name).suffix.lower() in suffixes


def from_manifest(manifest: Path, root: Path) -> Source:
    """The files that a manifest lists; relative paths are relative to ``root``."""
    entries = read_manifest(manifest)
    if not entries:
        raise UserError(f"manifest {manifest} lists no file")
    return Source(root.resolve(), entries, [], fingerprint(root, [entry.name for entry in entries], manifest))


def from_shards(words: Words, root: Path, names: list[str]) -> Source:
    """The samples in others' shards."""
    entries: list[Entry] = []
    sizes: list[ShardEntry] = []  # of those with samples in them
    shards = ordered(partial(scan_shard, root), names, workers=words.workers, seconds=words.file_seconds)
    bar = track(zip(names, shards, strict=True), "reading headers", len(names), console=Console(stderr=True))
    for name, found in bar:
        given = [Entry(name, problem=(found.reason, found.detail))] if isinstance(found, Lost) else found
        entries += given
        if any(entry.member for entry in given):
            sizes.append(ShardEntry(name=name, bytes=(root / name).stat().st_size))
    return Source(root, entries, sizes, fingerprint(root, names))


def fingerprint(root: Path, names: list[str], manifest: Path | None = None) -> str:
    """Of the files' names, sizes and times of change, and of a manifest's content."""
    digest = hashlib.sha256(manifest.read_bytes() if manifest else b"")
    for name in names:
        try:
            found = (root / name).stat()
            facts = (name, found.st_size, found.st_mtime_ns)
        except (OSError, ValueError):
            facts = (name, -1, -1)
        digest.update(f"{facts!r}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()
