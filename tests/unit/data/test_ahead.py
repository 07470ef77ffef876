"""What is decoded and what is not: groups of pictures that nobody needs, frames ahead of their use, and their end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import av
import pytest

from data.video import AHEAD, _decode, open_video
from tests.unit.data.test_video import X264, encode, number, read


def test_groups_between_two_frames_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counted(*words: Any) -> Iterator[av.VideoFrame]:
        for frame in _decode(*words):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr("data.video._decode", counted)
    media = encode(shape=(40, 64, 96), options={"crf": "10", "x264-params": f"keyint=4:bframes=0:{X264}"})
    for picked, cost in (([1, 37], 4), ([1, 5], 6), ([1, 9, 10, 38], 2 + 3 + 3), ([39], 4)):
        decoded.clear()
        assert [number(picture) for picture in read(media, picked)] == picked
        assert len(decoded) == cost


def test_what_decodes_ahead_ends_with_its_user() -> None:
    media, before = encode(), threading.active_count()
    for _ in range(20):
        with open_video(media) as video:
            pieces: Any = video.frames(list(range(24)))
            next(pieces)
            pieces.close()
    assert threading.active_count() == before


def test_no_frame_outlives_its_video() -> None:
    """A decoder's frame that waits for the garbage collector holds its pixels meanwhile."""

    def held() -> int:
        frames = [one for one in gc.get_objects() if isinstance(one, av.VideoFrame)]
        return sum(bool(frame.format) and frame.format.name == "yuv420p" for frame in frames)  # one may be half made

    media = encode(turned=90)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with open_video(media) as video:
                most = max(held() for _ in video.frames(list(range(24))))
            assert 1 <= most <= 1 + AHEAD + 2 and held() == 0  # the one that was asked, those ahead, those in hand
    finally:
        gc.enable()
