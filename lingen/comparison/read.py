"""Run folders -> stages with their curves.

A run folder holds metrics.jsonl (one JSON object a line: kind train, validation, transfer, refused or rollback) and
config.yaml. What was recorded is taken as it is: a run in progress has fewer stages, a run without validation has empty
validation curves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict

from lingen.comparison.curves import AXES, Curve
from lingen.compose import validate
from lingen.errors import UserError
from lingen.metrics import Record, read_metrics

MEASURED = ("train", "validation")  # the kinds of records that have a loss
MODEL_NAMES = {"lingen": "LinGen", "dit": "DiT"}


class Part(BaseModel):
    """Of config.yaml, what a comparison reads; the rest may come from another version of the schema."""

    model_config = ConfigDict(strict=True)


class ModelPart(Part):
    """Which model it is."""

    name: str


class BucketPart(Part):
    """A shape that was trained on and validated."""

    frames: int
    height: int
    width: int
    batch_size: int
    share: float = 1.0


class StagePart(Part):
    """What was planned of a stage."""

    name: str
    samples: int
    buckets: list[BucketPart]


class ConfigPart(Part):
    """The root."""

    model: ModelPart
    stages: dict[str, StagePart]


@dataclass(frozen=True)
class Stage:
    """What one run recorded in one stage."""

    name: str
    start: dict[str, float]  # axis -> count at the transfer into the stage
    train: Curve
    validation: Curve
    buckets: dict[str, Curve]  # validation loss of each bucket that every validation measured, e.g. "17x64x64"
    partial_buckets: list[str]  # those that some validation did not measure
    bins: list[Curve]  # validation loss of each timestep bin, low sigma to high
    valid: dict[str, list[int]]  # bucket -> how many held-out samples could be used; several where that changed
    complete: bool  # the stage came to its end
    source: str | None  # the stage it was transferred from, if any
    fingerprints: dict[str, str]  # of the data and the encoders, where the transfer record has them

    @property
    def end(self) -> dict[str, float]:
        """Counts at the last record of the stage, or at its start where there is none."""
        last = [c.at(-1) for c in (self.train, self.validation) if len(c)]
        return max(last, key=lambda counts: counts["samples"], default=self.start)


@dataclass(frozen=True)
class Run:
    """One run folder."""

    label: str
    path: Path
    config: dict[str, Any] | None  # config.yaml as it stands; None where there is none
    stages: list[Stage]  # in order
    dropped: int  # records whose loss was not a finite number
    refused: int  # steps whose samples it saw and did not learn from
    skipped: int  # samples that it passed over, going back to a checkpoint

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, or None where the run has not come to it."""
        return next((s for s in self.stages if s.name == name), None)

    @property
    def planned(self) -> dict[str, dict[str, Any]]:
        """The stages of config.yaml by name, in order; empty where there is no config.yaml."""
        return planned_stages(self.config)

    @property
    def in_progress(self) -> bool:
        """Whether a stage that was planned or begun has not ended."""
        done = {s.name for s in self.stages if s.complete}
        return not done.issuperset([*self.planned, *(s.name for s in self.stages)])


