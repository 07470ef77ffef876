"""Frames out: mp4 files and contact sheets.

Shapes: F frames, H x W pixels.
"""

from __future__ import annotations

import io
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lingen.files import write_file

GAP = 2  # pixels between the frames of a contact sheet


def encode_mp4(pixels: npt.NDArray[np.uint8], fps: float) -> bytes:
    """(F, H, W, 3) as an H.264 mp4 of high quality, with a key frame every eight frames. H and W are even."""
    media = io.BytesIO()
    with av.open(media, "w", format="mp4") as container:
        # mbtree: with it one encoding in a hundred differs from the others of the same frames.
        x264 = "keyint=8:bframes=0:threads=1:mbtree=0:log-level=none"
        options = {"crf": "14", "preset": "veryfast", "x264-params": x264}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return media.getvalue()


def write_mp4(path: Path, video: torch.Tensor, *, fps: float) -> None:
    """Write (3, F, H, W) uint8 as an mp4."""
    write_file(path, encode_mp4(video.permute(1, 2, 3, 0).contiguous().numpy(), fps))


def write_contact_sheet(path: Path, video: torch.Tensor, *, most: int = 16, columns: int | None = None) -> None:
    """Write at most ``most`` evenly spaced frames of (3, F, H, W) uint8, in reading order, as one PNG of rows of
    ``columns`` frames (default: about square)."""
    frames = video.permute(1, 2, 3, 0).numpy()  # (F, H, W, 3)
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))]
    sheet = io.BytesIO()
    Image.fromarray(tile_frames(chosen, columns)).save(sheet, format="png")
    write_file(path, sheet.getvalue())


def tile_frames(frames: npt.NDArray[np.uint8], columns: int | None = None) -> npt.NDArray[np.uint8]:
    """(N, H, W, 3) -> one picture of rows of ``columns`` frames (default: about square) on white."""
    count, height, width, _ = frames.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for n, frame in enumerate(frames):
        top, left = n // columns * (height + GAP), n % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = frame
    return sheet
