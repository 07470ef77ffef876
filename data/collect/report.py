"""report.html: what was collected and what was left out, on one page that needs no other file."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from data.collect.examine import Rejection, look, read_part
from data.collect.pool import Lost, ordered
from data.collect.words import Words
from data.decode import BadSample, ClipInfo
from data.shards import Index, load_index
from data.writer import Window
from lingen.files import write_file

PAGE = "report.html"
SHOWN = 48  # samples on the contact sheet
THUMB_SIDE = 108  # pixels of the shorter side
THUMB_SECONDS = 60.0  # for one, after which it is left out
NAMED = 3  # rejected files a reason
BINS = 24


class Thumb(NamedTuple):
    """A sample to show."""

    path: str
    offset: int
    size: int
    window: Window


class Bar(NamedTuple):
    """Of a histogram: ``left`` and ``height`` as shares of its width and of its highest bar."""

    left: float
    height: float
    label: str


class Histogram(NamedTuple):
    title: str
    note: str
    bars: list[Bar]
    width: float  # of a bar, as a share
    ticks: list[tuple[float, str]]


def write_report(words: Words, output: Path, report: dict[str, Any], rejected: list[Rejection]) -> None:
    """Write report.html beside index.json."""
    index = load_index(output)
    chosen = choose(index)
    shots = ordered(
        partial(thumbnail, THUMB_SIDE), [_thumb(index, i) for i in chosen], workers=words.workers, seconds=THUMB_SECONDS
    )
    cells = [
        {
            "image": base64.b64encode(shot).decode(),
            "key": index.key[i],
            "caption": index.caption[i][:300],
            "facts": _facts(index, i),
        }
        for i, shot in zip(chosen, shots, strict=True)
        if not isinstance(shot, Lost) and shot
    ]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html.j2")
    page = template.render(
        title=f"{output.resolve().name}: {report['samples']:,} samples",
        words=words.binding(),
        report=report,
        reasons=reasons(rejected, report["samples"]),
        histograms=histograms(index),
        cells=cells,
    )
    write_file(output / PAGE, page.encode(errors="replace"))


def choose(index: Index) -> list[int]:
    """The rows on the contact sheet, by a hash of their keys: the same whatever is run again."""
    order = sorted(range(len(index)), key=lambda i: hashlib.blake2b(index.key[i].encode(), digest_size=8).digest())
    return order[:SHOWN]


def _thumb(index: Index, i: int) -> Thumb:
    info = ClipInfo(int(index.frames[i]), float(index.fps[i]), int(index.height[i]), int(index.width[i]))
    window = Window(index.key[i], "", info, float(index.begin[i]), float(index.end[i]))
    return Thumb(str(index.shard_paths[index.shard[i]]), int(index.offset[i]), int(index.bytes[i]), window)


def thumbnail(side: int, thumb: Thumb) -> bytes:
    """The sample's first, middle and last frame (an image once), side by side as a JPEG; empty where it fails."""
    try:
        media = read_part(Path(thumb.path), thumb.offset, thumb.size)
        frames = look(media, thumb.window, min(3, thumb.window.info.frames), side)  # (K, H, W, 3)
    except (BadSample, OSError):
        return b""
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(stream, "jpeg", quality=80)
    return stream.getvalue()


def _facts(index: Index, i: int) -> str:
    size = f"{index.width[i]}x{index.height[i]}"
    if index.frames[i] == 1:
        return f"image, {size}"
    return f"{index.frames[i] / index.fps[i]:.2f} s, {size}, {index.fps[i]:.4g} frames/s"


def reasons(rejected: list[Rejection], samples: int) -> list[dict[str, Any]]:
    """A row for each reason: how many, their share of all samples, and a few of them."""
    by_reason: dict[str, list[Rejection]] = {}
    for one in rejected:
        by_reason.setdefault(one.reason, []).append(one)
    rows = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return [
        {
            "reason": reason,
            "count": len(found),
            "share": len(found) / (samples + len(rejected)),
            "bad": found[0].bad,
            "named": [
                f"{one.path[-120:]} ({one.detail[:120]})" if one.detail else one.path[-120:]
                for one in islice(found, NAMED)
            ],
        }
        for reason, found in rows
    ]


def histograms(index: Index) -> list[Histogram]:
    """Duration, size, rate and caption length."""
    videos = index.frames > 1
    seconds = index.frames[videos] / np.where(index.fps[videos] > 0, index.fps[videos], 1.0)
    sides = np.minimum(index.height, index.width)
    lengths = np.array([len(caption) for caption in index.caption])
    drawn = (
        histogram("Duration", "seconds, of the videos", seconds),
        histogram("Size", "pixels of the shorter side", sides),
        histogram("Rate", "frames/s, of the videos", index.fps[videos]),
        histogram("Caption length", "characters", lengths),
    )
    return [one for one in drawn if one is not None]


def histogram(title: str, note: str, values: npt.NDArray[Any]) -> Histogram | None:
    """Bars of equal width; where the values span more than a factor of 50, of equal ratios. None without values."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high / low > 50
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.geomspace(low, high, BINS + 1) if logarithmic else np.linspace(low, high, BINS + 1)
    edges[0], edges[-1] = low, high
    counts, _ = np.histogram(values, edges)
    bars = [
        Bar(n / BINS, count / counts.max(), f"{count:,} from {edges[n]:.4g} to {edges[n + 1]:.4g}")
        for n, count in enumerate(counts)
    ]
    places: Sequence[int] = range(0, BINS + 1, BINS // 4)
    ticks = [(place / BINS, f"{edges[place]:.3g}" if edges[place] < 1e4 else f"{edges[place]:.0f}") for place in places]
    scale = ", logarithmic" if logarithmic else ""
    median = f"median {np.median(values):.4g}, from {values.min():.4g} to {values.max():.4g}"
    note = f"{note}{scale}; {median}; the highest bar is {counts.max():,}"
    return Histogram(title, note, bars, 1 / BINS, ticks)
