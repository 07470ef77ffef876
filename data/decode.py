"""From the bytes of one video or image to the pixels of a bucket.

Shapes: F frames, H height, W width of the source; f, h, w of the bucket.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import torch
from PIL import Image, ImageOps

Frames = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]  # (F, H, W, 3)
Times = np.ndarray[tuple[int, ...], np.dtype[np.float64]]  # (F,) seconds, ascending
Reader = tuple[Times, Callable[[list[int]], Frames]]  # when each frame is shown, and how to get some of them

CHUNK = 16  # source frames that are held at full resolution at a time
SLACK_S = 2e-3  # containers round timestamps to a millisecond


class BadSample(Exception):
    """A sample that cannot be used. ``reason`` is one of a few phrases, to be counted; ``detail`` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ClipInfo:
    """What the index knows of a clip. ``(frames - 1) / fps`` is the time from the first frame to the last one.

    An image has one frame and an fps of 0.
    """

    frames: int
    fps: float
    height: int
    width: int


def probe(media: bytes) -> ClipInfo:
    """Frames, rate and size of a video or an image; its first and its last frame are decoded.

    Raises:
        BadSample: empty, truncated, or neither a video nor an image.
    """
    if not media:
        raise BadSample("empty file")
    if _is_image(media):
        _, height, width, _ = _decode_image(media).shape
        return ClipInfo(1, 0.0, height, width)
    _check_packets(media)  # before decord, which prints what it cannot open
    with _decoding():
        times, read = _open_video(media)
        _, height, width, _ = read([0, len(times) - 1]).shape
    if len(times) == 1:
        return ClipInfo(1, 0.0, height, width)
    if times[-1] <= times[0]:
        raise BadSample("no timestamps")
    return ClipInfo(len(times), (len(times) - 1) / float(times[-1] - times[0]), height, width)


def frame_times(media: bytes) -> Times:
    """When each frame of a video is shown, in seconds after its first one: (F,).

    Raises:
        BadSample: it cannot be decoded.
    """
    with _decoding():
        times: Times = _open_video(media)[0]
        since: Times = times - times[0]
    return since


def decode_clip(
    media: bytes,
    *,
    frames: int,
    height: int,
    width: int,
    fps: float,
    start: float,
    begin: float = 0.0,
    end: float = 0.0,
) -> torch.Tensor:
    """The window of a clip that fills a bucket.

    Args:
        media: an encoded video, or an image (it fills a bucket of one frame).
        frames, height, width: the bucket. The source's middle is cropped to the shape of height x width, and scaled.
        fps: rate of the result; each of its frames is the source's nearest in time.
        start: in [0, 1), where the window lies among all places that it could have.
        begin, end: the clip is the frames of the media in [begin, end) seconds after its first one; an end of 0 is the
            media's own.

    Returns:
        uint8 pixels (3, f, h, w).

    Raises:
        BadSample: it cannot be decoded, or it has less footage than (frames - 1) / fps seconds.
    """
    if _is_image(media):
        if frames > 1:
            raise BadSample("too short", f"an image cannot fill {frames} frames")
        return _cover(_decode_image(media), height, width).permute(1, 0, 2, 3).contiguous()  # (3, 1, h, w)
    clip = torch.empty(frames, 3, height, width, dtype=torch.uint8)
    with _decoding():
        times, read = _open_video(media)
        first, last = part_of(times, begin, end)
        picked = [first + i for i in _nearest_frames(times[first:last], frames, fps, start)]
        for at in range(0, frames, CHUNK):
            clip[at : at + CHUNK] = _cover(read(picked[at : at + CHUNK]), height, width)
    return clip.permute(1, 0, 2, 3).contiguous()  # (3, f, h, w)


def part_of(times: Times, begin: float, end: float) -> tuple[int, int]:
    """(first, last + 1) of the frames in [begin, end) seconds after the first one; an end of 0 is the media's own.

    Raises:
        BadSample: there is none.
    """
    since = times - times[0] + SLACK_S / 2  # rounded timestamps may lie a little before what was asked
    first = int(np.searchsorted(since, begin))
    last = int(np.searchsorted(since, end)) if end else len(times)
    if last <= first:
        raise BadSample("too short", f"no frames from {begin:g} to {end:g} s")
    return first, last


