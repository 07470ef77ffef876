"""quality.png: each metric against the executed FLOPs, a point a run, a line a curve."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from lingen.comparison.plot import to_png
from lingen.comparison.style import COLOURS, DPI, MUTED, RC, shortened
from lingen.evaluation.result import Measured, Result, metric
from lingen.evaluation.tables import full_title

COLUMNS = 3
LEGEND_COLUMNS = 6
DASHES = {"baseline": (0, (4, 2.5)), "reference": (0, (1, 2))}
MARKERS = "osD^vPX*"  # with the colours, 64 curves are told apart


def series(result: Result) -> dict[str, list[Measured]]:
    """Curve -> its runs from cheap to dear; a run without a curve is one by itself. The reference is left out: it costs
    so much more that the others would be drawn in a corner."""
    found: dict[str, list[Measured]] = {}
    for one in (one for one in result.runs if one.run.name != result.reference):
        found.setdefault(one.run.file.curve or one.run.name, []).append(one)
    return {name: sorted(runs, key=_flops) for name, runs in found.items()}


def colours(result: Result) -> dict[str, str]:
    """Run -> colour, the same in the figure and in the page."""
    found = {one.run.name: MUTED for one in result.runs}
    return found | {one.run.name: _look(i)[0] for i, runs in enumerate(series(result).values()) for one in runs}


def quality_against_flops(result: Result) -> bytes:
    """A panel a metric that is no cost, and one of the latency: mean and 95% interval against the executed FLOPs of a
    video. Dashed lines where the baseline is, a dotted one where the reference is. A PNG."""
    keys = [key for key in result.keys if not metric(key).cost] + [k for k in ("denoise_seconds",) if k in result.keys]
    curves = series(result)
    rows, legend = -(-len(keys) // COLUMNS), -(-len(curves) // LEGEND_COLUMNS)
    with matplotlib.rc_context(RC):
        size = (16, 4.3 * rows + 0.35 * legend)
        figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1, hspace=0.06)  # type: ignore[union-attr, call-arg]
        panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for ax in panels[len(keys) :]:
            ax.set_visible(False)
        for ax, key in zip(panels, keys, strict=False):
            _panel(ax, result, curves, key)
        handles = [
            Line2D([], [], color=c, marker=m, linestyle="", markersize=8) for c, m in map(_look, range(len(curves)))
        ]
        figure.legend(handles, [shortened(name, 30) for name in curves], loc="outside upper left", ncols=LEGEND_COLUMNS)
        return to_png(figure)


def _look(i: int) -> tuple[str, str]:
    """Colour and marker of the curve number ``i``."""
    return COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]


def _panel(ax: Axes, result: Result, curves: dict[str, list[Measured]], key: str) -> None:
    scale = metric(key).scale
    for i, runs in enumerate(curves.values()):
        shown = [(one, one.summaries[key].mean) for one in runs if key in one.summaries]
        if not shown:
            continue
        x, y = [_flops(one) for one, _ in shown], np.array([mean.value for _, mean in shown])
        low = np.array([mean.value if mean.low is None else mean.low for _, mean in shown])
        high = np.array([mean.value if mean.high is None else mean.high for _, mean in shown])
        bars = np.maximum([y - low, high - y], 0) * scale  # a percentile may lie on the mean's other side by rounding
        colour, marker = _look(i)
        ax.errorbar(x, y * scale, bars, color=colour, marker=marker, markersize=7, capsize=3, linewidth=1.6)
    for one in result.runs:
        dashes = DASHES.get({result.baseline: "baseline", result.reference: "reference"}.get(one.run.name, ""))
        if dashes is not None and key in one.summaries and not (one.run.name == result.reference and metric(key).cost):
            ax.axhline(one.summaries[key].mean.value * scale, color=MUTED, linewidth=1, linestyle=dashes, zorder=1)
        if one.run.name == result.baseline:
            ax.axvline(_flops(one), color=MUTED, linewidth=1, linestyle=dashes, zorder=1)
    ax.set_title(shortened(full_title(result, key), 60), fontsize=12.5, loc="left")
    ax.set_xlabel("executed FLOPs a video")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlim(0, 1.08 * max(_flops(one) for runs in curves.values() for one in runs))
    ax.margins(y=0.12)


def _flops(one: Measured) -> float:
    return one.summaries["flops"].mean.value
