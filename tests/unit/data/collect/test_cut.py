"""Long videos become parts: where they are cut, and that a part decodes to exactly its frames."""

from __future__ import annotations

import io
import tarfile
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from data.batch import Bucket
from data.buckets import split
from data.collect.cut import cut, find_scenes, require_scenedetect
from data.decode import BadSample, decode_clip, frame_times
from data.encode import encode_mp4
from data.shards import load_index, read_member
from data.workers import Job, decode
from lingen.config import DataConfig
from lingen.errors import UserError
from tests.unit.data.collect.conftest import Make, moving, rejected, scenes

TIMES = np.arange(80) / 8.0  # ten seconds


def encode(pixels: npt.NDArray[np.uint8], stamps: list[int], *, base: int = 1000) -> bytes:
    """With B-frames, few key frames, and the given times in 1 / ``base`` seconds."""
    media = io.BytesIO()
    with av.open(media, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1", "bf": "3", "g": "60"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv444p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, base)
        for stamp, frame in zip(stamps, pixels, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = stamp, Fraction(1, base)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return media.getvalue()


@pytest.mark.parametrize(
    ("asked", "found", "window", "expected"),
    [
        ((0, 0), [], None, [(0, 0)]),
        ((0, 0), [], 10.0, [(0, 0)]),
        ((0, 0), [], 4.0, [(0, 4), (4, 8), (8, 10)]),
        ((0, 0), [2.5, 7.0], None, [(0, 2.5), (2.5, 7), (7, 10)]),
        ((0, 0), [2.5], 3.0, [(0, 2.5), (2.5, 5.5), (5.5, 8.5), (8.5, 10)]),
        ((1, 3), [], None, [(1, 3)]),
        ((1, 0), [], None, [(1, 10)]),
        ((1, 6), [0.5, 4.0, 6.0], 2.0, [(1, 3), (3, 4), (4, 6)]),
        ((9, 99), [], None, [(9, 10)]),
    ],
)
def test_where_a_video_is_cut(
    asked: tuple[float, float], found: list[float], window: float | None, expected: list[tuple[float, float]]
) -> None:
    assert cut(TIMES, asked, found, window) == [pytest.approx(span) for span in expected]


def test_every_frame_is_in_one_window() -> None:
    """Of a rate that no window is a whole number of frames of."""
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.08, 500))
    times -= times[0]
    spans = cut(times, (0.0, 0.0), [float(times[123]), float(times[300])], 0.7)
    inside = [[n for n, time in enumerate(times) if begin <= time + 1e-3 < end] for begin, end in spans[:-1]]
    inside.append([n for n, time in enumerate(times) if time + 1e-3 >= spans[-1][0]])
    assert list(chain(*inside)) == list(range(500)) and all(inside)


def test_a_gap_of_millions_of_windows() -> None:
    """A time that is nonsense, and windows shorter than a frame, cost no more than there are frames."""
    times = np.array([0.0, 0.5, 1.0, 3e12])
    assert cut(times, (0.0, 0.0), [], 1.0) == [(0, 1), (1, 2), (3e12, 3e12 + 1)]
    assert len(cut(TIMES, (0.0, 0.0), [], 1e-9)) <= len(TIMES)


def test_asking_behind_the_end() -> None:
    with pytest.raises(BadSample, match=r"bad start or end.*no frames from 11 to 12 s"):
        cut(TIMES, (11.0, 12.0), [], None)


def test_scenes_are_found_at_their_frames() -> None:
    pytest.importorskip("scenedetect")
    media = encode_mp4(scenes(), 12.0)
    assert find_scenes(media, frame_times(media), 27.0) == pytest.approx([2.0, 4.0])
    stamps = np.cumsum([0] + [40] * 23 + [80] * 24 + [20] * 24).tolist()
    media = encode(scenes(), stamps)  # of a variable rate
    assert find_scenes(media, frame_times(media), 27.0) == pytest.approx([stamps[24] / 1000, stamps[48] / 1000])
    still = encode_mp4(moving(30), 12.0)
    assert find_scenes(still, frame_times(still), 27.0) == []