def _nearest_frames(times: Times, frames: int, fps: float, start: float) -> list[int]:
    """The source frame nearest to each moment of a window of ``frames`` at ``fps``."""
    span, needed = float(times[-1] - times[0]), (frames - 1) / fps
    if needed > span + SLACK_S:
        raise BadSample("too short", f"{span:.3f} s of footage, {needed:.3f} s needed")
    first = times[0] + start * max(span - needed, 0.0)
    moments = first + np.arange(frames) / fps  # (f,)
    after = np.clip(np.searchsorted(times, moments), 1, len(times) - 1) if len(times) > 1 else np.zeros(frames, int)
    before = np.maximum(after - 1, 0)
    nearest = np.where(moments - times[before] <= times[after] - moments, before, after)
    return [int(i) for i in nearest]


def _cover(frames: Frames, height: int, width: int) -> torch.Tensor:
    """Crop the middle of (F, H, W, 3) to the shape of height x width, then scale it: (F, 3, h, w).

    The crop comes first, so that a source a pixel high and thousands wide does not become a giant on the way.
    """
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (F, 3, H, W)
    tall, wide = pixels.shape[-2:]
    scale = max(height / tall, width / wide)
    rows, columns = max(1, round(height / scale)), max(1, round(width / scale))
    top, left = (tall - rows) // 2, (wide - columns) // 2
    pixels = pixels[..., top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return pixels
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)


def _is_image(media: bytes) -> bool:
    """By content: PNG, JPEG, WebP or BMP. A file's suffix may lie."""
    webp = media[:4] == b"RIFF" and media[8:12] == b"WEBP"
    return webp or media.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM"))


def _decode_image(media: bytes) -> Frames:
    """(1, H, W, 3), upright."""
    with _decoding(), Image.open(io.BytesIO(media)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # grey of 16 bits, which convert() would clip at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.array(upright.convert("RGB"))[None]


def _check_packets(media: bytes) -> None:
    """Refuse a file that does not hold a video, or fewer frames than its header declares."""
    with _decoding(), _open_av(media) as container:
        if not container.streams.video:
            raise BadSample("cannot be decoded", "no video stream")
        stream = container.streams.video[0]
        packets = sum(1 for packet in container.demux(stream) if packet.size)
        declared = stream.frames
    if not packets:
        raise BadSample("cannot be decoded", "no frames")
    if packets < declared:
        raise BadSample("truncated", f"{packets} of {declared} frames")


def _open_av(media: bytes) -> av.container.InputContainer:
    """A title or an author need not be UTF-8."""
    return av.open(io.BytesIO(media), metadata_errors="replace")


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever a decoder raises (decord: RuntimeError, AssertionError and its own) is a ``BadSample``."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("cannot be decoded", (str(error).splitlines() or [type(error).__name__])[0][:200]) from error


def _open_decord(media: bytes) -> Reader:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    video = decord.VideoReader(io.BytesIO(media), ctx=decord.cpu(0), num_threads=1)
    times: Times = video.get_frame_timestamp(range(len(video)))[:, 0].astype(np.float64)  # (F,)

    def read(indices: list[int]) -> Frames:
        try:
            frames: Frames = video.get_batch(indices).asnumpy()
        except decord.base.DECORDError:  # it cannot copy padded rows, which videos 16, 24, 48 or 72 pixels wide have
            return _open_pyav(media)[1](indices)
        return frames

    return times, read


def _open_pyav(media: bytes) -> Reader:
    """The same through PyAV, for the machines that decord has no wheel for."""
    with _open_av(media) as container:
        stream = container.streams.video[0]
        base = stream.time_base or Fraction(1, 1)
        stamps = sorted(p.pts for p in container.demux(stream) if p.size and p.pts is not None)
    if not stamps:
        raise BadSample("no timestamps")

    def read(indices: list[int]) -> Frames:
        wanted = {stamps[i] for i in indices}
        found: dict[int, Frames] = {}
        with _open_av(media) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            container.seek(min(wanted), stream=stream)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    found[frame.pts] = frame.to_ndarray(format="rgb24")
                if len(found) == len(wanted):
                    break
        return np.stack([found[stamps[i]] for i in indices])

    return np.array([float(stamp * base) for stamp in stamps]), read


_open_video = _open_decord if importlib.util.find_spec("decord") else _open_pyav
