"""Shards and their index: what is written can be read, by us and by WebDataset, and damage is found."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data.decode import BadSample, probe
from data.shards import PAUSES, LostShard, Record, load_index, read_member, write_shards
from lingen.errors import UserError


def make_record(n: int, key: str | None = None) -> Record:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (n, n, n)).save(stream, "png")
    caption = f"number {n}, ä"
    media = stream.getvalue()
    return Record(key or f"folder/{n:03d}", caption, media, "png", probe(media), ("txt", caption.encode()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    summary = write_shards((make_record(n) for n in range(10)), tmp_path / "out", samples_per_shard=4)
    assert (summary.samples, summary.shards) == (10, 3)
    return tmp_path / "out"


def test_round_trip(folder: Path) -> None:
    index = load_index(folder)
    assert len(index) == 10 and index.shards == [f"shard-{n:06d}.tar" for n in range(3)]
    assert index.shard.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    for n in range(10):
        media = read_member(index, n)
        assert media == make_record(n).media and index.bytes[n] == len(media)
        assert index.sha256[n] == hashlib.sha256(media).hexdigest()
        assert (index.key[n], index.caption[n]) == (f"folder/{n:03d}", f"number {n}, ä")
    assert set(index.frames) == {1} and set(index.height) == {4} and set(index.width) == {6}


def test_webdataset_reads_the_same(folder: Path) -> None:
    index = load_index(folder)
    urls = [str(path) for path in index.shard_paths]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == index.key
    assert [sample["png"] for sample in samples] == [read_member(index, n) for n in range(10)]
    assert [sample["txt"].decode() for sample in samples] == index.caption


def test_long_and_foreign_names(tmp_path: Path) -> None:
    keys = ["d/" * 70 + "x" * 90, "日本語/ключ", "a b'c\"d"]
    write_shards([make_record(n, key) for n, key in enumerate(keys)], tmp_path / "out")
    index = load_index(tmp_path / "out")
    assert index.key == keys
    assert [read_member(index, n) for n in range(3)] == [make_record(n, "k").media for n in range(3)]


def test_equal_input_gives_equal_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards((make_record(n) for n in range(5)), tmp_path / name, samples_per_shard=3)
    assert load_index(tmp_path / "a").fingerprint == load_index(tmp_path / "b").fingerprint
    assert (tmp_path / "a/shard-000001.tar").read_bytes() == (tmp_path / "b/shard-000001.tar").read_bytes()


def test_a_shard_ends_at_its_bytes(tmp_path: Path) -> None:
    assert write_shards((make_record(n) for n in range(5)), tmp_path / "out", shard_bytes=1).shards == 5


def test_what_was_written_before_an_error_is_kept(tmp_path: Path) -> None:
    def records() -> Iterator[Record]:
        yield from (make_record(n) for n in range(5))
        raise UserError("enough")

    out = tmp_path / "out"
    with pytest.raises(UserError, match="enough"):
        write_shards(records(), out, samples_per_shard=2)
    with pytest.raises(UserError, match=r"index\.partial\.json"):
        load_index(out)
    with pytest.raises(UserError, match="already holds shards"):
        write_shards([make_record(0)], out)
    (out / "index.partial.json").rename(out / "index.json")
    assert len(load_index(out)) == 5 and read_member(load_index(out), 4) == make_record(4).media
    assert not list(out.glob("*.tmp"))


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sample"):
        write_shards([], tmp_path / "out")


def test_a_written_folder_is_never_written_over(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="already holds shards"):
        write_shards([make_record(1)], folder)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_keys_with_dots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dot"):
        write_shards([make_record(0, "a.b")], tmp_path / "out")


def test_missing_folder_and_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json is missing.*make_shards"):
        load_index(tmp_path / "nowhere")


def test_a_truncated_or_missing_shard_is_found_at_once(folder: Path) -> None:
    shard = folder / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(UserError, match=r"shard-000001\.tar has \d+ bytes where index\.json says"):
        load_index(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar is missing"):
        load_index(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["samples"]["key"].pop(), "different lengths"),
        (lambda tree: tree["samples"]["offset"].__setitem__(9, 10**9), "outside their shards"),
        (lambda tree: tree["samples"]["shard"].__setitem__(0, 3), "outside their shards"),
        (lambda tree: tree["samples"]["shard"].__setitem__(0, -1), r"samples\.shard\.0: .*greater"),
        (lambda tree: tree["samples"]["shard"].__setitem__(0, 10**30), r"samples\.shard\.0: "),
        (lambda tree: tree["samples"]["offset"].__setitem__(0, -5), r"samples\.offset\.0: "),
        (lambda tree: tree["samples"]["frames"].__setitem__(2, 10**30), r"samples\.frames\.2: "),
        (lambda tree: tree["samples"]["frames"].__setitem__(2, 0), r"samples\.frames\.2: .*greater"),
        (lambda tree: tree["samples"]["height"].__setitem__(2, -1), r"samples\.height\.2: .*greater"),
        (lambda tree: tree["samples"]["bytes"].__setitem__(2, -1), r"samples\.bytes\.2: .*greater"),
        (lambda tree: tree["samples"]["fps"].__setitem__(2, -8.0), r"samples\.fps\.2: .*greater"),
        (lambda tree: tree["samples"]["frames"].__setitem__(2, 17), "videos without a rate"),
        (lambda tree: tree["shards"][0].__setitem__("name", "../shard-000000.tar"), "not inside the folder"),
        (lambda tree: tree.__setitem__("format", "other"), "damaged"),
        (lambda tree: tree["samples"].pop("fps"), "different lengths"),
        (lambda tree: [column.clear() for column in tree["samples"].values()], "no sample"),
    ],
)
def test_a_damaged_index_is_refused(folder: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    tree = json.loads((folder / "index.json").read_text())
    change(tree)
    (folder / "index.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message):
        load_index(folder)


def test_half_an_index_is_refused(folder: Path) -> None:
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_index(folder)


def test_a_flipped_byte_is_found(folder: Path) -> None:
    index = load_index(folder)
    with (folder / index.shards[0]).open("r+b") as shard:
        shard.seek(int(index.offset[2]) + 40)
        shard.write(b"\xff\xfe")
    with pytest.raises(BadSample, match="checksum"):
        read_member(index, 2)
    assert len(read_member(index, 2, verify=False)) == index.bytes[2]
    assert read_member(index, 1) == make_record(1).media


def test_a_shard_cut_while_it_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.shards.PAUSES", (0.001, 0.002))
    index = load_index(folder)
    shard = folder / index.shards[2]
    start, end = int(index.offset[9]), int(index.offset[9] + index.bytes[9])
    shard.write_bytes(shard.read_bytes()[: start + 10])
    with pytest.raises(LostShard, match=rf"{shard.name} .* ends at byte {start + 10}, inside .* at {end}"):
        read_member(index, 9)
    assert capsys.readouterr().err.count("trying again") == 1


def test_a_shard_that_comes_back_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = load_index(folder)
    shard = folder / index.shards[0]
    shard.rename(folder / "away")
    paused: list[float] = []

    def sleep(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 2:
            (folder / "away").rename(shard)

    monkeypatch.setattr("data.shards.time.sleep", sleep)
    assert read_member(index, 1) == make_record(1).media
    assert paused == list(PAUSES[:2]) and 2 <= sum(PAUSES) <= 3


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_an_error_of_the_disk_is_no_bad_sample(folder: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("data.shards.PAUSES", (0.001,))
    monkeypatch.setattr("data.shards.os.pread", fail)
    with pytest.raises(LostShard, match=os.strerror(error)):
        read_member(load_index(folder), 0)


def test_members_are_plain_tar(folder: Path) -> None:
    with tarfile.open(folder / "shard-000000.tar") as tar:
        assert tar.getnames()[:2] == ["folder/000.png", "folder/000.txt"]
