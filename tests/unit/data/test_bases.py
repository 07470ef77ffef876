"""Where shards may lie: commands that bring them, addresses that cannot work, and what is shown of them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import av
import fsspec
import pytest

from data.decode import BadSample, probe
from data.remote import Source, Unreachable, is_remote, shown
from data.shards import Index, load_index, read_member
from data.video import open_media
from lingen.errors import UserError


def test_commands(index: Index, mixed_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.remote.PAUSES", (0.01, 0.01))
    spaced = tmp_path / "a folder; touch x"
    spaced.mkdir()
    for file in mixed_shards.iterdir():
        (spaced / file.name).symlink_to(file)
    base = f"pipe:cat {shlex.quote(str(spaced / '{}'))}"
    far = load_index(base)
    assert far.shelf is not None
    far = replace(far, shelf=replace(far.shelf, folder=tmp_path / "cache"))
    assert [read_member(far, n) for n in range(len(far))] == [read_member(index, n) for n in range(len(far))]
    monkeypatch.setattr("data.remote.TIMEOUT_S", 0.3)
    commands = {
        "false {}": "code 1",
        f"head -c 10 {shlex.quote(str(spaced / '{}'))}": "wrote 10 bytes",
        "/no/such {}": "no such file",
        f"{sys.executable} -c 'import time; time.sleep(60)' {{}}": "nothing came for",
    }
    for command, problem in commands.items():
        assert far.shelf is not None
        broken = replace(far.shelf, source=Source(f"pipe:{command}"), folder=tmp_path / "other")
        with pytest.raises(Unreachable, match=problem):
            broken.open(0)


def test_an_object_store(index: Index, mixed_shards: Path, tmp_path: Path) -> None:
    """What fsspec calls memory stands in for s3."""
    store = fsspec.filesystem("memory")
    store.put(str(mixed_shards), "/bucket/some clips", recursive=True)
    far = load_index("memory://bucket/some clips/")
    store.rm("/bucket/some clips/index.json")  # it is read once
    assert far.shelf is not None
    far = replace(far, shelf=replace(far.shelf, folder=tmp_path))
    assert [read_member(far, n) for n in range(len(far))] == [read_member(index, n) for n in range(len(far))]
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ("s3://bucket/clips", "pip install s3fs"),
        ("nowhere://bucket/clips", "nothing can read nowhere://"),
        ("pipe:cat /a/b", "names no file"),
        ("pipe:cat 'a {}", "cannot be split into words"),
    ],
)
def test_bases_that_cannot_work(base: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        load_index(base)
    assert "data.path=" in str(caught.value)


def test_which_paths_are_bases_and_what_is_shown_of_them() -> None:
    assert [is_remote(path) for path in ("a/b", "/a:b", "pipe:x {}", "https://h/x", "s3://b")] == [0, 0, 1, 1, 1]
    assert shown("https://me:key@host:1/a?sig=x#y") == "https://host:1/a"
    assert shown("pipe:curl -H token {}") == "pipe:curl ..."
    assert Source("https://host/a/?sig=x").url("b c.tar") == "https://host/a/b%20c.tar?sig=x"


@pytest.mark.parametrize(
    "media",
    [
        b"\x80\x04\x95" + bytes(100),  # a pickle
        b"ffconcat version 1.0\nfile clip.mp4\n",  # names a file to read
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",  # a port to listen on
        b"1\n00:00:00,000 --> 00:00:01,000\nwords\n\n",  # subtitles
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    ],
)
def test_only_pictures_and_videos_are_read(media: bytes) -> None:
    """By content, and FFmpeg's formats that are no containers of video are not even asked."""
    with pytest.raises(BadSample):
        probe(media)
    with pytest.raises((av.ArgumentError, av.InvalidDataError)):
        open_media(media)
