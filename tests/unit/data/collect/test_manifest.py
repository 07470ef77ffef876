"""Manifests of three kinds, with seconds, and what is wrong in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.collect.entries import Entry, Part
from data.collect.manifest import read_manifest, seconds
from lingen.errors import UserError

ROWS = [
    {"path": "a/long.mp4", "caption": "first", "start": 0.5, "end": 2.0},
    {"path": "b.mp4", "caption": "whole", "start": None, "end": None},
    {"path": "a/./long.mp4", "caption": "日本語, ключ", "start": 2.0, "end": None},
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".csv":
        cells = [["" if value is None else f'"{value}"' for value in row.values()] for row in rows]
        path.write_text("\n".join(map(",".join, [list(rows[0]), *cells])))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_rows_of_a_file_are_its_parts(kind: str, tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path / f"list.{kind}", ROWS)) == [
        Entry("a/long.mp4", (Part("first", 0.5, 2.0), Part("日本語, ключ", 2.0, 0.0))),
        Entry("b.mp4", (Part("whole"),)),
    ]


def test_bad_seconds_are_one_bad_row(tmp_path: Path) -> None:
    pairs = [("x", 1), (-1, 2), (3, 3), (True, 2), (0, "inf"), ([1], 2), ("1" * 400, 2)]
    rows = [{"path": f"{n}.mp4", "caption": "c", "start": a, "end": b} for n, (a, b) in enumerate(pairs)]
    entries = read_manifest(write(tmp_path / "list.jsonl", rows))
    assert [entry.problem and entry.problem[0] for entry in entries] == ["bad start or end"] * len(pairs)
    assert seconds("1.5") == 1.5 and seconds(float("nan")) is None and seconds(0) == 0.0


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    file = write(tmp_path / "list.parquet", ROWS)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"list\.parquet cannot be read as Parquet"):
        read_manifest(file)
    with pytest.raises(UserError, match=r"has the columns \['file'\], and needs 'path' and 'caption'"):
        read_manifest(write(tmp_path / "other.parquet", [{"file": "a.mp4"}]))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_manifest(file)
