"""The look of all figures: one colour a run, SI ticks, and stage boundaries that are named without overlapping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from lingen.comparison.curves import Array
from lingen.comparison.result import Result

DPI = 100
INK, MUTED, GRID, BAND = "#1f2430", "#667085", "#e4e7ec", "#f5f6f8"
# Okabe and Ito's colours without the yellow, which is too faint on white: told apart with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f5539", "#444444")
AXIS_NAMES = {
    "samples": "samples seen",
    "tokens": "tokens seen",
    "flops": "training compute (FLOPs)",
    "hours": "wall clock",
}
RC: Any = {
    "font.size": 12.5,
    "axes.edgecolor": "#98a2b3",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a run's name is text, whatever it is made of
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
AGREED = 0.005  # of the axis: transfers so close are one
ROUND = (1.0, 2.0, 2.5, 5.0)
LABEL_PIXELS = 52  # of a tick label and the space beside it
STRETCHED_SHARE = 0.75  # of an equal share of the axis, below which a stage is widened
TIME_UNITS = ((1.0, "h"), (60.0, "min"), (3600.0, "s"))  # in an hour


@dataclass(frozen=True)
class Mark:
    """A stage begins at ``x``; ``colour`` is the run's where the runs differ."""

    x: float
    number: int
    stage: str
    colour: str


def colours(result: Result) -> dict[str, str]:
    """Label -> colour, by the order of the runs, the same in every figure and in the page."""
    return {run.label: COLOURS[i % len(COLOURS)] for i, run in enumerate(result.runs)}


def time_unit(hours: float) -> tuple[float, str]:
    """(units in an hour, name) in which the longest of some times, in hours, reads well."""
    return next((unit for unit in TIME_UNITS if hours * unit[0] >= 1.0), TIME_UNITS[-1])


def dress_x(ax: Axes, axis: str, *, since: str = "") -> None:
    """Label and SI ticks of a count, at the panel's final limits. Hours are shown in the unit that suits the range."""
    low, high = ax.get_xlim()
    per_hour, unit = time_unit(max(abs(low), abs(high))) if axis == "hours" else (1.0, "")
    ticks = np.asarray(MaxNLocator(6).tick_values(low * per_hour, high * per_hour)) / per_hour
    ax.set_xticks([float(tick) for tick in ticks if low <= tick <= high])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x * per_hour:g}") if unit else EngFormatter(sep=""))
    name = f"{AXIS_NAMES[axis].removesuffix(' seen')} since {since}" if since else AXIS_NAMES[axis]
    ax.set_xlabel(f"{name} ({unit})" if unit else name)


def stretch_x(ax: Axes, axis: str, edges: list[float]) -> None:
    """Give short stages room: piecewise linear in the count, no stage below 0.75 of an equal share before scaling.

    Each later resolution is trained on a fraction of the samples of the one before; drawn to scale, the transfers that
    matter most would be slivers. Ticks count from the start of each stage.
    """
    lengths = np.diff(edges)
    widths = np.maximum(lengths / lengths.sum(), STRETCHED_SHARE / len(lengths))
    places = np.concatenate([[0.0], np.cumsum(widths) / widths.sum()])

    def forward(x: Array) -> Array:
        return np.asarray(np.interp(x, edges, places), dtype=np.float64)

    def backward(place: Array) -> Array:
        return np.asarray(np.interp(place, places, edges), dtype=np.float64)

    ax.set_xscale("function", functions=(forward, backward))
    ax.set_xlim(edges[0], edges[-1])
    pixels = ax.get_window_extent().width
    ticks, labels = [edges[0]], [si(edges[0])]
    for start, length, width in zip(edges[:-1], lengths, np.diff(places), strict=True):
        room = width * pixels
        if room < LABEL_PIXELS:
            continue
        last = (1 - 0.4 * LABEL_PIXELS / room) * length  # a label further right would reach into the next stage
        step = _round_up(length * LABEL_PIXELS / room)
        for tick in np.arange(step, last, step).tolist() or [_round_down(last)]:
            ticks.append(start + tick)
            labels.append(f"+{si(tick)}" if start > 0 else si(tick))
    ax.set_xticks(ticks, labels)
    ax.set_xlabel(f"{AXIS_NAMES[axis]} (+: in the stage{'; short stages widened' if pixels > 500 else ''})")


