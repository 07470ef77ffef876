"""All that was measured on some runs, as one object: what the tables, the plots and the page are made of.

Shapes: N videos, the same prompts and seeds in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import track

from lingen.errors import UserError, nearest
from lingen.evaluation import metrics
from lingen.evaluation.folder import SampledRun
from lingen.evaluation.statistics import Floats, Interval, Summary, mean_interval, ratio_interval, summarize


@dataclass(frozen=True)
class Metric:
    """What is measured of a video; ``scale`` turns its unit into that of ``title``."""

    title: str
    short: str  # of a column
    higher_is_better: bool
    digits: int
    scale: float = 1.0
    against: str = ""  # "baseline" or "reference": whose video it is measured against
    cost: bool = False
    yes_or_no: bool = False  # 1 or 0 of each video


METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR (dB)", "PSNR", True, 2, against="baseline"),
    "ssim": Metric("SSIM", "SSIM", True, 3, against="baseline"),
    "lpips": Metric("LPIPS", "LPIPS", False, 3, against="baseline"),
    "psnr_reference": Metric("PSNR (dB)", "PSNR ref.", True, 2, against="reference"),
    "ssim_reference": Metric("SSIM", "SSIM ref.", True, 3, against="reference"),
    "lpips_reference": Metric("LPIPS", "LPIPS ref.", False, 3, against="reference"),
    "colour": Metric("Colour as asked (%)", "colour", True, 1, 100, yes_or_no=True),
    "shape": Metric("Shape as asked (%)", "shape", True, 1, 100, yes_or_no=True),
    "motion": Metric("Motion as asked (%)", "motion", True, 1, 100, yes_or_no=True),
    "attributes": Metric("All as asked (%)", "all asked", True, 1, 100, yes_or_no=True),
    "steadiness": Metric("Temporal flickering, VBench (%)", "flickering", True, 2, 100),
    "flops": Metric("Executed FLOPs", "FLOPs", False, 0, cost=True),
    "denoise_seconds": Metric("Denoising (s)", "denoising, s", False, 3, cost=True),
    "seconds": Metric("End to end (s)", "end to end, s", False, 3, cost=True),
    "peak_memory": Metric("Peak memory (GB)", "memory, GB", False, 2, 1e-9, cost=True),
}
FEW = 20  # videos, below which an interval is a guess


def metric(key: str) -> Metric:
    """The metric called ``key``; VBench's dimensions are "vbench.NAME"."""
    if key.startswith("vbench."):
        name = key.removeprefix("vbench.").replace("_", " ")
        return Metric(f"VBench {name} (%)", name, True, 2, 100)
    return METRICS[key]


@dataclass(frozen=True)
class Measured:
    """One run; every mapping goes by metric. A value is NaN where a video has none (a caption without a motion)."""

    run: SampledRun
    values: dict[str, Floats]  # (N,)
    summaries: dict[str, Summary]
    gains: dict[str, Interval]  # mean difference to the baseline, video by video; of all that is no cost
    savings: dict[str, Interval]  # the baseline's total over this run's; of costs


@dataclass(frozen=True)
class Result:
    """The comparison; ``warnings`` say what makes a difference doubtful."""

    baseline: str
    reference: str | None
    runs: list[Measured]
    warnings: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """The metrics that some run has, in order."""
        found = dict.fromkeys(key for run in self.runs for key in run.summaries)
        return [*(key for key in METRICS if key in found), *(key for key in found if key not in METRICS)]


