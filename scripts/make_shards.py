"""Turn a folder of captioned videos and images into WebDataset shards with an index.

    python scripts/make_shards.py input=DIR output=DIR [manifest=FILE] [samples_per_shard=256] [max_bad_share=0.05]

Captions: a NAME.txt or NAME.json ({"caption": ...}) beside each NAME.mp4, or one CSV or JSONL manifest with ``path``
and ``caption``, paths relative to the input folder; a single manifest at the top of the folder is found by itself. What
cannot be used is skipped, named in OUTPUT/rejected.jsonl and counted in OUTPUT/report.json. Media go in unchanged.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console
from rich.progress import track

from data.decode import BadSample, probe
from data.index_file import INDEX, PARTIAL_INDEX
from data.shards import Record, refuse_used, write_shards
from lingen.compose import parse
from lingen.config import Share
from lingen.errors import UserError, run_main
from lingen.files import write_file

MEDIA = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MANIFESTS = {".csv", ".jsonl"}
ENOUGH_SEEN = 100  # samples; a smaller set is looked at whole, so that all that is bad in it is named


class Words(BaseModel):
    """The words of the command line."""

    model_config = ConfigDict(extra="forbid")
    input: str
    output: str
    manifest: str | None = None
    samples_per_shard: PositiveInt = 256  # a shard also ends at 1 GiB
    max_bad_share: Share = 0.05  # of all samples; where more are bad (and more than one), the run stops; 0 allows none


@dataclass(frozen=True)
class Entry:
    """A sample that the input folder or the manifest names. ``problem`` says why it cannot be used, where known."""

    name: str  # as the user wrote it: a path relative to the input, or a line of the manifest
    caption: str | None = None  # from the manifest; None: it lies beside the file
    problem: str | None = None


@dataclass
class Tally:
    """How many samples were good, and for each reason how many were not."""

    good: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def listed(self) -> str:
        """For example "2 missing caption, 1 truncated"."""
        return ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())


def main(words: list[str]) -> int:
    """Write the shards; the last line on stdout says what was written.

    Raises:
        UserError: no input, an output that is in use or cannot be written, a bad manifest, or more bad samples than
            ``max_bad_share``.
    """
    args = parse(Words, words)
    folder, output = Path(args.input), Path(args.output)
    if not folder.is_dir():
        raise UserError(f"input={folder} is not a folder; give the one that holds the videos and images")
    entries = find_entries(folder, args.manifest)
    if not entries:
        raise UserError(
            f"input={folder} holds no videos or images ({', '.join(sorted(MEDIA))}); add some, with captions"
        )
    try:
        refuse_used(output)
        output.mkdir(parents=True, exist_ok=True)
        written = write_output(args, entries)
    except OSError as error:  # what cannot be read of the input is a bad sample
        raise UserError(f"output={output} cannot be written: {error}") from error
    print(written)
    return 0


def write_output(args: Words, entries: list[Entry]) -> str:
    """Shards, rejected.jsonl and report.json; what was written, in one line."""
    folder, output, tally = Path(args.input), Path(args.output), Tally()
    try:
        with (output / "rejected.jsonl").open("w") as log:
            records = good_records(folder, entries, args.max_bad_share, tally, log)
            write_shards(records, output, samples_per_shard=args.samples_per_shard)
    except UserError as error:
        if not tally.rejected:
            raise
        kept = f"; rename {PARTIAL_INDEX} to {INDEX} to use the {tally.good} good ones" if tally.good else ""
        raise UserError(f"{error}; {output / 'rejected.jsonl'} names them{kept}") from error
    finally:
        shards = sorted(output.glob("shard-*.tar"))
        report = {"samples": tally.good, "shards": len(shards), "rejected": dict(tally.rejected)}
        write_file(output / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    size = sum(shard.stat().st_size for shard in shards) / 1e6
    return (
        f"{output}: {tally.good} samples in {len(shards)} shards, {size:.1f} MB; rejected: {tally.listed() or 'none'}"
    )


def find_entries(folder: Path, manifest: str | None) -> list[Entry]:
    """What the manifest lists, or every video and image below the folder, in a fixed order. Hidden ones are left out.

    Raises:
        UserError: the manifest is missing or damaged or has no ``path`` and ``caption``, or there are several.
    """
    if manifest is None:
        found = sorted(file for file in folder.iterdir() if file.suffix.lower() in MANIFESTS and file.is_file())
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"input={folder} holds several manifests ({names}); say which with manifest=FILE")
        if not found:
            files = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.suffix.lower() in MEDIA)
            return [Entry(str(file)) for file in files if not any(part.startswith(".") for part in file.parts)]
        file = found[0]
    else:
        file = Path(manifest)
        if not file.is_file() or file.suffix.lower() not in MANIFESTS:
            raise UserError(f"manifest={manifest} is not a .csv or .jsonl file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"manifest {file} is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"manifest {file} cannot be read: {error}") from error
    return read_csv(file, text) if file.suffix.lower() == ".csv" else read_jsonl(text)


def read_csv(file: Path, text: str) -> list[Entry]:
    """One entry a row. A quote that is never closed is an error: it would swallow the rows behind it."""
    csv.field_size_limit(len(text))  # a caption may be longer than the module's default of 128 KiB
    rows = csv.DictReader(io.StringIO(text), strict=True)
    entries: list[Entry] = []
    whole = 0  # lines up to the end of the last row
    try:
        if not {"path", "caption"} <= set(rows.fieldnames or ()):
            raise UserError(f"manifest {file} has the columns {rows.fieldnames}, and needs 'path' and 'caption'")
        whole = rows.line_num
        for row in rows:
            entries.append(manifest_entry(row, rows.line_num))
            whole = rows.line_num
    except csv.Error as error:
        raise UserError(
            f"manifest {file}: the row on line {whole + 1} has a stray or unclosed quote ({error})"
        ) from error
    return entries


def read_jsonl(text: str) -> list[Entry]:
    """One entry a line; only a newline ends it (splitlines() would also cut captions, at U+2028 for one)."""
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entries.append(manifest_entry(json.loads(line), number))
        except (ValueError, RecursionError):  # no JSON, a number of too many digits, or a nest too deep
            entries.append(Entry(f"line {number} of the manifest", problem="bad manifest line"))
    return entries


def manifest_entry(row: Any, number: int) -> Entry:
    """A row with a path; its caption may still be missing."""
    path, caption = (row.get("path"), row.get("caption")) if isinstance(row, dict) else (None, None)
    if not isinstance(path, str) or not path:
        return Entry(f"line {number} of the manifest", problem="bad manifest line")
    return Entry(path, caption=caption if isinstance(caption, str) else "")


def good_records(
    folder: Path, entries: list[Entry], max_bad_share: float, tally: Tally, log: TextIO
) -> Iterator[Record]:
    """The entries that can be used; the others are counted and logged.

    Raises:
        UserError: more are bad than ``max_bad_share`` of all entries, and more than one (one bad sample among a few
            says nothing); 0 allows none. Judged at the end, or from ``ENOUGH_SEEN`` on as soon as it is certain.
    """
    keys: set[str] = set()
    allowed = max(max_bad_share * len(entries), 1.0 if max_bad_share else 0.0)
    for seen, entry in enumerate(track(entries, "writing shards", console=Console(stderr=True)), start=1):
        try:
            record = read_entry(folder, entry)
            if record.key in keys:
                raise BadSample("duplicate key", record.key)
        except BadSample as bad:
            tally.rejected[bad.reason] += 1
            print(json.dumps({"path": entry.name, "reason": bad.reason, "detail": bad.detail}), file=log, flush=True)
        else:
            keys.add(record.key)
            tally.good += 1
            yield record
        if tally.rejected.total() > allowed and (seen >= ENOUGH_SEEN or seen == len(entries)):
            raise UserError(
                f"{tally.rejected.total()} of {len(entries)} samples are bad ({tally.listed()}), more than "
                f"max_bad_share={max_bad_share:g}"
            )


def read_entry(folder: Path, entry: Entry) -> Record:
    """The sample of an entry, looked at from all sides.

    Raises:
        BadSample: it cannot be used.
    """
    if entry.problem:
        raise BadSample(entry.problem)
    root = folder.resolve()
    file = Path(os.path.normpath(root / entry.name))
    try:
        refuse_outside(file, root)
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a loop of links
        raise BadSample("bad path", str(error)) from error
    if file.suffix.lower() not in MEDIA:
        raise BadSample("neither a video nor an image", file.suffix)
    key = key_of(file.relative_to(root))
    try:
        suffix, content, caption = (
            read_caption(file, root) if entry.caption is None else ("txt", entry.caption.encode(), entry.caption)
        )
        caption.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        raise BadSample("bad caption", "not valid Unicode") from error
    if not caption.strip():
        raise BadSample("missing caption")
    try:
        media = file.read_bytes()
    except OSError as error:
        raise BadSample("cannot be read", str(error)) from error
    return Record(key, caption.strip(), media, file.suffix.lower().removeprefix("."), probe(media), (suffix, content))


def refuse_outside(file: Path, root: Path) -> None:
    """Raises:
    BadSample: a file that is outside ``root``, or a link that leads out of it.
    """
    if not (file.is_relative_to(root) and file.resolve().is_relative_to(root)):
        raise BadSample("path leaves the input folder", str(file))


def read_caption(file: Path, root: Path) -> tuple[str, bytes, str]:
    """(suffix, content, caption) of the .txt or else the .json beside a file; ("", b"", "") where there is none."""
    for suffix in ("txt", "json"):
        beside = file.with_suffix(f".{suffix}")
        try:
            if not beside.is_file():
                continue
            refuse_outside(beside, root)
            content = beside.read_bytes()
            text = content.decode("utf-8-sig")
            caption = text if suffix == "txt" else json.loads(text)["caption"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # the last: a nest too deep
            raise BadSample("bad caption file", f"{beside.name}: {error}") from error
        return suffix, content, caption if isinstance(caption, str) else ""
    return "", b"", ""


def key_of(path: Path) -> str:
    """The path without its suffix; WebDataset ends a key at its first dot, so dots (and %) are escaped.

    Raises:
        BadSample: the name cannot be written down as text.
    """
    try:
        key = path.with_suffix("").as_posix()
        key.encode()
    except UnicodeEncodeError as error:
        raise BadSample("bad path", "the name is not UTF-8") from error
    return key.replace("%", "%25").replace(".", "%2E")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
