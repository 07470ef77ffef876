"""One model's trial: from a checkpoint to the measured runs. Whatever is there already is not made again.

MODEL/gate/uncached         the videos on which the attribute check is looked at
MODEL/caches/NAME.yaml      fitted caches; NAME.failed says why one could not be fitted
MODEL/runs/NAME             the sampled videos
MODEL/motion.json           MoReg's scores of them
MODEL/index.html, quality.png, evaluate.json    as scripts/evaluate.py writes them
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lingen.cache_config import cache_yaml, read_cache
from lingen.calibration import Ground, Told, fit
from lingen.errors import UserError
from lingen.evaluation import page, plot, tables
from lingen.evaluation.folder import Asked, read_run, read_runs
from lingen.evaluation.generate import sample_runs
from lingen.evaluation.metrics import attributes
from lingen.evaluation.result import Result, as_json, measure
from lingen.evaluation.settings import Variant, asked_for
from lingen.evaluation.statistics import Interval, mean_interval
from lingen.files import write_file
from lingen.output import make_folder, writing
from lingen.pipeline import LinGenPipeline
from lingen.runfolder import write_aside
from lingen.trial import variants
from lingen.trial.motion import Scores, Truth, motion_scores, true_motion
from lingen.trial.settings import CALIBRATION_SEED, GATE_SEED, TrialWords
from lingen.trial.variants import ADACACHE, UNCACHED, Wanted, Way

OTHERS = 4  # captions of other videos that each is held against, for chance
CHECKS = ("colour", "shape", "motion", "attributes")


@dataclass(frozen=True)
class Gate:
    """What the attribute check says of uncached videos: the share as asked, and that of the same videos held against
    the captions of the others, which is chance."""

    videos: int
    found: dict[str, Interval]
    chance: dict[str, float]
    seconds: float  # of denoising a video
    around: float  # of its text, decoding and writing

    @property
    def failed(self) -> list[str]:
        """The checks that are not clearly above chance: whose interval reaches down to it."""
        return [key for key in CHECKS if (self.found[key].low or 0.0) <= self.chance[key]]


@dataclass(frozen=True)
class Trial:
    """A model's trial, measured."""

    name: str
    words: TrialWords
    gate: Gate
    result: Result
    scores: Scores
    truth: Truth
    failed: dict[str, str]  # fitted caches that do not exist, and why
    apart: set[str]  # runs that were not sampled in turns with the uncached one: their times do not compare


