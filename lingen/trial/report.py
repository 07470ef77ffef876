"""The trial's report: what came out, in tables and in sentences that are computed, beside what was published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lingen.comparison.tables import Table
from lingen.evaluation.result import Measured
from lingen.evaluation.statistics import Interval
from lingen.evaluation.tables import as_markdown, number
from lingen.trial.motion import rank_correlation
from lingen.trial.run import CHECKS, Trial, schedules_of
from lingen.trial.statistics import Draws, between, line, over
from lingen.trial.variants import (
    ADACACHE,
    COMMON,
    FEWER,
    FIXED,
    MOREG,
    MOREG_SCALED,
    REFERENCE,
    SHUFFLED,
    UNCACHED,
)

TARGET = 2.2  # times fewer FLOPs, that caches of AdaCache's kind are to reach on the DiT
KIND = (ADACACHE, MOREG, MOREG_SCALED, "AdaCache, taylor", "AdaCache, reference mode")
JUDGED = ("psnr", "psnr_reference", "attributes")
# Kahatapitiya et al., arXiv 2411.02397, table 1: Open-Sora 1.2, 480p, 2 s, 30 steps, one A100, 900 videos of VBench.
PUBLISHED = [
    ["no cache", "79.22", "-", "-", "1", "1"],
    ["Delta-DiT", "78.21", "11.91", ".481", "1.02", "-"],
    ["T-GATE", "77.61", "15.50", ".676", "1.15", "1.10"],
    ["PAB-fast", "76.95", "23.58", ".822", "1.26", "1.34"],
    ["PAB-slow", "78.51", "27.04", ".885", "1.22", "1.20"],
    ["AdaCache-fast", "79.39", "24.92", ".838", "2.42", "2.24"],
    ["AdaCache-fast + MoReg", "79.48", "25.78", ".853", "2.33", "2.10"],
    ["AdaCache-slow", "79.66", "29.97", ".909", "1.47", "1.46"],
]  # FLOPs: 3230 over each row's TFLOPs


def text(interval: Interval, digits: int, *, scale: float = 1.0, sign: bool = False, unit: str = "") -> str:
    """+0.31 dB (+0.10 to +0.52)"""
    if math.isnan(interval.value):
        return "-"

    def shown(value: float) -> str:
        return f"{value * scale:{'+' if sign else ''}.{digits}f}"

    ends = interval.low is not None and interval.high is not None
    between_ = f" ({shown(interval.low or 0.0)} to {shown(interval.high or 0.0)})" if ends else ""
    return f"{shown(interval.value)}{unit}{between_}"


def verdict(interval: Interval) -> str:
    """Of a difference."""
    if math.isnan(interval.value) or interval.low is None or interval.high is None:
        return "unknown"
    if interval.low == interval.high == 0:
        return "equal"
    return "better" if interval.low > 0 else "worse" if interval.high < 0 else "undecided"


def judged(found: Sequence[Interval]) -> str:
    """Differences in what is ``JUDGED``, in words."""
    said = [f"{text(one, 2, sign=True, unit=' dB')}, {verdict(one)}" for one in found[:2]]
    points = text(found[2], 1, scale=100, sign=True, unit=" points")
    return f"PSNR {said[0]}; PSNR to {REFERENCE} {said[1]}; attributes {points}, {verdict(found[2])}."


@dataclass(frozen=True)
class Reading:
    """A trial, and what is read from it."""

    trial: Trial

    @cached_property
    def runs(self) -> dict[str, Measured]:
        """By name."""
        return {one.run.name: one for one in self.trial.result.runs}

    @cached_property
    def base(self) -> Measured:
        """The uncached one."""
        return self.runs[UNCACHED]

    @cached_property
    def draws(self) -> Draws:
        """The same for all differences."""
        return Draws.of(self.prompts)

    @property
    def prompts(self) -> list[str]:
        """Of each video."""
        return [video.prompt for video in self.base.run.file.videos]

    @cached_property
    def curves(self) -> dict[str, list[Measured]]:
        """From cheap to dear; without the uncached one and the reference."""
        found: dict[str, list[Measured]] = {}
        for one in self.trial.result.runs:
            if one.run.name not in (UNCACHED, REFERENCE):
                found.setdefault(one.run.file.curve, []).append(one)
        return {name: sorted(runs, key=self.share) for name, runs in found.items()}

    def share(self, one: Measured) -> float:
        """Of the uncached FLOPs."""
        return one.summaries["flops"].mean.value / self.base.summaries["flops"].mean.value

    def saving(self, curve: str) -> Interval:
        """Times fewer FLOPs at the threshold of PSNR; no number where the curve stays below it."""
        found = line(self.curves[curve], self.base, "psnr", self.draws).cheapest(self.trial.words.threshold_db)
        return self.draws.interval(float(1 / found[0]), 1 / found[1:])

    def saving_text(self, curve: str) -> str:
        """For a table: where the cheapest run is good enough, still cheaper ones might be."""
        saving, cheapest = self.saving(curve), self.curves[curve][0]
        enough = cheapest.summaries["psnr"].mean.value >= self.trial.words.threshold_db
        return ("at least " if enough else "") + text(saving, 2)

    def best(self, curve: str) -> Measured | None:
        """The cheapest run of a curve that was measured at the threshold or above."""
        wanted = self.trial.words.threshold_db
        return next((one for one in self.curves[curve] if one.summaries["psnr"].mean.value >= wanted), None)

    def better(self, one: Measured, curve: str, key: str) -> Interval:
        """How much better a run is than a curve, at the run's own FLOPs."""
        return over(one, self.curves.get(curve, []), self.base, key, self.draws)


