"""The figures of the report that look closer: each transfer, the lead of one run over another, buckets, timestep bins.

Shapes: N records of one stage.
"""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lingen.comparison.curves import Array, Curve, first_at_or_below, window_mean
from lingen.comparison.head_to_head import StageComparison
from lingen.comparison.plot import draw_training, draw_validation, finish, must_be_seen, to_png
from lingen.comparison.read import Stage
from lingen.comparison.result import Result
from lingen.comparison.style import DPI, GRID, MUTED, RC, colours, draw_marks, dress_x, loss_limits, marks
from lingen.comparison.transfers import Transfer, common_buckets, mean_curve

TAIL = 0.3  # of the new stage's samples: so much of the stage before is shown ahead of a transfer


def transfer_panels(result: Result) -> bytes:
    """A row a transfer: validation of each stage's own buckets, of the common buckets, and training; against samples
    since the transfer, with each run's level before it (dotted) and where it is back at that level (diamond)."""
    with matplotlib.rc_context(RC):
        figure, grid = _grid(len(result.transfers), 3, 4.4)
        for row, transfer in zip(grid, result.transfers, strict=True):
            titles = ("validation loss, each stage's own buckets", "validation loss, common buckets", "training loss")
            for i, (ax, title) in enumerate(zip(row, titles, strict=True)):
                sides = {label: curves for label in transfer.runs if (curves := _sides(result, transfer, label, i))}
                _one_transfer(ax, result, transfer, sides, training=i == 2)
                ax.text(0, 1.02, title, transform=ax.transAxes, fontsize=12.5, color=MUTED, va="bottom")
            row[0].set_title(f"{transfer.source} → {transfer.target}", fontweight="bold", loc="left", pad=26)
        _run_legend(figure, result)
        return to_png(figure)


def lead_panels(result: Result) -> bytes:
    """A panel a stage: validation loss of each other run minus the first run's, at the same samples of the stage."""
    with matplotlib.rc_context(RC):
        stages = [s for s in result.stages if result.runs[0].label in s.losses and len(s.losses) > 1]
        figure, grid = _grid(1, len(stages), 4.2)
        for ax, stage in zip(grid[0], stages, strict=True):
            _one_lead(ax, result, stage)
            ax.set_title(stage.stage, fontsize=13, loc="left", fontweight="bold")
        return to_png(figure)


def bucket_panels(result: Result) -> bytes:
    """A panel a bucket: its validation loss through all stages that validate it, against samples."""
    names = dict.fromkeys(bucket for run in result.runs for stage in run.stages for bucket in stage.buckets)
    groups = {}
    for name in names:
        groups[name] = [[(s, s.buckets[name]) for s in run.stages if name in s.buckets] for run in result.runs]
    return _panels(result, groups)


def bin_panels(result: Result) -> bytes:
    """A panel a timestep bin, low sigma (data) to high (noise): validation loss against samples."""
    n = max(len(stage.bins) for run in result.runs for stage in run.stages)
    groups = {}
    for i in range(n):
        name = f"sigma {i / n:g} to {(i + 1) / n:g}"
        groups[name] = [[(s, s.bins[i]) for s in run.stages if len(s.bins) == n] for run in result.runs]
    return _panels(result, groups)


