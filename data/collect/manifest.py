"""Manifests: tables with the columns ``path`` and ``caption``, and where wanted ``start`` and ``end`` in seconds."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.collect.entries import Entry, Part
from lingen.errors import UserError

MANIFESTS = (".csv", ".jsonl", ".parquet")
COLUMNS = ("path", "caption", "start", "end")


def read_manifest(file: Path) -> list[Entry]:
    """One entry a file, in the order in which the files are first named, with a part for each of its rows.

    Raises:
        UserError: the manifest cannot be read, is damaged, or has no ``path`` and ``caption``.
    """
    try:
        if file.suffix.lower() == ".parquet":
            return group(read_parquet(file))
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"manifest {file} is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"manifest {file} cannot be read: {error}") from error
    return group(read_csv(file, text) if file.suffix.lower() == ".csv" else read_jsonl(text))


def group(rows: Iterable[Entry]) -> list[Entry]:
    """Rows of one file become one entry, so that the file is stored once."""
    entries: dict[str, Entry] = {}
    for number, row in enumerate(rows):
        place = f"\n{number}" if row.problem else os.path.normpath(row.name)
        before = entries.get(place)
        entries[place] = row if before is None else before._replace(parts=before.parts + row.parts)
    return list(entries.values())


def read_csv(file: Path, text: str) -> Iterator[Entry]:
    """One entry a row. A quote that is never closed is an error: it would swallow the rows behind it."""
    csv.field_size_limit(max(1, len(text)))  # a caption may be longer than the module's default of 128 KiB
    rows = csv.DictReader(io.StringIO(text), strict=True)
    whole = 0  # lines up to the end of the last row
    try:
        check_columns(file, rows.fieldnames or ())
        whole = rows.line_num
        for row in rows:
            yield manifest_row(row, f"line {rows.line_num} of the manifest")
            whole = rows.line_num
    except csv.Error as error:
        raise UserError(
            f"manifest {file}: the row on line {whole + 1} has a stray or unclosed quote ({error})"
        ) from error


def read_jsonl(text: str) -> Iterator[Entry]:
    """One entry a line; only a newline ends it (splitlines() would also cut captions, at U+2028 for one)."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of the manifest"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, a number of too many digits, or a nest too deep
            yield Entry(where, problem=("bad manifest line", "not JSON"))
        else:
            yield manifest_row(row, where)


def read_parquet(file: Path) -> Iterator[Entry]:
    """One entry a row, read in pieces."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"manifest {file} is a Parquet file, and pyarrow is not installed: pip install pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            check_columns(file, names)
            number = 0
            for batch in table.iter_batches(columns=[name for name in COLUMNS if name in names]):
                for row in batch.to_pylist():
                    number += 1
                    yield manifest_row(row, f"row {number} of the manifest")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"manifest {file} cannot be read as Parquet: {error}") from error


def check_columns(file: Path, names: Iterable[str]) -> None:
    if not {"path", "caption"} <= set(names):
        raise UserError(f"manifest {file} has the columns {list(names)}, and needs 'path' and 'caption'")


def manifest_row(row: Any, where: str) -> Entry:
    """A row with a path; its caption may still be missing."""
    path, caption = (row.get("path"), row.get("caption")) if isinstance(row, dict) else (None, None)
    if not isinstance(path, str) or not path:
        return Entry(where, problem=("bad manifest line", "no path"))
    try:
        begin, end = seconds(row.get("start")), seconds(row.get("end"))
    except ValueError as error:
        return Entry(path, problem=("bad start or end", f"{where}: {error}"))
    if end is not None and end <= (begin or 0.0):
        return Entry(
            path, problem=("bad start or end", f"{where}: it ends at {end:g} s and begins at {begin or 0:g} s")
        )
    return Entry(path, parts=(Part(caption if isinstance(caption, str) else "", begin or 0.0, end or 0.0),))


def seconds(value: Any) -> float | None:
    """A cell as seconds; None where it is empty.

    Raises:
        ValueError: it is neither empty nor a number of seconds.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number of seconds")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{str(value)[:50]!r} is no number of seconds") from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{number:g} is no number of seconds from the start")
    return number
