"""Filters and bad files: each is left out with its reason, and none is a crash."""

from __future__ import annotations

import io
import os
import struct
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data.collect.entries import Entry, Part
from data.collect.examine import Outcome, examine
from data.collect.words import Words
from data.encode import encode_mp4
from data.shards import load_index
from lingen.compose import parse
from lingen.errors import UserError
from tests.unit.data.collect.conftest import Make, flat, moving, rejected

GOOD = encode_mp4(moving(16), 8.0)


def look(folder: Path, media: bytes, name: str = "it.mp4", caption: str = "a caption", **words: object) -> Outcome:
    (folder / name).write_bytes(media)
    settings = Words.model_validate({"input": str(folder), "output": "out", **words})
    return examine(settings, str(folder), Entry(name, (Part(caption),)))


def png(pixels: np.ndarray) -> bytes:  # type: ignore[type-arg]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("media", "words", "reason"),
    [
        (GOOD, {"min_side": 33}, "too small"),
        (GOOD, {"min_seconds": 2.1}, "too short"),
        (GOOD, {"max_seconds": 1.9}, "too long"),
        (GOOD, {"min_fps": 9}, "rate too low"),
        (GOOD, {"max_fps": 7}, "rate too high"),
        (GOOD, {"min_caption": 10}, "caption too short"),
        (GOOD, {"max_caption": 8}, "caption too long"),
        (encode_mp4(flat(8), 8.0), {"min_luma": 16}, "too dark"),
        (png(flat(8)[0]), {"min_luma": 16}, "too dark"),
        (encode_mp4(flat(100), 8.0), {"min_motion": 0.5}, "still"),
        (GOOD + bytes(2 << 20), {"max_megabytes": 1}, "file too large"),
    ],
)
def test_each_filter_leaves_out_what_it_says(
    media: bytes, words: dict[str, object], reason: str, tmp_path: Path
) -> None:
    found = look(tmp_path, media, **words)
    assert found.media is None and [(one.reason, one.bad) for one in found.rejected] == [(reason, False)]
    assert look(tmp_path, media).media  # nothing is left out unasked


def test_what_passes_every_filter(tmp_path: Path) -> None:
    at_the_edges = {"min_side": 32, "min_seconds": 2, "max_seconds": 2, "min_fps": 8, "max_fps": 8}
    at_the_edges |= {"min_caption": 9, "max_caption": 9, "min_luma": 40, "min_motion": 5, "max_megabytes": 1}
    found = look(tmp_path, GOOD, **at_the_edges)
    assert found.media and not found.rejected and found.media.windows[0].info.frames == 16
    image = look(tmp_path, png(moving()[0]), "it.png", **at_the_edges)  # has no duration, rate or motion
    assert image.media and not image.rejected


def test_filters_do_not_count_as_bad(folder: Path, make: Make) -> None:
    out = make(folder, max_caption=8, max_bad_share=0)
    assert len(load_index(out)) == 10  # "number 10" and "number 11" are longer
    assert Counter(reason for _, reason in rejected(out)) == {"caption too long": 2}


def audio_only() -> bytes:
    media = io.BytesIO()
    with av.open(media, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return media.getvalue()


def no_frames() -> bytes:
    media = io.BytesIO()
    with av.open(media, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    return media.getvalue()


@pytest.mark.parametrize(
    ("media", "reasons"),
    [
        (b"", {"empty file"}),
        (GOOD[: len(GOOD) // 2], {"cannot be decoded", "truncated"}),
        (b"just words\n" * 99, {"cannot be decoded"}),
        (png(flat(9, side=1)[0]), {"too small"}),
        (no_frames(), {"no frames", "no video"}),
        (audio_only(), {"no video"}),
    ],
)
def test_what_is_no_clip_has_a_reason(media: bytes, reasons: set[str], tmp_path: Path) -> None:
    found = look(tmp_path, media)
    assert found.media is None and len(found.rejected) == 1 and found.rejected[0].reason in reasons


def test_the_header_is_not_believed(tmp_path: Path) -> None:
    """A duration of hours in mvhd and mdhd, above two seconds of frames."""
    media = bytearray(GOOD)
    for box, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        place = media.index(box) + offset
        media[place : place + 4] = struct.pack(">I", 10**8)
    found = look(tmp_path, bytes(media), max_seconds=2.01)
    assert found.media and not found.rejected


def test_a_hundred_thousand_frames(tmp_path: Path) -> None:
    """One packet, muxed again and again; cut into windows."""
    first, media = io.BytesIO(GOOD), io.BytesIO()
    with av.open(first) as source, av.open(media, "w", format="mp4") as container:
        packet = next(p for p in source.demux(source.streams.video[0]) if p.is_keyframe)
        stream = container.add_stream_from_template(source.streams.video[0])
        for n in range(100_000):
            packet.stream, packet.time_base = stream, Fraction(1, 30)
            packet.pts = packet.dts = n
            packet.duration = 1
            container.mux(packet)
    found = look(tmp_path, media.getvalue(), window_seconds=60)
    assert found.media and sum(window.info.frames for window in found.media.windows) == 100_000
    assert len(found.media.windows) == 56 and found.media.windows[0].info.fps == pytest.approx(30, rel=1e-3)


def test_captions_of_all_kinds(tmp_path: Path) -> None:
    for caption in ("видео: кот", "猫が走る", "قطة تركض", "🐈‍⬛ + \u202e", "x" * 1_000_000):
        found = look(tmp_path, GOOD, caption=f" {caption}\n")
        assert found.media and found.media.windows[0].caption == caption.strip()
    assert look(tmp_path, GOOD, caption="x" * 10_000_000).rejected[0].reason == "caption too long"
    (tmp_path / "it.txt").write_bytes(b"y" * 10_000_000)
    words = Words(input=str(tmp_path), output="out")
    assert examine(words, str(tmp_path), Entry("it.mp4")).rejected[0].reason == "caption too long"
    with (tmp_path / "it.txt").open("wb") as sparse:
        sparse.truncate(1 << 40)  # is not even read
    assert examine(words, str(tmp_path), Entry("it.mp4")).rejected[0].reason == "caption too long"


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "folder.mp4").mkdir()
    words = Words(input=str(tmp_path), output="out")
    reasons = {
        name: examine(words, str(tmp_path), Entry(f"{name}.mp4", (Part("c"),))).rejected[0].reason
        for name in ("pipe", "loop", "folder", "gone")
    }
    assert reasons.pop("loop") in ("bad path", "cannot be read")
    assert set(reasons.values()) == {"cannot be read"}

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "it.mp4").write_bytes(GOOD)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert examine(words, str(tmp_path), Entry("it.mp4", (Part("c"),))).rejected[0].reason == "cannot be read"


def test_what_nobody_thought_of_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: bytes) -> None:
        raise ZeroDivisionError("a rate of 0")

    monkeypatch.setattr("data.collect.examine.probe", fail)
    one = look(tmp_path, GOOD).rejected[0]
    assert (one.reason, one.detail, one.bad) == ("unexpected error", "ZeroDivisionError: a rate of 0", True)


def test_words_that_leave_nothing() -> None:
    with pytest.raises(UserError, match=r"min_seconds=3 is above max_seconds=2: nothing fits"):
        parse(Words, ["input=a", "output=b", "min_seconds=3", "max_seconds=2"])
    with pytest.raises(UserError, match="min_luma=300"):
        parse(Words, ["input=a", "output=b", "min_luma=300"])


def test_paths_that_are_no_text() -> None:
    with pytest.raises(UserError, match=r"input=.*the path is not UTF-8"):
        parse(Words, ["input=a\udcff", "output=b"])
