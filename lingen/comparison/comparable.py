"""Whether runs may be compared: what differs in their config.yaml and in what they were validated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lingen.comparison.read import Run, Stage, planned_stages

# With another value here two validation losses are not the same measurement.
MEASURE = ("data.path", "data.holdout_share", "validation", "autoencoder", "text")
MEASURE_OF_STAGE = ("buckets", "fps")
# ... but for these; where a text encoder lies is not what it is, and its fingerprint is compared.
NOT_THE_MEASURE = (
    "validation.every_steps",
    "validation.batch_size",
    "text.cache",
    "text.encoders.*.path",
    "text.encoders.*.dropout",
)
# Another value here is another recipe: the runs can be compared, but not only their models differ.
RECIPE = ("seed", "size", "flow", "optim", "ema", "init_from", "engine.dtype", "text.encoders.*.dropout")
RECIPE_OF_STAGE = (
    "samples",
    "batch_size",
    "lr",
    "warmup_samples",
    "lr_schedule",
    "final_lr_share",
    "timestep_shift",
    "carry",
)


def warnings(runs: list[Run]) -> list[str]:
    """What makes a difference between losses doubtful, each a sentence; empty where nothing was found."""
    found = [
        f"{run.label}: {run.dropped} records with a loss that is not a finite number were left out."
        for run in runs
        if run.dropped
    ]
    found += [
        f"{run.label} has no config.yaml, so its settings could not be checked." for run in runs if run.config is None
    ]
    found += [
        f"{run.label} left out {run.refused} steps and went past {run.skipped} samples (its guard, see metrics.jsonl): "
        "it learned from other samples than a run without."
        for run in runs
        if run.refused or run.skipped
    ]
    for other in runs[1:]:
        found += _against(runs[0], other)
    return found


def notes(runs: list[Run]) -> list[str]:
    """What else differs between the recipes, and which runs are still in progress."""
    found = []
    for run in runs:
        if run.in_progress:
            found.append(f"{run.label} is in progress: its last stage so far is {run.stages[-1].name}.")
        if run.stages[0].source is not None:
            found.append(
                f"{run.label} begins at {run.stages[0].name}, from {run.stages[0].source} of another run folder: "
                "the level before that transfer is not known here."
            )
        found += [
            f"{run.label} has no loss of bucket {bucket} in some validations of {stage.name}: it has no curve."
            for stage in run.stages
            for bucket in stage.partial_buckets
        ]
    first = runs[0]
    for other in runs[1:]:
        paths = [*RECIPE, *(f"stages.{name}.{key}" for name in _shared(first, other) for key in RECIPE_OF_STAGE)]
        found += [f"Recipes differ: {text}." for text in _differences(first, other, paths, ())]
    return found


def _against(first: Run, other: Run) -> Iterator[str]:
    pair = f"{first.label} and {other.label}"
    seen = [[s.name for s in run.stages] for run in (first, other)]
    shorter = min(map(len, seen))
    if not set(seen[0]) & set(seen[1]):
        yield f"{pair} have no stage in common ({', '.join(seen[0])} against {', '.join(seen[1])})."
    elif seen[0][:shorter] != seen[1][:shorter]:
        yield f"{pair} went through different stages: {', '.join(seen[0])} against {', '.join(seen[1])}."
    paths = [*MEASURE, *(f"stages.{name}.{key}" for name in _shared(first, other) for key in MEASURE_OF_STAGE)]
    for text in _differences(first, other, paths, NOT_THE_MEASURE):
        yield f"Validated differently: {text}."
    for stage in first.stages:
        twin = other.stage(stage.name)
        if twin is None:
            continue
        shared = stage.fingerprints.keys() & twin.fingerprints.keys()
        for key in sorted(k for k in shared if stage.fingerprints[k] != twin.fingerprints[k]):
            yield f"In stage {stage.name}, {pair} differ in {key}: their losses are not on the same footing."
        validated = len(stage.validation) and len(twin.validation)
        if validated and (set(stage.buckets) != set(twin.buckets) or len(stage.bins) != len(twin.bins)):
            yield f"In stage {stage.name}, {pair} recorded validation on different buckets or timestep bins."
        yield from _other_held_out_samples(first, stage, other, twin)


def _other_held_out_samples(first: Run, stage: Stage, other: Run, twin: Stage) -> Iterator[str]:
    """Where samples were broken for one run alone, its losses are means over fewer of them."""
    for bucket, counts in stage.valid.items():
        if counts != twin.valid.get(bucket, counts):
            here, there = (" or ".join(map(str, s.valid[bucket])) for s in (stage, twin))
            yield (
                f"In stage {stage.name}, bucket {bucket} was validated on {here} held-out samples by {first.label}, "
                f"on {there} by {other.label}: their losses are means over different samples."
            )


def _shared(first: Run, other: Run) -> list[str]:
    return [name for name in first.planned if name in other.planned]


def _differences(first: Run, other: Run, paths: Sequence[str], but: Sequence[str]) -> Iterator[str]:
    if first.config is None or other.config is None:
        return
    trees = [_flat(_comparable(run.config or {})) for run in (first, other)]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    for key in keys:
        if any(fnmatchcase(key, path) for path in but):
            continue
        if not any(fnmatchcase(key, path) or key.startswith(f"{path}.") for path in paths):
            continue
        a, b = (tree.get(key) for tree in trees)
        if a != b:
            yield f"{key} is {a} for {first.label}, {b} for {other.label}"


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with its stages by name, and one sorted line for the shapes and one for the batch sizes of a stage."""
    stages = {}
    for name, stage in planned_stages(config).items():
        buckets = stage["buckets"]
        shapes = [f"{b['frames']}x{b['height']}x{b['width']}" for b in buckets]
        shares = [f"{shape} (share {b.get('share', 1.0)})" for shape, b in zip(shapes, buckets, strict=True)]
        batches = [f"{shape}: {b['batch_size']}" for shape, b in zip(shapes, buckets, strict=True)]
        lines = {"buckets": ", ".join(sorted(shares)), "batch_size": ", ".join(sorted(batches))}
        stages[name] = {**stage, **lines}
    return {**config, "stages": stages}


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}.{key}" if above else str(key)
        if isinstance(value, dict):
            flat |= _flat(value, path)
        else:
            flat[path] = value
    return flat