class Workshop:
    """A model, and the folder that its trial is made in."""

    def __init__(self, name: str, checkpoint: str, words: TrialWords) -> None:
        """Raises:
        UserError: the checkpoint cannot be sampled from, or is of another model.
        """
        self.name, self.words, self.out = name, words, Path(words.out) / name
        self.pipeline = LinGenPipeline.from_pretrained(checkpoint, autoencoder=words.autoencoder)
        if self.pipeline.config.model.name != name:
            raise UserError(f"checkpoints.{name}={checkpoint} is a {self.pipeline.config.model.name}")
        self.shape = self.pipeline.shape(words.frames, words.height, words.width)
        self.asked = self.asked_of(words.seed, words.seeds)
        self.every = words.variants == "all"
        make_folder(self.out, words.out)

    def asked_of(self, first: int, count: int) -> list[Asked]:
        """A caption of the world for each seed."""
        return asked_for("synthetic", range(first, first + count), self.shape.frames, self.words.backgrounds)

    def ground(self, first: int, count: int) -> Ground:
        """Generations of ``count`` seeds."""
        asked, words = self.asked_of(first, count), self.words
        sampler = self.pipeline.sampler(steps=words.steps)
        prompts, seeds = [one.prompt for one in asked], [one.seed for one in asked]
        return Ground(self.pipeline, sampler, self.shape, prompts, seeds, words.batch)

    def gate(self) -> Gate:
        """Sample uncached videos of seeds of their own, and look at them."""
        words = self.words
        asked = self.asked_of(GATE_SEED, words.gate_seeds)
        uncached = [Variant(name=UNCACHED, steps=words.steps)]
        (folder,) = self._sample_runs(uncached, asked, self.out / "gate")
        run, captions = read_run(folder), [one.prompt for one in asked]
        found: dict[str, list[float]] = {key: [] for key in CHECKS}
        chance: dict[str, list[float]] = {key: [] for key in CHECKS}
        for number, caption in enumerate(captions):
            video = run.pixels(number)
            for key, value in attributes(video, caption).items():
                found[key].append(value)
            for other in range(1, min(OTHERS, len(asked) - 1) + 1):
                for key, value in attributes(video, captions[number - other]).items():
                    chance[key].append(value)
        denoising = [record.denoise_seconds for record in run.records]
        return Gate(
            len(asked),
            {key: mean_interval(np.array(values), captions) for key, values in found.items()},
            {key: float(np.mean(values)) for key, values in chance.items()},
            float(np.mean(denoising)),
            float(np.mean([record.seconds for record in run.records]) - np.mean(denoising)),
        )

    def plan(self) -> tuple[list[Way], list[Wanted]]:
        """What is sampled as it is, and what has to be fitted; the scale of scaled MoReg is filled in later."""
        words, share = self.words, self.ground(0, 1).cached_share
        ways = variants.given(words.steps, words.reference_steps, words.shares, share, every=self.every)
        return ways, variants.fitted(words.steps, words.shares, 1.0, every=self.every)

    def estimate(self, gate: Gate) -> dict[str, float]:
        """Seconds of each variant, and of the calibrations, by the speed at the gate."""
        words, (ways, wanted) = self.words, self.plan()
        whole = words.seeds * gate.seconds
        found = {way.variant.name: whole * way.share for way in ways}
        found |= {one.name: whole * (1 - one.skip) for one in wanted}
        copies = 4 if self.every else 2  # extrapolated, shuffled; commonest, reference mode
        found["AdaCache's controls"] = copies * whole * sum(1 - skip for skip in words.shares)
        trials = sum(1 + words.rounds / 2 * (1 - one.skip) for one in wanted)  # half of the trials, as a rule
        found["calibrations"] = trials * words.calibration_seeds * gate.seconds
        found["motion scores"] = whole
        found["decoding and measuring"] = (len(found) + copies * len(words.shares)) * words.seeds * gate.around * 2
        return found

    def fit_all(self, told: Told) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """The fitted caches, and why others could not be fitted."""
        folder, ground = self.out / "caches", self.ground(CALIBRATION_SEED, self.words.calibration_seeds)
        make_folder(folder, self.words.out)
        scale = self._scale(ground, told) if self.every else 1.0
        caches, failed = dict[str, dict[str, Any]](), dict[str, str]()
        for one in variants.fitted(self.words.steps, self.words.shares, scale, every=self.every):
            path, reason = folder / f"{one.name}.yaml", folder / f"{one.name}.failed"
            if not path.exists() and not reason.exists():
                self._fit(one, ground, path, reason, told)
            if reason.exists():
                failed[one.name] = reason.read_text().strip()
            else:
                caches[one.name] = read_cache(str(path)).model_dump(mode="json")
        return caches, failed

    def _fit(self, one: Wanted, ground: Ground, path: Path, reason: Path, told: Told) -> None:
        words, cache = self.words, read_cache(one.cache)
        try:
            found = fit(ground, cache, one.skip, path, tolerance=0.02, rounds=words.rounds, told=told)
        except UserError as error:
            write_aside(reason, f"{error}\n")
            return
        share = found.skipped.share
        comment = f"# Fitted to {self.name}: {one.skip:.1%} of the FLOPs wanted, {share:.1%} skipped on the seeds "
        comment += f"from {CALIBRATION_SEED} on, {words.calibration_seeds} of them.\n"
        write_aside(path, comment + cache_yaml(found.cache, path.parent))
        print(f"{one.name}: fitted, {share:.1%} skipped", flush=True)

    def _scale(self, ground: Ground, told: Told) -> float:
        path = self.out / "caches" / "motion_scale.json"
        if not path.exists():
            found = float(np.nanmedian(motion_scores(ground, told).in_window(self.words.steps)))
            write_aside(path, json.dumps(found))
        return float(json.loads(path.read_text()))

    def sample(self, ways: Sequence[Way]) -> tuple[list[str], set[str]]:
        """All variants, in turns; then those that need a batch of their own, and the controls, which are made of
        others' schedules. Returns the folders, and the names of those that did not take turns."""
        runs = self.out / "runs"
        make_folder(runs, self.words.out)
        together = [way.variant for way in ways if not way.alone]
        alone = [way.variant for way in ways if way.alone]
        print(f"sampling {len(together)} variants", flush=True)
        folders = self._sample_runs(together, self.asked, runs)
        made: list[Variant] = []
        for variant in together:
            if variant.curve == ADACACHE:
                schedules = schedules_of(str(runs / variant.name))
                made += variants.controls(variant.name, schedules, self.words.steps, every=self.every)
        print(f"sampling {len(made)} controls and {len(alone)} variants video by video", flush=True)
        folders += self._sample_runs(made, self.asked, runs)
        folders += self._sample_runs(alone, self.asked, runs, batch=1)
        return [str(folder) for folder in folders], {variant.name for variant in (*made, *alone)}

    def _sample_runs(
        self, ways: Sequence[Variant], asked: Sequence[Asked], out: Path, batch: int | None = None
    ) -> list[Path]:
        words, began = self.words, time.monotonic()

        def told(done: int, total: int) -> None:
            if 0 < done < total:
                left = (time.monotonic() - began) * (total - done) / done
                print(f"  {done} of {total} videos, {left / 3600:.2f} h left", flush=True)

        return sample_runs(
            self.pipeline, ways, asked, self.shape, out,
            batch=batch or words.batch, truncate=words.truncate, progress=False, told=told,
        )  # fmt: skip

    def scores(self, told: Told) -> Scores:
        """MoReg's of the videos that are compared."""
        path = self.out / "motion.json"
        if path.exists():
            tree = json.loads(path.read_text())
            if len(tree["values"]) == self.words.seeds:
                return Scores(tree["calls"], np.array(tree["values"]))
        found = motion_scores(self.ground(self.words.seed, self.words.seeds), told)
        write_aside(path, json.dumps(found.as_json()))
        return found