def _panels(result: Result, groups: dict[str, list[list[tuple[Stage, Curve]]]]) -> bytes:
    """``groups``: panel -> run -> the curve of each stage."""
    with matplotlib.rc_context(RC):
        columns = min(4, len(groups))
        figure, grid = _grid(-(-len(groups) // columns), columns, 4.0)
        panels = [ax for row in grid for ax in row]
        for ax in panels[len(groups) :]:
            ax.set_visible(False)
        for ax, (name, by_run) in zip(panels, groups.items(), strict=False):
            for run, curves in zip(result.runs, by_run, strict=True):
                for _, curve in curves:
                    draw_validation(ax, curve, "samples", colours(result)[run.label])
            shown = [must_be_seen(run, curves) for run, curves in zip(result.runs, by_run, strict=True)]
            finish(ax, result, "samples", log=False, shown=shown)
            ax.set_title(name, fontsize=13, loc="left", fontweight="bold", pad=24)
            ax.set_ylabel("validation loss")
        _run_legend(figure, result)
        for ax in panels[: len(groups)]:
            draw_marks(ax, marks(result, "samples"), names=False)
        return to_png(figure)


def _one_transfer(
    ax: Axes, result: Result, transfer: Transfer, sides: dict[str, tuple[Curve, Curve]], *, training: bool
) -> None:
    if not sides:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no bucket is validated on both sides", ha="center", transform=ax.transAxes, color=MUTED)
        return
    length = max(after.at(-1)["samples"] - transfer.runs[label].start["samples"] for label, (_, after) in sides.items())
    shown = []
    for label, (before, after) in sides.items():
        start, colour = transfer.runs[label].start, colours(result)[label]
        tail = _from(before, start["samples"] - TAIL * length)
        for curve in (tail, after):
            if training:
                draw_training(ax, curve, "samples", colour, result.smoothing, start=start["samples"])
            else:
                draw_validation(ax, curve, "samples", colour, start=start["samples"])
        measured = window_mean(after, result.smoothing) if training else after
        effect = transfer.runs[label].training if training else None
        level = effect.before if effect is not None else float(before.loss[-1])
        ax.axhline(level, color=colour, linewidth=1.2, linestyle=":")
        crossing = first_at_or_below(measured, level, start)
        if crossing is not None:
            ax.plot(
                [crossing.cost["samples"]], [level], marker="D", markersize=9, color=colour, markeredgecolor="white"
            )
        shown.append([level, *measured.loss.tolist(), *(() if training else tail.loss.tolist())])
    ax.axvline(0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2.5)))
    ax.set_xlim(-TAIL * length, 1.02 * length if length else 1.0)
    ax.set_ylim(*loss_limits(shown, log=False))
    dress_x(ax, "samples", since="the transfer")


def _sides(result: Result, transfer: Transfer, label: str, kind: int) -> tuple[Curve, Curve] | None:
    """The curves on both sides of a transfer, if both exist: 0 validation, 1 mean of the common buckets, 2 training."""
    run = next(run for run in result.runs if run.label == label)
    before, after = run.stage(transfer.source), run.stage(transfer.target)
    assert before is not None and after is not None
    shared = common_buckets(before, after)
    pair = [_side(stage, shared, kind) for stage in (before, after)]
    return (pair[0], pair[1]) if len(pair[0]) and len(pair[1]) else None


def _side(stage: Stage, shared: list[str], kind: int) -> Curve:
    if kind == 1:
        return mean_curve([stage.buckets[b] for b in shared]) if shared else _from(stage.validation, np.inf)
    return stage.validation if kind == 0 else stage.train


def _one_lead(ax: Axes, result: Result, compared: StageComparison) -> None:
    """The lead, and a grey band as wide as what neighbouring validations scatter: inside it a lead says little."""
    first = result.runs[0].stage(compared.stage)
    assert first is not None
    ax.axhline(0, color=MUTED, linewidth=1.2)
    bands = [r.wobble for r in compared.reaches if r.run == result.runs[0].label and r.wobble is not None]
    if bands:
        ax.axhspan(-2 * max(bands), 2 * max(bands), color=GRID, alpha=0.7, zorder=0, linewidth=0)
    for run in result.runs[1:]:
        other = run.stage(compared.stage)
        if other is None or not len(other.validation):
            continue
        samples, lead = lead_curve(first, other)
        ax.plot(samples, lead, color=colours(result)[run.label], marker="o", markersize=4.5, label=f"over {run.label}")
    ax.legend(title=f"lead of {result.runs[0].label}", alignment="left", loc="best")
    ax.margins(y=0.15)
    dress_x(ax, "samples", since="the stage began")
    ax.set_ylabel("loss below the other's")


def lead_curve(first: Stage, other: Stage) -> tuple[Array, Array]:
    """(samples since the stage began, loss of ``other`` - loss of ``first``) at every record of either that both
    curves cover, interpolated."""
    since = [s.validation.counts["samples"] - s.start["samples"] for s in (first, other)]
    low, high = max(x[0] for x in since), min(x[-1] for x in since)
    samples = np.unique(np.concatenate(since))
    samples = samples[(samples >= low) & (samples <= high)]
    lead = np.interp(samples, since[1], other.validation.loss) - np.interp(samples, since[0], first.validation.loss)
    return samples, lead


def _from(curve: Curve, samples: float) -> Curve:
    """The records at ``samples`` or later."""
    late = curve.counts["samples"] >= samples
    return Curve({axis: x[late] for axis, x in curve.counts.items()}, curve.loss[late])


def _grid(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(16, height * rows + 0.5), dpi=DPI, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1, hspace=0.06)  # type: ignore[union-attr, call-arg]
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _run_legend(figure: Figure, result: Result) -> None:
    handles = [Line2D([], [], color=colour, linewidth=3) for colour in colours(result).values()]
    figure.legend(handles, list(colours(result)), loc="outside upper right", ncols=4)
