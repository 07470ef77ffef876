"""Which figures a report has."""

from __future__ import annotations

from lingen.trial import plot
from lingen.trial.motion import rank_correlation
from lingen.trial.report import Reading


def figures(read: Reading) -> dict[str, bytes]:
    """File name -> PNG."""
    trial = read.trial
    columns = list(trial.scores.values.T)  # K of (N,)
    kinds = {"speed of the shape": trial.truth.speed, "change between frames": trial.truth.change}
    found = {name: [rank_correlation(each, truth, read.prompts) for each in columns] for name, truth in kinds.items()}
    name, count = trial.name, trial.words.seeds
    return {
        f"{name}.png": plot.curves_figure(f"{name}, {count} videos", read.curves, read.base, trial.words.threshold_db),
        f"{name}_motion.png": plot.motion_figure(f"{name}: MoReg's score against motion", trial.scores.calls, found),
    }