def _round_down(value: float) -> float:
    """To 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(factor * power for factor in ROUND if factor * power <= value)


def _round_up(value: float) -> float:
    """To 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return min(factor * power for factor in (*ROUND, 10.0) if factor * power >= value)


def shared_edges(result: Result, axis: str) -> list[float] | None:
    """Where the stages begin, and the end, if all runs agree on it; None otherwise."""
    end = max(run.stages[-1].end[axis] for run in result.runs)
    edges = []
    for name in result.stage_names:
        starts = [stage.start[axis] for run in result.runs if (stage := run.stage(name)) is not None]
        if max(starts) - min(starts) > AGREED * end:
            return None
        edges.append(starts[0])
    edges.append(end + 0.02 * (end - edges[-1]))
    return edges if all(a < b for a, b in pairwise(edges)) else None


def marks(result: Result, axis: str) -> list[Mark]:
    """Where each stage begins: once where all runs agree on it, else once a run, in its colour."""
    end = max(run.stages[-1].end[axis] for run in result.runs)
    found = []
    for number, name in enumerate(result.stage_names, 1):
        starts = {run.label: stage.start[axis] for run in result.runs if (stage := run.stage(name)) is not None}
        if max(starts.values()) - min(starts.values()) <= AGREED * end:
            found.append(Mark(min(starts.values()), number, name, MUTED))
        else:
            found += [Mark(x, number, name, colours(result)[label]) for label, x in starts.items()]
    return found


def draw_marks(ax: Axes, found: list[Mark], *, names: bool) -> None:
    """A vertical line at each transfer, its stage's number (and name) above the panel; call it with final limits.

    Labels take the lowest row in which they do not touch another. The figure must have its final size and layout.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # lays the panels out, so that pixels mean something
    left_edge = ax.get_xlim()[0]
    box = ax.get_window_extent()
    rows: list[list[tuple[float, float]]] = []  # a row's occupied pixels
    for mark in sorted(found, key=lambda m: m.x):
        if mark.x > left_edge:
            ax.axvline(mark.x, color=mark.colour, linewidth=1.2, linestyle=(0, (4, 2.5)), zorder=1.5)
        text = f"{mark.number} {mark.stage}" if names else str(mark.number)
        label = _label(ax, mark, shortened(text, 34))
        extent = label.get_window_extent()
        left = max(box.x0, min(extent.x0, box.x1 - extent.width + 4))
        row = next((i for i, row in enumerate(rows) if _is_free(row, left, left + extent.width)), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append((left, left + extent.width))
        label.set_position(((left - extent.x0) * 72 / DPI, 4 + 14 * row))


def _label(ax: Axes, mark: Mark, text: str) -> Annotation:
    return ax.annotate(
        text,
        xy=(mark.x, 1.0),
        xycoords=ax.get_xaxis_transform(),
        xytext=(0, 4),
        textcoords="offset points",
        ha="left",
        va="bottom",
        fontsize=10.5,
        color=mark.colour,
        annotation_clip=False,
    )


def _is_free(row: list[tuple[float, float]], left: float, right: float) -> bool:
    return all(right + 8 < a or b + 8 < left for a, b in row)


def shortened(text: str, length: int) -> str:
    """``text`` cut to ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def si(number: float, unit: str = "") -> str:
    """1234567 -> "1.23M"; three digits and an SI prefix."""
    power = 0
    while abs(number) >= 999.5 and power < len(PREFIXES) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"
    return f"{digits} {PREFIXES[power]}{unit}" if unit else f"{digits}{PREFIXES[power]}"


def loss_limits(shown: list[list[float]], *, log: bool) -> tuple[float, float]:
    """Limits that hold all the values given, with a little room: the values are those that must be seen."""
    values = [v for group in shown for v in group if math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        return low * 0.97, high * 1.05
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
    return low - room, high + room
