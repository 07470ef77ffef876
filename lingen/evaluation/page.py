"""index.html: the tables, the figure, and some videos side by side, in one file that needs no other.

Shapes: N videos.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch.nn import functional

from data.encode import encode_mp4
from lingen.comparison.style import si
from lingen.evaluation.folder import RunFile, SampledRun, VideoRecord, stem
from lingen.evaluation.plot import colours
from lingen.evaluation.result import Measured, Result, metric
from lingen.evaluation.tables import details, number, overview

UNDER_VIDEO = ("psnr", "ssim", "lpips", "psnr_reference")  # of these, what there is
CHECKED = ("colour", "shape", "motion")
PIXELATED = 128  # pixels of the longer side, up to which videos are shown enlarged without smoothing


def render(result: Result, figure: bytes, *, shown: int, side: int, words: list[str]) -> bytes:
    """The page, with ``figure`` (quality.png) and ``shown`` videos of each run, made smaller where their longer side is
    more than ``side`` pixels. All text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # prompts and names come from files
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    file = result.runs[0].run.file
    page = environment.get_template("page.html.j2").render(
        title=f"{len(result.runs)} ways to sample {len(file.videos)} videos",
        words=words,
        warnings=result.warnings,
        colours=colours(result),
        tables=overview(result),
        details=[details(result, key) for key in result.keys],
        dotted=result.reference is not None,
        figure=base64.b64encode(figure).decode(),
        rows=[_row(result, n, why, side) for n, why in chosen(result, shown)],
        facts=_facts(file),
        aspect=f"{file.width} / {file.height}",
        small=max(file.height, file.width) <= PIXELATED,
    )
    return page.encode(errors="replace")


def chosen(result: Result, shown: int) -> list[tuple[int, str]]:
    """Which videos are shown, and why: the worst against the baseline, and as many evenly spaced ones."""
    count = len(result.runs[0].run.file.videos)
    found: dict[int, str] = {}
    psnrs = [one.values["psnr"] for one in result.runs if "psnr" in one.values]
    if psnrs:
        order = np.argsort(np.mean(psnrs, axis=0), kind="stable")
        found = {int(n): f"farthest from {result.baseline}" for n in order[: shown // 2]}
    for n in np.linspace(0, count - 1, min(shown, count)).round().astype(int):
        if len(found) < min(shown, count):
            found.setdefault(int(n), "")
    return list(found.items())


def _facts(file: RunFile) -> str:
    prompts, size = len({asked.prompt for asked in file.videos}), f"{file.frames}x{file.height}x{file.width}"
    return f"{prompts} prompts, {len(file.videos)} videos of {size} at {file.fps:g} frames/s"


def _row(result: Result, n: int, why: str, side: int) -> dict[str, Any]:
    asked = result.runs[0].run.file.videos[n]
    return {
        "number": stem(n),
        "prompt": asked.prompt,
        "seed": asked.seed,
        "why": why,
        "videos": [_card(one, n, side) for one in result.runs],
    }


def _card(one: Measured, n: int, side: int) -> dict[str, Any]:
    record = one.run.records[n]
    told = [
        f"{metric(key).short} {number(key, float(one.values[key][n]))}"
        for key in UNDER_VIDEO
        if key in one.values and not np.isnan(one.values[key][n])
    ]
    checked = {key: one.values[key][n] for key in CHECKED if key in one.values}
    return {
        "name": one.run.name,
        "media": base64.b64encode(_small(one.run, n, side)).decode(),
        "cost": f"{si(record.flops, 'FLOP')}, {record.seconds:.3g} s",
        "told": told,
        "calls": _calls(record),
        "wrong": [key for key, value in checked.items() if value == 0],
        "right": [key for key, value in checked.items() if value == 1],
    }


def _calls(record: VideoRecord) -> list[bool]:
    """For each call of the model whether it was computed, where a cache decided that for the whole stack."""
    contexts = (record.cache or {}).get("contexts", {})
    return next((context["schedules"][0] for context in contexts.values() if context.get("schedules")), [])


def _small(run: SampledRun, n: int, side: int) -> bytes:
    """The video as an mp4 of at most ``side`` pixels."""
    file = run.file
    scale = side / max(file.height, file.width)
    if scale >= 1:
        return run.mp4(n)
    size = [max(2, round(each * scale / 2) * 2) for each in (file.height, file.width)]  # H.264 wants them even
    frames = run.pixels(n).transpose(0, 1).float()  # (F, 3, H, W)
    small = functional.interpolate(frames, size=size, mode="bilinear", antialias=True)
    pixels = small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return encode_mp4(pixels, file.fps)
