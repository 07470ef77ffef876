"""Where a video is cut: at changes of scene, and into windows.

A cut names seconds of a stored media, and nothing is encoded anew. Shapes: F frames of the media.
"""

from __future__ import annotations

import importlib.util
import io
import math
from itertools import pairwise

import numpy as np

from data.decode import SLACK_S, BadSample, Times, part_of
from lingen.errors import UserError

Span = tuple[float, float]  # [begin, end) in seconds after the first frame; an end of 0 is the media's own
MIN_SCENE_FRAMES = 15  # scenedetect's own: what flashes up for less is no scene


def require_scenedetect() -> None:
    """Raises:
    UserError: what finds changes of scene is not installed.
    """
    if importlib.util.find_spec("scenedetect") is None or importlib.util.find_spec("cv2") is None:
        raise UserError(
            "scenes=true needs scenedetect, which is not installed: pip install scenedetect opencv-python-headless"
        )


def find_scenes(media: bytes, times: Times, threshold: float) -> list[float]:
    """The seconds at which a new scene begins, ascending and without the first; each is a frame's own.

    Args:
        times: (F,) when each frame is shown, from 0 on.
        threshold: how much must change, of scenedetect's ContentDetector.

    Raises:
        BadSample: the video cannot be decoded to its end.
    """
    from scenedetect import ContentDetector, SceneManager
    from scenedetect.backends.pyav import VideoStreamAv

    manager = SceneManager()
    manager.add_detector(ContentDetector(threshold=threshold, min_scene_len=MIN_SCENE_FRAMES))
    try:
        manager.detect_scenes(VideoStreamAv(io.BytesIO(media), suppress_output=True))
        starts = [start.seconds for start, _ in manager.get_scene_list()][1:]
    except Exception as error:  # as with decoders, whatever it is
        raise BadSample("cannot be decoded", f"scenes: {str(error)[:200]}") from error
    frames = sorted({int(np.abs(times - start).argmin()) for start in starts} - {0})
    return [float(times[frame]) for frame in frames]


def cut(times: Times, asked: Span, scenes: list[float], window_seconds: float | None) -> list[Span]:
    """The spans of a video that become samples.

    Args:
        times: (F,) when each frame is shown, from 0 on.
        asked: the part of it that is wanted.
        scenes: where to cut it, as ``find_scenes`` says.
        window_seconds: the length of the windows each scene is cut into; what is left at its end is one more.

    Returns:
        Spans with frames in them; (0, 0) alone where the whole is kept.

    Raises:
        BadSample: there are no frames where they are asked for.
    """
    try:
        first, last = part_of(times, *asked)
    except BadSample as error:
        raise BadSample("bad start or end", error.detail) from error
    begin, end = asked[0], asked[1] or after(times)
    if asked[1] and last == len(times):
        end = min(end, after(times))
    edges = [begin, *(scene for scene in scenes if times[first] < scene < end), end]
    spans = list(pairwise(edges))
    if window_seconds is not None:
        spans = [window for span in spans for window in _windows(times, span, window_seconds)]
    spans = [span for span in spans if _frames(times, span)]
    return [(0.0, 0.0)] if len(spans) == 1 and (first, last) == (0, len(times)) else spans


def _windows(times: Times, span: Span, seconds: float) -> list[Span]:
    """Those that frames are in: a gap, or a time that is nonsense, may be as long as millions of windows."""
    begin, end = span
    inside = times + SLACK_S / 2  # as in part_of
    inside = inside[(inside >= begin) & (inside < end)]
    last = max(0, math.ceil((end - begin) / seconds - 1e-6) - 1)
    numbers = np.unique(np.minimum((inside - begin) // seconds, last)).tolist()
    return [(begin + n * seconds, end if n == last else begin + (n + 1) * seconds) for n in numbers]


def after(times: Times) -> float:
    """When the last frame has been shown, as long as frames are shown on average."""
    return float(times[-1]) * len(times) / max(1, len(times) - 1)


def _frames(times: Times, span: Span) -> int:
    try:
        first, last = part_of(times, *span)
    except BadSample:
        return 0
    return last - first
