"""The trial's figures: quality against executed FLOPs, a line a curve; and how well motion is told, call by call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lingen.comparison.plot import to_png
from lingen.comparison.style import COLOURS, DPI, INK, MUTED, RC
from lingen.evaluation.plot import MARKERS
from lingen.evaluation.result import Measured, metric
from lingen.evaluation.statistics import Interval
from lingen.trial.variants import ADACACHE, FEWER, FIXED, REFERENCE, UNCACHED

BOLD = (FEWER, FIXED, ADACACHE)
MOST_DB = 60.0  # that are drawn: equal videos have 100
PANELS = {
    "psnr": f"PSNR to {UNCACHED} (dB)",
    "psnr_reference": f"PSNR to {REFERENCE} (dB)",
    "attributes": "all attributes as asked (%)",
}


def curves_figure(title: str, curves: Mapping[str, Sequence[Measured]], base: Measured, threshold: float) -> bytes:
    """A panel a metric, over the share of the uncached FLOPs that was executed, with intervals of 95%. A PNG."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(17, 6.6), dpi=DPI, facecolor="white", layout="constrained")
        panels = list(figure.subplots(1, len(PANELS), squeeze=False).flat)
        for ax, key in zip(panels, PANELS, strict=True):
            _panel(ax, curves, base, key)
        panels[0].axhline(threshold, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        panels[0].set_ylim(top=min(MOST_DB, panels[0].get_ylim()[1]))
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        panels[0].annotate(f"{threshold:g} dB", (1, threshold), **place)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
        figure.suptitle(title, x=0.01, ha="left", fontsize=14)
        return to_png(figure)


def _panel(ax: Axes, curves: Mapping[str, Sequence[Measured]], base: Measured, key: str) -> None:
    scale, whole = metric(key).scale, base.summaries["flops"].mean.value
    for number, (name, runs) in enumerate(curves.items()):
        means = [one.summaries[key].mean for one in runs]
        x = [one.summaries["flops"].mean.value / whole for one in runs]
        y = [mean.value * scale for mean in means]
        bars = [
            [max(0.0, mean.value - (mean.value if mean.low is None else mean.low)) * scale for mean in means],
            [max(0.0, (mean.value if mean.high is None else mean.high) - mean.value) * scale for mean in means],
        ]
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]  # where colours come again, others
        ax.errorbar(
            x, y, bars, label=name, color=COLOURS[number % len(COLOURS)], marker=marker,
            markersize=7, capsize=2, elinewidth=0.8, linewidth=2.6 if name in BOLD else 1.3,
        )  # fmt: skip
    if key in base.summaries:
        ax.axhline(base.summaries[key].mean.value * scale, color=MUTED, linewidth=1, linestyle=(0, (4, 2.5)))
    ax.set_title(PANELS[key], fontsize=12.5, loc="left")
    ax.set_xlabel("executed FLOPs, of those without a cache")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.margins(y=0.08)


def motion_figure(title: str, calls: Sequence[int], found: Mapping[str, Sequence[Interval]]) -> bytes:
    """Rank correlations of the motion score at each call. A PNG."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9, 4.2), dpi=DPI, facecolor="white", layout="constrained")
        ax = figure.subplots()
        for colour, (name, row) in zip(COLOURS, found.items(), strict=False):
            ax.plot(calls, [one.value for one in row], color=colour, label=name)
            ends = [(one.low, one.high) for one in row]
            low, high = ([float("nan") if end is None else end for end in side] for side in zip(*ends, strict=True))
            ax.fill_between(calls, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axhline(0, color=MUTED, linewidth=1)
        ax.set_ylim(-1, 1)
        ax.set_xlabel("call, from noise to data")
        ax.set_ylabel("Spearman's rank correlation")
        ax.set_title(title, fontsize=12.5, loc="left")
        ax.legend()
        return to_png(figure)