def gate_table(trial: Trial) -> Table:
    """Whether the model is trained."""
    gate = trial.gate
    rows = [[key, text(gate.found[key], 1, scale=100), f"{100 * gate.chance[key]:.1f}"] for key in CHECKS]
    return Table(f"Uncached videos as asked, % of {gate.videos}", ["", "as asked", "by chance"], rows)


def overview(read: Reading) -> Table:
    """A row a run."""
    trial, rows = read.trial, []
    for one in read.trial.result.runs:
        cells = [number(key, one.summaries[key].mean.value) if key in one.summaries else "-" for key in (
            "psnr", "ssim", "psnr_reference", "ssim_reference", "colour", "shape", "motion", "attributes",
        )]  # fmt: skip
        flops, wall = one.savings.get("flops"), one.savings.get("denoise_seconds")
        fast = "-" if wall is None or one.run.name in trial.apart else f"{wall.value:.2f}"
        rows.append([one.run.name, f"{flops.value:.2f}" if flops else "1", fast if flops else "1", *cells])
    headers = ["", "FLOPs, x fewer", "time, x less", "PSNR", "SSIM", "PSNR ref.", "SSIM ref.", "colour", "shape",
               "motion", "all"]  # fmt: skip
    return Table(f"PSNR and SSIM to {UNCACHED}; ref.: to {REFERENCE}; attributes: % as asked", headers, rows)


def savings(read: Reading) -> Table:
    """At the threshold of PSNR, what each curve saves."""
    rows = []
    for curve in read.curves:
        best = read.best(curve)
        measured = "never" if best is None else (
            f"{1 / read.share(best):.2f} at {best.summaries['psnr'].mean.value:.2f} dB ({best.run.name})"
        )  # fmt: skip
        rows.append([curve, measured, read.saving_text(curve)])
    title = f"Times fewer FLOPs at {read.trial.words.threshold_db:g} dB or more to {UNCACHED}"
    return Table(title, ["", "best run", "along the curve"], rows)


def equal_cost(read: Reading, against: str) -> Table:
    """Each run against a control at the run's own FLOPs."""
    rows = []
    for curve, runs in read.curves.items():
        for one in runs if curve != against else ():
            found = [read.better(one, against, key) for key in JUDGED]
            if not all(math.isnan(each.value) for each in found):
                cells = [
                    text(each, d, scale=s, sign=True) for each, d, s in zip(found, (2, 2, 1), (1, 1, 100), strict=True)
                ]
                rows.append([one.run.name, f"{read.share(one):.0%}", *cells])
    headers = ["", "FLOPs", "PSNR, dB", "PSNR ref., dB", "all as asked, points"]
    return Table(f"Better than {against} at equal FLOPs by", headers, rows)


def sentences(read: Reading) -> list[str]:
    """The conclusions."""
    return [*_target(read), *_controls(read), *_adaptivity(read), *_moreg(read), *_motion(read), *_wall(read)]


def _target(read: Reading) -> list[str]:
    wanted, said = read.trial.words.threshold_db, []
    known = {curve: read.saving(curve) for curve in read.curves}
    known = {curve: saving for curve, saving in known.items() if not math.isnan(saving.value)}
    if not known:
        return [f"No curve comes to {wanted:g} dB against the uncached videos."]
    best = max(known, key=lambda curve: known[curve].value)
    said.append(
        f"At {wanted:g} dB against the uncached videos **{best}** saves most: {read.saving_text(best)} times fewer "
        "FLOPs."
    )
    kind = {curve: known[curve] for curve in KIND if curve in known}
    if kind:
        first = max(kind, key=lambda curve: kind[curve].value)
        reached = "reached" if kind[first].value >= TARGET else "not reached"
        said.append(f"Of AdaCache's kind **{first}** saves most: {read.saving_text(first)}. {TARGET}x is {reached}.")
    else:
        said.append(f"Nothing of AdaCache's kind comes to {wanted:g} dB; {TARGET}x is not reached.")
    for control in (FEWER, FIXED):
        there = f"{read.saving_text(control)} times" if control in known else "nothing"
        said.append(f"At the same PSNR the control **{control}** saves {there}.")
    return said