def planned_stages(config: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Stage name -> its section of config.yaml."""
    return {section["name"]: section for section in config["stages"].values()} if config else {}


def load_runs(folders: Sequence[str], labels: Sequence[str] | None) -> list[Run]:
    """Read each folder; without ``labels`` a run is called after its model, or after its folder where models repeat.

    Raises:
        UserError: a folder or its metrics.jsonl is missing, unreadable or without train records; labels do not fit.
    """
    if not folders:
        raise UserError("runs is empty; give runs=[DIR,DIR]")
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"runs=[{','.join(folders)}] names a folder twice")
    if labels is not None and (len(labels) != len(paths) or len(set(labels)) < len(labels)):
        raise UserError(f"labels=[{','.join(labels)}] must be {len(paths)} different names, one for each of runs")
    configs = [_read_config(path) for path in paths]
    names = labels or _default_labels(paths, configs)
    return [_load(path, config, name) for path, config, name in zip(paths, configs, names, strict=True)]


def _load(path: Path, config: dict[str, Any] | None, label: str) -> Run:
    records = _read_records(path)
    if not any(r["kind"] == "train" for r in records):
        raise UserError(f"runs: {path / 'metrics.jsonl'} has no train records yet")
    names = list(dict.fromkeys(r["stage"] for r in records))
    stages: list[Stage] = []
    start = dict.fromkeys(AXES, 0.0)
    for name in names:
        mine = [r for r in records if r["stage"] == name]
        start = _start(mine, start)
        ended = name != names[-1] or _reached_its_samples(name, mine, start, config)
        stages.append(_stage(name, mine, start, ended=ended))
        start = stages[-1].end
    skipped = {r["stage"]: r["skipped"] for r in records if r["kind"] == "rollback"}  # the last one counts all
    return Run(
        label,
        path,
        config,
        stages,
        dropped=sum(not _is_measured(r) for r in records),
        refused=sum(r["kind"] == "refused" for r in records),
        skipped=sum(skipped.values()),
    )


def _stage(name: str, records: list[Record], start: dict[str, float], *, ended: bool) -> Stage:
    ended = ended or any(r.get("at") == "end" for r in records if r["kind"] == "validation")
    records = [r for r in records if _is_measured(r)]
    train = [r for r in records if r["kind"] == "train"]
    transfer = next((r for r in reversed(records) if r["kind"] == "transfer"), {})
    held_out = [r for r in records if r["kind"] == "validation"]
    by_bucket = [{b: x for b, x in r.get("bucket_loss", {}).items() if _is_finite(x)} for r in held_out]
    names = list(dict.fromkeys(b for r in held_out for b in r.get("bucket_loss", {})))
    buckets = [b for b in names if all(b in losses for losses in by_bucket)]
    bins = min((len(r.get("bin_loss", [])) for r in held_out), default=0)
    return Stage(
        name=name,
        start=start,
        train=_curve(train, [r["loss"] for r in train]),
        validation=_curve(held_out, [r["loss"] for r in held_out]),
        buckets={b: _curve(held_out, [losses[b] for losses in by_bucket]) for b in buckets},
        partial_buckets=[b for b in names if b not in buckets],
        bins=[_curve(held_out, [r["bin_loss"][i] for r in held_out]) for i in range(bins)],
        valid=_valid(held_out),
        complete=ended,
        source=transfer.get("from"),
        fingerprints={key: str(value) for key, value in transfer.items() if key.endswith("_fingerprint")},
    )


def _valid(validations: list[Record]) -> dict[str, list[int]]:
    """Bucket -> the different numbers of valid held-out samples, ascending; without buckets that have none recorded."""
    found: dict[str, set[int]] = {}
    for record in validations:
        for bucket, count in record.get("valid", {}).items():
            found.setdefault(bucket, set()).add(count)
    return {bucket: sorted(counts) for bucket, counts in found.items()}


def _start(records: list[Record], end_before: dict[str, float]) -> dict[str, float]:
    """A stage starts where its transfer record says, else where the stage before it ended."""
    transfers = [r for r in records if r["kind"] == "transfer"]
    return {axis: transfers[-1][axis] for axis in AXES} if transfers else end_before


def _curve(records: list[Record], losses: list[float]) -> Curve:
    counts = {axis: np.array([r[axis] for r in records], dtype=np.float64) for axis in AXES}
    return Curve(counts, np.array(losses, dtype=np.float64))


def _reached_its_samples(
    name: str, records: list[Record], start: dict[str, float], config: dict[str, Any] | None
) -> bool:
    """Whether config.yaml's number of samples of the stage was seen (a run without validation has no "end" record)."""
    planned = planned_stages(config).get(name)
    seen = [r["samples"] for r in records if r["kind"] == "train"]
    return bool(planned and seen and seen[-1] - start["samples"] >= planned["samples"])


def _read_records(path: Path) -> list[Record]:
    """The records of the kinds known here, their axes as numbers."""
    if not path.is_dir():
        raise UserError(f"runs: {path} is not a folder; give run folders such as runs/NAME")
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"runs: {path} has no metrics.jsonl, so it is not a run folder")
    records = []
    for number, record in enumerate(read_metrics(file), 1):
        if record["kind"] not in (*MEASURED, "transfer", "refused", "rollback"):
            continue
        odd = _odd_keys(record)
        if odd:
            raise UserError(
                f"runs: {file}, record {number} has no usable {', '.join(odd)}; is it a metrics.jsonl of train.py?"
            )
        records.append(record)
    return records


def _odd_keys(record: Record) -> list[str]:
    """The keys that are missing, or hold what train.py never writes."""
    axes = {axis: _is_finite(record.get(axis)) for axis in AXES}
    good = {"stage": isinstance(record.get("stage"), str), **axes}
    if record["kind"] in MEASURED:
        good["loss"] = _is_loss(record.get("loss", ""))
        buckets, bins = record.get("bucket_loss", {}), record.get("bin_loss", [])
        good["bucket_loss"] = isinstance(buckets, dict) and all(map(_is_loss, buckets.values()))
        good["bin_loss"] = isinstance(bins, list) and all(map(_is_loss, bins))
    if record["kind"] == "validation":
        valid = record.get("valid", {})
        good["valid"] = isinstance(valid, dict) and all(isinstance(count, int) for count in valid.values())
    if record["kind"] == "rollback":
        good["skipped"] = isinstance(record.get("skipped"), int)
    return [key for key, is_good in good.items() if not is_good]


def _is_loss(value: Any) -> bool:
    """A number, or None in the place of one that is not finite: JSON has none of those."""
    return value is None or isinstance(value, (int, float))


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_measured(record: Record) -> bool:
    """Whether the losses are finite. A bucket may be without one of its own: it is then left out of the buckets."""
    return record["kind"] not in MEASURED or all(map(_is_finite, (record["loss"], *record.get("bin_loss", []))))


def _read_config(path: Path) -> dict[str, Any] | None:
    file = path / "config.yaml"
    if not file.is_file():
        return None
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}  # None: an empty file
        validate(ConfigPart, tree)
    except OSError as error:
        raise UserError(f"runs: {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or what looks like a date and is none
        raise UserError(f"runs: {file} is not YAML ({error})") from error
    except UserError as error:
        raise UserError(f"runs: {file}: {error}") from error
    return cast("dict[str, Any]", tree)


def _default_labels(paths: list[Path], configs: list[dict[str, Any] | None]) -> list[str]:
    models = [config["model"]["name"] for config in configs if config]
    for names in ([MODEL_NAMES.get(m, m) for m in models], [p.resolve().name for p in paths]):
        if len(set(names)) == len(paths):
            return names
    return [str(p) for p in paths]
