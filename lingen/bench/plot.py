"""Cost against tokens, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingen.output import writing

COLOURS = {"lingen": "#0072b2", "dit": "#d55e00"}
NAMES = {"lingen": "LinGen", "dit": "DiT"}


def plot_costs(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds against tokens in logarithms, where a straight line of slope 1 is linear cost; bars from min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for model, compiled in dict.fromkeys((row["model"], row["compiled"]) for row in rows):
        line = sorted((r for r in rows if (r["model"], r["compiled"]) == (model, compiled)), key=lambda r: r["tokens"])
        tokens, middle = [r["tokens"] for r in line], [r["median_s"] for r in line]
        spread = [[r["median_s"] - r["min_s"] for r in line], [r["max_s"] - r["median_s"] for r in line]]
        label = f"{NAMES[model]}{', compiled' if compiled else ''}"
        style = "--" if compiled else "-"
        axes.errorbar(tokens, middle, spread, label=label, color=COLOURS[model], linestyle=style, marker="o", capsize=2)
    what = "training step" if rows[0]["mode"] == "train" else f"forward of {rows[0]['samples']} samples"
    axes.set(xscale="log", yscale="log", xlabel="tokens of a video", ylabel=f"seconds of a {what}")
    axes.set_title(f"{rows[0]['size']}, {rows[0]['dtype']}, {rows[0]['device']}")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    with writing(path, "plot"):
        figure.savefig(path, dpi=150)
    plt.close(figure)
