"""From the bytes of one video or image to the pixels of a bucket.

Shapes: F frames, H height, W width of the source; f, h, w of the bucket.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from data.video import BadSample as BadSample
from data.video import Decoder, Frames, Piece, decoding, open_video
from data.video import Times as Times

SLACK_S = 2e-3  # containers round timestamps to a millisecond
# A JPEG is decoded at a half, a quarter or an eighth where that is so many times the bucket: at three the result is
# that of the whole one to within a level in the mean, at two it may be seven off.
SPARE = 3
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclass(frozen=True)
class ClipInfo:
    """What the index knows of a clip. ``(frames - 1) / fps`` is the time from the first frame to the last one.

    An image has one frame and an fps of 0. Height and width are those of the upright picture, in square pixels.
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
    with open_video(media) as video:
        times, last = video.times, len(video.stamps) - 1
        shapes = [_shown(piece) for at in {0, last} for piece in video.frames([at])]
    height, width = shapes[0]
    if last == 0:
        return ClipInfo(1, 0.0, height, width)
    if times[-1] <= times[0]:
        raise BadSample("no timestamps")
    return ClipInfo(len(times), last / float(times[-1] - times[0]), height, width)


def _shown(piece: Piece) -> tuple[int, int]:
    """Height and width in square pixels; the height is kept."""
    height, width = piece.frames.shape[1:3]
    return height, max(1, round(width * piece.aspect))


def frame_times(media: bytes) -> Times:
    """When each frame of a video is shown, in seconds after its first one: (F,).

    Raises:
        BadSample: it cannot be decoded.
    """
    with open_video(media) as video:
        times: Times = video.times
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
    decoder: Decoder = "pyav",
) -> torch.Tensor:
    """The window of a clip that fills a bucket.

    Args:
        media: an encoded video, or an image (it fills a bucket of one frame).
        frames, height, width: the bucket. The source's middle is cropped to the shape of height x width, and scaled.
        fps: rate of the result; each of its frames is the source's nearest in time.
        start: in [0, 1), where the window lies among all places that it could have.
        begin, end: the clip is the frames of the media in [begin, end) seconds after its first one; an end of 0 is the
            media's own.
        decoder: who decodes what both can; the pixels are the same.

    Returns:
        uint8 pixels (3, f, h, w).

    Raises:
        BadSample: it cannot be decoded, or it has less footage than (frames - 1) / fps seconds.
    """
    clip = torch.empty(3, frames, height, width, dtype=torch.uint8)
    decode_into(clip, media, fps=fps, start=start, begin=begin, end=end, decoder=decoder)
    return clip


def decode_into(
    clip: torch.Tensor,
    media: bytes,
    *,
    fps: float,
    start: float,
    begin: float = 0.0,
    end: float = 0.0,
    decoder: Decoder = "pyav",
) -> None:
    """As ``decode_clip``, into a uint8 tensor (3, f, h, w) that is there: nothing of a clip's size is made besides."""
    frames, height, width = clip.shape[1:]
    if _is_image(media):
        if frames > 1:
            raise BadSample("too short", f"an image cannot fill {frames} frames")
        clip.copy_(_cover(Piece(_decode_image(media, (height, width)), 1.0), height, width).transpose(0, 1))
        return
    with open_video(media) as video:
        times, done = video.times, 0
        first, last = part_of(times, begin, end)
        picked = [first + i for i in _nearest_frames(times[first:last], frames, fps, start)]
        for piece in video.frames(picked, decoder):
            clip[:, done : done + len(piece.frames)] = _cover(piece, height, width).transpose(0, 1)
            done += len(piece.frames)


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


def _cover(piece: Piece, height: int, width: int) -> torch.Tensor:
    """Crop the middle of (F, H, W, 3) to the shape of height x width, then scale it: (F, 3, h, w).

    The crop comes first, so that a source a pixel high and thousands wide does not become a giant on the way.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(piece.frames)).permute(0, 3, 1, 2)  # (F, 3, H, W)
    tall, wide = pixels.shape[-2:]
    scale = max(height / tall, width / (wide * piece.aspect))
    rows, columns = max(1, round(height / scale)), max(1, round(width / scale / piece.aspect))
    top, left = (tall - rows) // 2, (wide - columns) // 2
    pixels = pixels[..., top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return pixels
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)


def _is_image(media: bytes) -> bool:
    """By content: PNG, JPEG, WebP or BMP. A file's suffix may lie."""
    webp = media[:4] == b"RIFF" and media[8:12] == b"WEBP"
    return webp or media.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM"))


def _decode_image(media: bytes, bucket: tuple[int, int] | None = None) -> Frames:
    """(1, H, W, 3), upright; a JPEG perhaps at a fraction of its size, if it is to cover a bucket (h, w)."""
    with decoding(), Image.open(io.BytesIO(media)) as image:
        if image.format == "JPEG" and bucket is not None:
            tall, wide = bucket[::-1] if image.getexif().get(0x0112) in TURNED else bucket
            scale = SPARE * max(tall / image.height, wide / image.width)
            image.draft(None, (int(np.ceil(image.width * scale)), int(np.ceil(image.height * scale))))
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # grey of 16 bits, which convert() would clip at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.array(upright.convert("RGB"))[None]