def schedules_of(folder: str | Path) -> list[str]:
    """Of each video of a run whose cache decides for the whole stack: "1" for each call that was computed."""
    found = []
    for record in read_run(folder).records:
        assert record.cache is not None
        (schedule,) = next(iter(record.cache["contexts"].values()))["schedules"]
        found.append("".join("1" if computed else "0" for computed in schedule))
    return found


def run_model(name: str, checkpoint: str, words: TrialWords) -> Trial | None:
    """The whole trial of one model; None where it is to be estimated only.

    Raises:
        UserError: the model is not trained enough, or something cannot be sampled or written.
    """
    shop = Workshop(name, checkpoint, words)
    gate = shop.gate()
    for key in CHECKS:
        found = gate.found[key]
        ends = f" ({found.low:.0%} to {found.high:.0%})" if found.low is not None and found.high is not None else ""
        print(f"{key} as asked: {found.value:.0%}{ends} of {gate.videos} videos; by chance {gate.chance[key]:.0%}")
    if gate.failed and words.need_trained:
        raise UserError(
            f"{name}: {', '.join(gate.failed)} not clearly above chance on {gate.videos} videos; train longer, or say "
            "need_trained=false"
        )
    seconds = shop.estimate(gate)
    print(f"estimate: {sum(seconds.values()) / 3600:.2f} h for {len(seconds)} parts at {gate.seconds:.2f} s a video:")
    print(", ".join(f"{part} {took / 60:.1f} min" for part, took in seconds.items()), flush=True)
    if words.dry_run:
        return None

    def told(what: str | None, videos: int) -> None:
        if what is not None:
            print(f"  {what}, {videos} videos", flush=True)

    caches, failed = shop.fit_all(told)
    ways = with_fitted(shop.plan()[0], caches, words, every=shop.every)
    folders, apart = shop.sample(ways)
    scores = shop.scores(told)
    result = measure(read_runs(folders), baseline=UNCACHED, reference=variants.REFERENCE, progress=False)
    truth = true_motion(result.runs[0].run)
    write_evaluation(shop.out, result, words)
    return Trial(name, words, gate, result, scores, truth, failed, apart)


def with_fitted(ways: Sequence[Way], caches: dict[str, dict[str, Any]], words: TrialWords, *, every: bool) -> list[Way]:
    """The given ways, the fitted ones, and what is derived from them."""
    found = list(ways)
    for one in variants.fitted(words.steps, words.shares, 1.0, every=every):
        if one.name in caches:
            cache = caches[one.name]
            variant = Variant(name=one.name, curve=one.curve, cache=cache, steps=words.steps)
            found.append(Way(variant, 1 - one.skip))
            if one.curve == ADACACHE:
                found += variants.derived(one.name, one.skip, cache, words.steps, every=every)
    return found


def write_evaluation(out: Path, result: Result, words: TrialWords) -> None:
    """What scripts/evaluate.py writes of runs."""
    figure = plot.quality_against_flops(result)
    said = [f"{key}={value}" for key, value in words.model_dump(exclude_defaults=True).items()]
    files = {
        "quality.png": figure,
        "index.html": page.render(result, figure, shown=words.shown, side=128, words=said),
        "evaluate.json": json.dumps(as_json(result), indent=1, allow_nan=False).encode() + b"\n",
        "evaluate.csv": tables.as_csv(result).encode(),
    }
    with writing(words.out):
        for name, content in files.items():
            write_file(out / name, content)