def _controls(read: Reading) -> list[str]:
    said = []
    for against in (FEWER, FIXED):
        for key, what in (("psnr_reference", f"PSNR to {REFERENCE}"), ("attributes", "attributes")):
            counts = {"better": 0, "worse": 0, "undecided": 0, "equal": 0}
            for curve, runs in read.curves.items():
                for one in runs if curve not in (FEWER, FIXED, SHUFFLED, COMMON) else ():
                    result = verdict(read.better(one, against, key))
                    if result in counts:
                        counts[result] += 1
            shown = ", ".join(f"{count} {name}" for name, count in counts.items())
            said.append(f"Caches against **{against}** at equal FLOPs, by {what}: {shown}.")
    return said


def _adaptivity(read: Reading) -> list[str]:
    said = []
    for one in read.curves.get(ADACACHE, []):
        schedules = schedules_of(one.run.path)
        computed = sorted(schedule.count("1") for schedule in schedules)
        said.append(
            f"{one.run.name}: {len(set(schedules))} different schedules over {len(schedules)} videos, {computed[0]} to "
            f"{computed[-1]} computed calls."
        )
        suffix = one.run.name.removeprefix("adacache")
        for name, whose in (
            (f"shuffled{suffix}", "others' schedules"),
            (f"commonest{suffix}", "the commonest schedule"),
        ):
            if name in read.runs:
                found = [between(one, read.runs[name], key, read.draws) for key in JUDGED]
                share = read.share(read.runs[name]) / read.share(one)
                said.append(f"{one.run.name} against {whose} (at {share:.1%} of its FLOPs): {judged(found)}")
    return said


def _moreg(read: Reading) -> list[str]:
    said = []
    for curve in (MOREG, MOREG_SCALED):
        for one in read.curves.get(curve, []):
            found = [read.better(one, ADACACHE, key) for key in JUDGED]
            said.append(f"{one.run.name} against AdaCache at equal FLOPs ({read.share(one):.0%}): {judged(found)}")
    return said


def _motion(read: Reading) -> list[str]:
    trial = read.trial
    scores = trial.scores.in_window(trial.words.steps)
    kinds = (
        ("the speed of the shape's middle", trial.truth.speed),
        ("whether the caption asks it to go somewhere", trial.truth.asked),
        ("the mean change between frames", trial.truth.change),
    )
    shown = "; ".join(
        f"{what} {text(rank_correlation(scores, truth, read.prompts), 2, sign=True)}" for what, truth in kinds
    )
    return [
        f"MoReg's motion score, the mean over the published window, is {scores.mean():.3f} on average (its published "
        f"scale: 0.385). Its rank correlation over videos with {shown}."
    ]


def _wall(read: Reading) -> list[str]:
    kept = [
        (one.savings["denoise_seconds"].value / one.savings["flops"].value, one.run.name)
        for curve, runs in read.curves.items()
        for one in runs
        if one.run.name not in read.trial.apart and curve != FEWER and "denoise_seconds" in one.savings
    ]
    if not kept:
        return []
    least, most = min(kept), max(kept)
    middle = sorted(kept)[len(kept) // 2]
    return [
        f"Of the speed-up in FLOPs caches keep in wall-clock time: {middle[0]:.0%} in the middle, {least[0]:.0%} at "
        f"least ({least[1]}), {most[0]:.0%} at most ({most[1]}), in batches of {read.trial.words.batch} on "
        f"{read.base.run.file.machine}."
    ]


def published_table() -> Table:
    """What is to be compared with."""
    headers = ["", "VBench", "PSNR", "SSIM", "FLOPs, x fewer", "time, x less"]
    return Table("Published: Open-Sora 1.2, 480p, 2 s, 30 steps, one A100, 900 videos of VBench", headers, PUBLISHED)


def markdown(readings: Sequence[Reading], pictures: str) -> str:
    """The report; ``pictures`` is the folder of the figures, as seen from it."""
    words = readings[0].trial.words
    frames = readings[0].base.run.file
    parts = [
        f"{words.seeds} seeds, each with a caption of its own, {frames.frames} frames of "
        f"{frames.height}x{frames.width}; {words.steps} Euler steps, the reference {words.reference_steps}; caches "
        f"fitted on {words.calibration_seeds} other seeds. In brackets: 95% intervals, bootstrapped over prompts, "
        "differences taken video by video. At equal FLOPs: against the control's curve, between its points on "
        "straight lines.\n"
    ]
    for read in readings:
        trial, settings = read.trial, read.base.run.file.settings
        parts += [f"### {trial.name}\n", f"Weights of {settings['weights']['samples']} samples.\n"]
        if trial.gate.failed:
            parts.append(f"**Not clearly above chance: {', '.join(trial.gate.failed)}.**\n")
        parts += [f"- {sentence}" for sentence in sentences(read)]
        parts += [f"- {name} could not be fitted: {why}" for name, why in trial.failed.items()]
        parts.append(f"\n![quality against FLOPs]({pictures}/{trial.name}.png)\n")
        parts += [as_markdown(table) for table in (gate_table(trial), savings(read), overview(read))]
        parts += [as_markdown(equal_cost(read, against)) for against in (FEWER, FIXED)]
        parts.append(f"![motion scores]({pictures}/{trial.name}_motion.png)\n")
    return "\n".join([*parts, as_markdown(published_table())])
