"""Shards of other tools: read as they are, copied where that is asked, and never believed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data.collect.foreign import scan_shard
from data.encode import encode_mp4
from data.shards import load_index, read_member
from lingen.errors import UserError
from tests.unit.data.collect.conftest import Make, moving, rejected

CLIP = encode_mp4(moving(), 8.0)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def image() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(moving(1)[0]).save(stream, "jpeg")
    return stream.getvalue()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """As video2dataset and img2dataset write them, with their statistics and tables beside the tars."""
    root = tmp_path / "theirs"
    (root / "more").mkdir(parents=True)
    with tarfile.open(root / "00000.tar", "w") as tar:
        for n in range(3):
            add(tar, f"00000000{n}.mp4", CLIP + bytes(n))
            add(tar, f"00000000{n}.txt", f"clip {n}".encode())
            add(tar, f"00000000{n}.json", json.dumps({"caption": "not this", "url": "u", "status": "success"}).encode())
    with tarfile.open(root / "more/00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "000000000.json", json.dumps({"caption": "ein Bild: 猫"}).encode())
        add(tar, "000000000.jpg", image())
        add(tar, "000000001.jpg", image())
    (root / "00000.parquet").write_bytes(b"their table")
    (root / "00000_stats.json").write_text("{}")
    return root


def test_they_are_indexed_where_they_lie(foreign: Path, make: Make) -> None:
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in foreign.rglob("*.*")}
    out = make(foreign)
    index = load_index(out)
    assert index.key == ["00000/000000000", "00000/000000001", "00000/000000002", "more/00000/000000000"]
    assert index.caption == ["clip 0", "clip 1", "clip 2", "ein Bild: 猫"]
    assert [read_member(index, n) for n in range(4)] == [*(CLIP + bytes(n) for n in range(3)), image()]
    assert index.frames.tolist() == [9, 9, 9, 1] and index.root == foreign.resolve()
    assert rejected(out) == [("more/00000.tar:000000001", "missing caption")]
    assert not list(out.glob("*.tar"))
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in foreign.rglob("*.*")}
    (foreign / "00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"00000\.tar has 0 bytes where index\.json says"):
        load_index(out)


def test_they_are_copied_where_that_is_asked(foreign: Path, make: Make) -> None:
    out = make(foreign, shards="rewrite", samples_per_shard=2)
    index, there = load_index(out), load_index(make(foreign, "there"))
    assert index.shards == ["shard-000000.tar", "shard-000001.tar"] and index.root == out
    assert (index.key, index.caption, index.sha256) == (there.key, there.caption, there.sha256)
    assert [read_member(index, n) for n in range(4)] == [read_member(there, n) for n in range(4)]


def test_a_cut_or_damaged_tar_gives_what_comes_before(foreign: Path, make: Make) -> None:
    shard = foreign / "00000.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        members = {member.name: member for member in tar}
    second, third = members["000000001.mp4"], members["000000002.mp4"]
    for cut, count, reason in (
        (second.offset_data + 100, 1, "truncated shard"),  # inside a sample
        (third.offset, 2, "truncated shard"),  # between two
        (third.offset + 50, 2, "truncated shard"),  # inside a header
    ):
        shard.write_bytes(whole[:cut])
        found = scan_shard(foreign, "00000.tar")
        assert [entry.problem and entry.problem[0] for entry in found] == [None] * count + [reason]
    shard.write_bytes(whole[: third.offset] + b"\xff" * 512 + whole[third.offset + 512 :])
    assert [entry.problem and entry.problem[0] for entry in scan_shard(foreign, "00000.tar")][2:] == ["damaged shard"]
    out = make(foreign, max_bad_share=0.5)
    assert load_index(out).caption == ["clip 0", "clip 1", "ein Bild: 猫"]
    assert ("00000.tar", "damaged shard") in rejected(out)


def test_names_and_members_that_lead_elsewhere_are_refused(tmp_path: Path, make: Make) -> None:
    root, secret = tmp_path / "theirs", tmp_path / "secret.tar"
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as tar:
        add(tar, "../../evil.mp4", CLIP)
        add(tar, "/abs.mp4", CLIP)
        for kind, name in (
            (tarfile.SYMTYPE, "link.mp4"),
            (tarfile.FIFOTYPE, "pipe.mp4"),
            (tarfile.LNKTYPE, "hard.mp4"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        add(tar, "words.txt", b"no media")
        add(tar, "code.pickle", b"\x80\x04\x95" + bytes(99))
        add(tar, "good.one.mp4", CLIP)  # a suffix of "one.mp4" is none that we know
        add(tar, "good.mp4", CLIP)
        add(tar, "good.txt", b"good")
        add(tar, "good.jpg", image())  # its poster
        add(tar, "good.pyd", b"\x80\x04\x95" + bytes(99))  # nobody reads it
        add(tar, "empty.mp4", b"")
        add(tar, "empty.txt", b"empty")
    secret.write_bytes((root / "0.tar").read_bytes())
    (root / "1.tar").symlink_to(secret)
    with tarfile.open(root / "2.tar", "w:gz") as tar:
        add(tar, "packed.mp4", CLIP)
    out = make(root, max_bad_share=1.0)
    assert load_index(out).key == ["0/good"] and load_index(out).frames.tolist() == [9]
    assert sorted(rejected(out)) == sorted(
        [
            ("0.tar:../../evil.mp4", "path leaves the shard"),
            ("0.tar:/abs.mp4", "path leaves the shard"),
            ("0.tar:link.mp4", "not a plain file"),
            ("0.tar:pipe.mp4", "not a plain file"),
            ("0.tar:hard.mp4", "not a plain file"),
            ("0.tar:words", "neither a video nor an image"),
            ("0.tar:code", "neither a video nor an image"),
            ("0.tar:empty", "empty file"),
            ("1.tar", "path leaves the input folder"),
            ("2.tar", "damaged shard"),
        ]
    )
    assert {path.name for path in tmp_path.rglob("*evil*")} == set()


def test_names_that_are_no_text(tmp_path: Path, make: Make) -> None:
    """Of members, of shards, and of a link that leads nowhere."""
    root = tmp_path / "theirs"
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as tar:
        for key in ("good", "bad\udcff"):
            add(tar, f"{key}.mp4", CLIP)
            add(tar, f"{key}.txt", b"words")
    (root / "bad\udcff.tar").write_bytes((root / "0.tar").read_bytes())
    (root / "gone.tar").symlink_to(root / "nowhere.tar")
    out = make(root, max_bad_share=1.0)
    assert load_index(out).key == ["0/good"] and load_index(out).shards == ["0.tar"]
    assert rejected(out) == [
        ("0.tar:bad\\udcff", "bad path"),
        ("bad\\udcff.tar", "bad path"),
        ("gone.tar", "cannot be read"),
    ]


def test_shards_and_loose_files_are_not_mixed(foreign: Path, make: Make) -> None:
    (foreign / "loose.mp4").write_bytes(CLIP)
    with pytest.raises(UserError, match=r"holds both shards \(00000\.tar\) and loose files \(loose\.mp4\)"):
        make(foreign)
