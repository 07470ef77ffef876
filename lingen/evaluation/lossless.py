"""Frames that come back bit for bit: FFV1 in Matroska, about a third to a half of the raw bytes of real footage.

Metrics read these; an mp4's own losses (about 40 dB) would hide those of a good cache.
Shapes: F frames, H x W pixels.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import torch

# Version 3 keeps a checksum of every slice, so that a damaged file is found where it is read.
OPTIONS = {"level": "3", "slicecrc": "1", "threads": "1"}


def encode_lossless(video: torch.Tensor, fps: float) -> bytes:
    """(3, F, H, W) uint8 as a Matroska file of FFV1 in RGB."""
    media = io.BytesIO()
    pixels = video.permute(1, 2, 3, 0).contiguous().numpy()  # (F, H, W, 3)
    with av.open(media, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1000), options=OPTIONS)
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "bgr0"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return media.getvalue()


def decode_lossless(media: bytes) -> torch.Tensor:
    """The (3, F, H, W) uint8 that was encoded.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        with av.open(io.BytesIO(media)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"it cannot be decoded: {error}") from error
    if not frames:
        raise ValueError("it has no frames")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()
