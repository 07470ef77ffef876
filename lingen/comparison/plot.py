"""loss_curves.png, the figure of the README, and its companion on the remaining axes.

Shapes: N records of one stage; every line is drawn stage by stage, so nothing connects or smooths across a transfer.
"""

from __future__ import annotations

import io
from itertools import pairwise

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lingen.comparison.curves import Curve, window_mean
from lingen.comparison.read import Run, Stage
from lingen.comparison.result import Result
from lingen.comparison.style import (
    BAND,
    DPI,
    INK,
    MUTED,
    RC,
    colours,
    draw_marks,
    dress_x,
    loss_limits,
    marks,
)

INITIAL_FALL = 0.05  # of the first stage's samples: may leave the panel at the top


def loss_curves(result: Result, axes: list[str], *, log: bool) -> bytes:
    """Training and validation loss against the first of ``axes``, validation against the others: a PNG, 1600 x 1000."""
    with matplotlib.rc_context(RC):
        small = axes[1:]
        figure = Figure(figsize=(16, 10 if small else 6.2), dpi=DPI, facecolor="white", layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1, rect=(0, 0, 1, 0.9))  # type: ignore[union-attr, call-arg]
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
    ax.plot(curve.counts[axis] - start, curve.loss, color=colour, alpha=0.22, linewidth=0.8)
    ax.plot(smooth.counts[axis] - start, smooth.loss, color=colour, linewidth=2.2)


def draw_validation(ax: Axes, curve: Curve, axis: str, colour: str, *, start: float = 0.0) -> None:
    """The records themselves: a fixed held-out set needs no smoothing."""
    size = 4.5 if len(curve) <= 60 else 0.0
    ax.plot(curve.counts[axis] - start, curve.loss, color=colour, linewidth=1.9, marker="o", markersize=size)


def finish(ax: Axes, result: Result, axis: str, *, log: bool, shown: list[list[float]]) -> None:
    """Limits, ticks and the alternating background of the stages where all runs agree on them."""
    low = min(run.stages[0].start[axis] for run in result.runs)
    high = max(run.stages[-1].end[axis] for run in result.runs)
    ax.set_xlim(low, high + 0.01 * (high - low) if high > low else low + 1)
    if log:
        ax.set_yscale("log")
    ax.set_ylim(*loss_limits(shown, log=log))
    dress_x(ax, axis)
    bounds = [mark for mark in marks(result, axis) if mark.colour == MUTED]
    if len(bounds) == len(result.stage_names):
        edges = [mark.x for mark in bounds] + [ax.get_xlim()[1]]
        for left, right in list(pairwise(edges))[1::2]:
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
    names = [run.label for run in result.runs]
    title = (
        f"{' against '.join(names)}: loss across the transfers of a curriculum" if len(names) <= 3 else "Loss curves"
    )
    figure.text(0.012, 0.977, title, fontsize=19, fontweight="bold", va="top")
    subtitle = (
        f"Training: every logged step faint, mean over {result.smoothing} bold, never across a transfer. "
        "Validation: as measured, on fixed samples and noise. The first fall may leave the panel."
    )
    figure.text(0.012, 0.937, subtitle, fontsize=12, color=MUTED, va="top")
    colour = colours(result)
    handles = [Line2D([], [], color=colour[run.label], linewidth=3, marker="o", markersize=6) for run in result.runs]
    texts = [f"{run.label} (in progress)" if run.in_progress else run.label for run in result.runs]
    figure.legend(handles, texts, loc="upper right", bbox_to_anchor=(0.995, 0.99), ncols=4, fontsize=14, labelcolor=INK)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG without a date, so that the same runs give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
