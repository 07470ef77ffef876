"""The page: one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image

from data.shards import Index
from lingen.preview.collect import Sample, StageView

CAPTION = 400  # characters of a caption that are shown
QUALITY = 85  # of the WebP pictures


def render(views: list[StageView], index: Index, *, title: str, words: list[str], side: int) -> bytes:
    """The page. ``side``: pixels of the longer side of a picture, at most."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("page.html.j2")
    page = template.render(
        title=title,
        words=words,
        total=len(index),
        latents=index.latents is not None,
        stages=[_stage(view, index, side) for view in views],
    )
    return page.encode(errors="replace")


def _stage(view: StageView, index: Index, side: int) -> dict[str, Any]:
    rows = []
    for one in view.buckets:
        rate = view.stage.fps if one.bucket.frames > 1 else 0.0
        cards = [_card(sample, index, rate, side) for sample in one.samples]
        rows.append({"view": one, "seconds": (one.bucket.frames - 1) / view.stage.fps, "cards": cards})
    return {"view": view, "rows": rows, "most": max(one.train for one in view.buckets)}


def _card(sample: Sample, index: Index, fps: float, side: int) -> dict[str, Any]:
    row = sample.row
    caption = sample.caption if len(sample.caption) <= CAPTION else f"{sample.caption[:CAPTION]} ..."
    pictures = [
        {"image": as_webp(pixels, fps, side), "what": what}
        for pixels, what in ((sample.fed, "fed"), (sample.decoded, _decoded(sample)))
        if pixels is not None
    ]
    size = f"{index.width[row]}x{index.height[row]}"
    if index.latents is not None:
        facts = f"window from {index.begin[row]:.2f} s" if index.frames[row] > 1 else "image"
    elif index.frames[row] == 1:
        facts = f"from an image of {size}"
    else:
        seconds = (index.frames[row] - 1) / index.fps[row]
        facts = f"from {seconds:.2f} s of {size} at {index.fps[row]:.4g} frames/s"
    return {"key": sample.key, "caption": caption, "facts": facts, "pictures": pictures}


def _decoded(sample: Sample) -> str:
    return "decoded from the latents" if sample.psnr is None else f"reconstructed, {sample.psnr:.1f} dB"


def as_webp(pixels: torch.Tensor, fps: float, side: int) -> str:
    """(3, F, H, W) uint8 as a picture, or as an endless film, in base64; made smaller where it is larger than ``side``.
    A rate of 0 is an image's."""
    height, width = pixels.shape[2:]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    frames = [Image.fromarray(frame.numpy()) for frame in pixels.permute(1, 2, 3, 0).contiguous()]
    frames = [frame.resize(size, Image.Resampling.LANCZOS) if scale < 1 else frame for frame in frames]
    stream = io.BytesIO()
    film = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0} if fps else {}
    frames[0].save(stream, "webp", quality=QUALITY, method=2, **film)
    return base64.b64encode(stream.getvalue()).decode()