def measure(
    runs: Sequence[SampledRun],
    *,
    baseline: str,
    reference: str | None = None,
    lpips: metrics.Lpips | None = None,
    vbench: Mapping[str, Mapping[str, Floats]] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Result:
    """Measure every video, against the same video of ``baseline`` and of ``reference`` (names of runs).

    ``vbench`` has (N,) values of each dimension by run.

    Raises:
        UserError: there are no such runs; a video is missing or damaged; frames are too small for SSIM.
    """
    for key, name in (("baseline", baseline), ("reference", reference)):
        if name is not None and name not in [run.name for run in runs]:
            raise UserError(f"{key}={name} is none of the runs{nearest(name, [run.name for run in runs])}")
    first = runs[0].file
    if min(first.height, first.width) < metrics.WINDOW:
        raise UserError(
            f"runs: videos of {first.width}x{first.height} are too small for SSIM ({metrics.WINDOW} a side)"
        )
    values: dict[str, dict[str, Floats]] = {run.name: _costs(run) for run in runs}
    count = len(first.videos)
    for n in track(range(count), "measuring", disable=not progress):
        others = {run.name: run.pixels(n).to(device) for run in runs if run.name in (baseline, reference)}
        for run in runs:  # one at a time: a long video has a gigabyte
            video = others[run.name] if run.name in others else run.pixels(n).to(device)
            found = _alone(video, first.videos[n].prompt)
            for key, other in (("", baseline), ("_reference", reference)):
                if other is not None and other != run.name:
                    found |= {k + key: v for k, v in _against(video, others[other], lpips).items()}
            for key, value in found.items():
                values[run.name].setdefault(key, np.full(count, np.nan))[n] = value
    for name, dimensions in (vbench or {}).items():
        values[name] |= {f"vbench.{dimension}": np.asarray(found) for dimension, found in dimensions.items()}
    groups = [asked.prompt for asked in first.videos]
    measured = [_measured(run, values[run.name], values[baseline], groups) for run in runs]
    return Result(baseline, reference, measured, warnings(runs))


def _alone(video: torch.Tensor, prompt: str) -> dict[str, float]:
    still = video.shape[1] < 2
    return metrics.attributes(video, prompt) | ({} if still else {"steadiness": metrics.steadiness(video)})


def _against(video: torch.Tensor, other: torch.Tensor, lpips: metrics.Lpips | None) -> dict[str, float]:
    found = {"psnr": metrics.psnr(video, other), "ssim": metrics.ssim(video, other)}
    return found | ({"lpips": lpips(video, other)} if lpips is not None else {})


def _costs(run: SampledRun) -> dict[str, Floats]:
    """The costs that the run's records hold, (N,) each."""
    records = [record.model_dump() for record in run.records]
    keys = [key for key, known in METRICS.items() if known.cost]
    return {
        key: np.array([record[key] for record in records], np.float64)
        for key in keys
        if all(record[key] is not None for record in records)
    }


def _measured(run: SampledRun, values: dict[str, Floats], base: dict[str, Floats], groups: list[str]) -> Measured:
    summaries, gains, savings = {}, {}, {}
    is_base = values is base
    for key, found in values.items():
        known = ~np.isnan(found)
        named = [group for group, here in zip(groups, known, strict=True) if here]
        what = metric(key)
        summaries[key] = summarize(
            found[known], named, higher_is_better=what.higher_is_better, yes_or_no=what.yes_or_no
        )
        if is_base or key not in base:
            continue
        if not what.cost:
            both = known & ~np.isnan(base[key])  # VBench may have a value of one run's video alone
            if both.any():
                named = [group for group, here in zip(groups, both, strict=True) if here]
                gains[key] = mean_interval(found[both] - base[key][both], named)
        elif found.sum() > 0:
            savings[key] = ratio_interval(base[key], found, groups)
    return Measured(run, values, summaries, gains, savings)


def warnings(runs: Sequence[SampledRun]) -> list[str]:
    """What makes differences of these runs doubtful."""
    said = []
    machines = {run.name: run.file.machine for run in runs}
    if len(set(machines.values())) > 1:
        where = "; ".join(f"{name} on {machine}" for name, machine in machines.items())
        said.append(f"Latencies and memory are of different machines and do not compare: {where}.")
    batches = {run.name: sorted({record.batch for record in run.records}) for run in runs}
    if len({tuple(sizes) for sizes in batches.values()}) > 1:
        sizes = "; ".join(f"{name} {', '.join(map(str, each))}" for name, each in batches.items())
        said.append(f"Latencies and memory are of different batch sizes and do not compare: {sizes}.")
    weights = {str(run.file.settings.get("weights")) for run in runs}
    if len(weights) > 1:
        said.append("The runs are of different weights.")
    prompts = len({asked.prompt for asked in runs[0].file.videos})
    if prompts < FEW:
        said.append(f"{prompts} different prompts: too few for the intervals to mean much.")
    return said


def as_json(result: Result) -> dict[str, Any]:
    """The tree of evaluate.json: SI units, shares in [0, 1]; null: not to be had."""
    return {
        "baseline": result.baseline,
        "reference": result.reference,
        "warnings": result.warnings,
        "videos": [asked.model_dump() for asked in result.runs[0].run.file.videos],
        "runs": {
            one.run.name: {
                "path": str(one.run.path),
                "settings": one.run.file.settings,
                "machine": one.run.file.machine,
                "summary": {key: asdict(summary) for key, summary in one.summaries.items()},
                "gain_over_baseline": {key: asdict(gain) for key, gain in one.gains.items()},
                "baseline_over_this": {key: asdict(saving) for key, saving in one.savings.items()},
                "values": {key: [None if np.isnan(v) else float(v) for v in one.values[key]] for key in one.values},
            }
            for one in result.runs
        },
    }