def test_without_scenedetect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install scenedetect opencv-python-headless"):
        require_scenedetect()


def test_a_part_decodes_to_exactly_its_frames(tmp_path: Path, make: Make) -> None:
    """One stored media; its parts by scene and window, read as training reads them, are the source's frames."""
    pytest.importorskip("scenedetect")
    source, folder = scenes(), tmp_path / "in"
    folder.mkdir()
    media = encode(source, list(range(0, 72 * 125, 125)))  # 8 frames/s: 9 s, cut at 3 and 6
    (folder / "long@2x.mp4").write_bytes(media)
    (folder / "long@2x.txt").write_text("long")
    out = make(folder, scenes=True, window_seconds=2)
    index = load_index(out)
    assert index.key == [
        f"long%402x@{a}-{b}ms"
        for a, b in [(0, 2000), (2000, 3000), (3000, 5000), (5000, 6000), (6000, 8000), (8000, 9000)]
    ]
    assert index.frames.tolist() == [16, 8] * 3 and index.fps.tolist() == [8.0] * 6
    assert set(index.offset.tolist()) == {index.offset[0]} and read_member(index, 3) == media
    with tarfile.open(out / "shard-000000.tar") as tar:
        assert tar.getnames() == ["long%402x.mp4", "long%402x.txt"]  # stored once
    whole = decode_clip(media, frames=72, height=32, width=32, fps=8, start=0)
    for row, (first, frames) in enumerate([(0, 16), (16, 8), (24, 16), (40, 8), (48, 16), (64, 8)]):
        job = Job(Bucket(frames, 32, 32), 8.0, np.array([row]), np.array([0.5]), np.array([0]))
        ((batch, holes),) = decode(index, DataConfig(path=str(out), workers=0), iter([job]))
        assert not holes and batch.valid.all()
        assert (batch.pixels[0] == whole[:, first : first + frames]).all()
    too_long = Job(Bucket(17, 32, 32), 8.0, np.array([0]), np.array([0.5]), np.array([0]))
    assert next(decode(index, DataConfig(path=str(out), workers=0), iter([too_long])))[1][0].reason == "too short"


def test_a_manifest_names_parts(tmp_path: Path, make: Make) -> None:
    (tmp_path / "long.mp4").write_bytes(encode_mp4(moving(40), 8.0))
    (tmp_path / "list.csv").write_text(
        "path,caption,start,end\nlong.mp4,one,0,2\nlong.mp4,two,2,4.5\nlong.mp4,all,,\nlong.mp4,one again,0,2\n"
        "long.mp4,beyond,9,12\nlong.mp4,a moment,1,1.1\nlong.mp4,,3,4\n"
    )
    out = make(tmp_path / "list.csv", max_bad_share=0.9)
    index = load_index(out)
    assert index.key == ["long@0-2000ms", "long@2000-4500ms", "long"]
    assert index.caption == ["one", "two", "all"] and index.frames.tolist() == [16, 20, 40]
    assert (index.begin.tolist(), index.end.tolist()) == ([0, 2, 0], [2, 4.5, 0])
    assert sorted(reason for _, reason in rejected(out)) == [
        "bad start or end",
        "duplicate key",
        "missing caption",
        "too short",
    ]


def test_the_parts_of_a_video_are_held_out_together(tmp_path: Path, make: Make) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(8):
        (folder / f"v{n}.mp4").write_bytes(encode_mp4(moving(32, 16, seed=n), 8.0))
        (folder / f"v{n}.txt").write_text("c")
    index = load_index(make(folder, window_seconds=0.5))
    assert len(index) == 64
    _, held = split(index, 0.5)
    assert 0 < held.sum() < 64
    sides: dict[str, set[bool]] = {}
    for key, side in zip(index.key, held, strict=True):
        sides.setdefault(key.partition("@")[0], set()).add(bool(side))
    assert all(len(side) == 1 for side in sides.values())
