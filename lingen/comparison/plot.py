"""loss_curves.png, the figure of the README, and its companion on the remaining axes.

Shapes: N records of one stage; every line is drawn stage by stage, so nothing connects or smooths across a transfer.
"""

from __future__ import annotations

import io
import math
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from lingen.comparison.curves import Curve, window_mean
from lingen.comparison.read import Run, Stage
from lingen.comparison.result import Result
from lingen.comparison.style import (
    BAND,
    DPI,
    MUTED,
    RC,
    STRETCHED_SHARE,
    colours,
    draw_marks,
    dress_x,
    loss_limits,
    marks,
    shared_edges,
    shortened,
    stretch_x,
)

LEGEND_COLUMNS = 4
INITIAL_FALL = 0.05  # of the first stage's samples: may leave the panel at the top


def loss_curves(result: Result, axes: list[str], *, log: bool) -> bytes:
    """Training and validation loss against the first of ``axes``, validation against the others: a PNG, 1600 x 1000."""
    with matplotlib.rc_context(RC):
        small, top = axes[1:], 0.9 - 0.027 * _legend_rows(result)  # below the title and the legend
        figure = Figure(figsize=(16, 10 if small else 6.2), dpi=DPI, facecolor="white", layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1, rect=(0, 0, 1, top))  # type: ignore[union-attr, call-arg]
        columns = max(1, len(small))
        grid = figure.add_gridspec(2 if small else 1, 2 * columns, height_ratios=[1.5, 1] if small else [1])
        panels = [
            (figure.add_subplot(grid[0, :columns]), axes[0], "training"),
            (figure.add_subplot(grid[0, columns:]), axes[0], "validation"),
        ]
        for i, axis in enumerate(small):
            panels.append((figure.add_subplot(grid[1, 2 * i : 2 * i + 2]), axis, "validation"))
        for ax, axis, kind in panels:
            draw_loss(ax, result, axis, kind=kind, log=log)
        for ax, axis, _ in panels:
            draw_marks(ax, marks(result, axis), names=axis == axes[0])
        _head(figure, result)
        return to_png(figure)


def training_curves(result: Result, axes: list[str], *, log: bool) -> bytes:
    """Training loss against each of ``axes``, one panel each: a PNG."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(16, 4.2), dpi=DPI, facecolor="white", layout="constrained")
        panels = list(figure.subplots(1, len(axes), squeeze=False)[0])
        for ax, axis in zip(panels, axes, strict=True):
            draw_loss(ax, result, axis, kind="training", log=log)
        for ax, axis in zip(panels, axes, strict=True):
            draw_marks(ax, marks(result, axis), names=False)
        return to_png(figure)


def draw_loss(ax: Axes, result: Result, axis: str, *, kind: str, log: bool) -> None:
    """One panel: ``kind`` is training (each logged step faint, window mean strong) or validation (as measured)."""
    colour = colours(result)
    shown = []
    for run in result.runs:
        measured = []
        for stage in run.stages:
            if kind == "training":
                draw_training(ax, stage.train, axis, colour[run.label], result.smoothing)
                measured.append((stage, window_mean(stage.train, result.smoothing)))
            else:
                draw_validation(ax, stage.validation, axis, colour[run.label])
                measured.append((stage, stage.validation))
        shown.append(must_be_seen(run, measured))
    finish(ax, result, axis, log=log, shown=shown)
    ax.set_ylabel(f"{kind} loss")


def draw_training(ax: Axes, curve: Curve, axis: str, colour: str, smoothing: int, *, start: float = 0.0) -> None:
    """Each logged step faint, and the window mean; ``start`` is taken off the counts."""
    smooth = window_mean(curve, smoothing)
    ax.plot(
        curve.counts[axis] - start, curve.loss, color=colour, alpha=0.22 if len(curve) < 1000 else 0.12, linewidth=0.8
    )
    ax.plot(smooth.counts[axis] - start, smooth.loss, color=colour, linewidth=2.2)


def draw_validation(ax: Axes, curve: Curve, axis: str, colour: str, *, start: float = 0.0) -> None:
    """The records themselves: a fixed held-out set needs no smoothing."""
    size = 4.5 if len(curve) <= 25 else 0.0
    ax.plot(curve.counts[axis] - start, curve.loss, color=colour, linewidth=1.9, marker="o", markersize=size)


def finish(ax: Axes, result: Result, axis: str, *, log: bool, shown: list[list[float]]) -> None:
    """Limits, ticks and the alternating background of the stages where all runs agree on them."""
    low = min(run.stages[0].start[axis] for run in result.runs)
    high = max(run.stages[-1].end[axis] for run in result.runs)
    edges = shared_edges(result, axis)
    if edges and min(np.diff(edges)) < 0.5 * STRETCHED_SHARE / (len(edges) - 1) * (edges[-1] - edges[0]):
        stretch_x(ax, axis, edges)
    else:
        ax.set_xlim(low, high + 0.01 * (high - low) if high > low else low + 1)
        dress_x(ax, axis)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(MaxNLocator(7))  # losses span less than a decade: powers of ten would be one tick
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(*loss_limits(shown, log=log))
    for left, right in list(pairwise(edges or []))[1::2]:
        ax.axvspan(left, right, color=BAND, zorder=0)


def must_be_seen(run: Run, curves: list[tuple[Stage, Curve]]) -> list[float]:
    """All losses but those of the first moments of the run, whose fall would flatten everything after it."""
    values: list[float] = []
    for stage, curve in curves:
        skip = 0
        if stage is run.stages[0]:
            limit = stage.start["samples"] + INITIAL_FALL * (stage.end["samples"] - stage.start["samples"])
            skip = int((curve.counts["samples"] <= limit).sum())
        values += curve.loss[skip:].tolist()
    return values or [float(curve.loss[-1]) for _, curve in curves if len(curve)]


def _head(figure: Figure, result: Result) -> None:
    """Title, what is drawn, and the legend of runs, in the strip above the panels."""
    figure.text(0.012, 0.977, title(result), fontsize=19, fontweight="bold", va="top")
    subtitle = (
        f"Training: every logged step faint, mean over {result.smoothing} bold, never across a transfer. "
        "Validation: as measured, on fixed samples and noise. The first fall may leave the panel."
    )
    figure.text(0.012, 0.937, subtitle, fontsize=12, color=MUTED, va="top")
    colour = colours(result)
    handles = [Line2D([], [], color=colour[run.label], linewidth=3, marker="o", markersize=6) for run in result.runs]
    texts = [shortened(run.label, 30) + (" (in progress)" if run.in_progress else "") for run in result.runs]
    if _legend_rows(result) == 0:
        figure.legend(handles, texts, loc="upper right", bbox_to_anchor=(0.995, 0.99), ncols=4, fontsize=14)
    else:
        figure.legend(handles, texts, loc="upper left", bbox_to_anchor=(0.005, 0.92), ncols=LEGEND_COLUMNS)


def _legend_rows(result: Result) -> int:
    """Rows that the legend needs below the title; 0 where it fits beside it."""
    beside = len(result.runs) <= LEGEND_COLUMNS and sum(len(run.label) + 14 for run in result.runs) <= 60
    return 0 if beside else math.ceil(len(result.runs) / LEGEND_COLUMNS)


def title(result: Result) -> str:
    """Of the figure and of the page."""
    names = " against ".join(run.label for run in result.runs)
    return (
        f"{names}: loss across transfers" if len(names) <= 40 else f"Loss of {len(result.runs)} runs across transfers"
    )


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG without a date, so that the same runs give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
