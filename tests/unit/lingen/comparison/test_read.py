"""Run folders with losses that are missing, and with contents of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lingen.comparison.panels import bucket_panels
from lingen.comparison.plot import loss_curves
from lingen.comparison.read import Run, load_runs
from lingen.comparison.report import render
from lingen.comparison.result import as_json, measure
from lingen.errors import UserError

Record = dict[str, Any]
BUCKET = {"frames": 1, "height": 64, "width": 64, "batch_size": 8}
CONFIG: dict[str, Any] = {
    "model": {"name": "dit"},
    "stages": {name: {"name": name, "samples": 50, "buckets": [BUCKET]} for name in ("image", "video")},
}


def write_run(folder: Path, change: Callable[[Record], Record] = lambda r: r, config: Any = CONFIG) -> Path:
    """Two stages of 50 samples, a train and a validation record every 10; ``change`` is applied to each record."""
    lines = []
    for start, stage in ((0, "image"), (50, "video")):
        for samples in range(start, start + 51, 10):
            axes = {"step": samples, "samples": samples, "tokens": samples, "flops": samples, "hours": samples / 100}
            loss = 2.0 - samples / 100
            held_out = {"at": "interval", "bucket_loss": {"1x64x64": loss, "17x64x64": loss}, "bin_loss": [loss, loss]}
            first = {"kind": "transfer", "from": None} if samples == start else {"kind": "train", "loss": loss}
            validation = {"kind": "validation", "loss": loss, **held_out}
            lines += [json.dumps(change({"stage": stage, **axes, **kind})) for kind in (first, validation)]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def load(folder: Path) -> Run:
    (run,) = load_runs([str(folder)], None)
    return run


def test_a_missing_loss_is_left_out_said_and_does_not_keep_a_stage_from_its_end(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "r", lambda r: r | {"loss": None} if r["samples"] == 50 and "at" not in r else r))
    assert [len(stage.train) for stage in run.stages] == [4, 5] and run.stages[0].end["samples"] == 50
    assert all(stage.complete for stage in run.stages)
    assert measure([run], 2).warnings == ["DiT: 1 records with a loss that is not a finite number were left out."]


def test_a_missing_end_validation_still_ends_its_stage(tmp_path: Path) -> None:
    def at_its_end(record: Record) -> Record:
        last = record["samples"] == 100 and "at" in record
        return record | {"at": "end", "loss": None, "bin_loss": [None, None]} if last else record

    plan = {**CONFIG, "stages": {name: stage | {"samples": 999} for name, stage in CONFIG["stages"].items()}}
    assert load(write_run(tmp_path / "run", at_its_end, plan)).stages[1].complete


def test_a_bucket_without_a_loss_has_no_curve_and_the_others_have(tmp_path: Path) -> None:
    hole = {"17x64x64": None, "1x64x64": 1.0}
    run = load(write_run(tmp_path / "run", lambda r: r | {"bucket_loss": hole} if r["samples"] == 70 else r))
    image, video = run.stages
    assert list(image.buckets) == ["1x64x64", "17x64x64"]
    assert list(video.buckets) == ["1x64x64"] and len(video.validation) == len(video.buckets["1x64x64"]) == 6
    result = measure([run], 2)
    assert result.warnings == []
    assert "DiT has no loss of bucket 17x64x64 in some validations of video: it has no curve." in result.notes
    assert bucket_panels(result)
    json.dumps(as_json(result), allow_nan=False)


def test_a_run_without_one_finite_loss_is_shown_as_empty(tmp_path: Path) -> None:
    none = {"loss": None, "bucket_loss": {"1x64x64": None}, "bin_loss": [None]}
    result = measure([load(write_run(tmp_path / "run", lambda r: r | none))], None)
    assert [len(stage.train) + len(stage.validation) for stage in result.runs[0].stages] == [0, 0]
    json.dumps(as_json(result), allow_nan=False)
    axes = ["samples", "hours"]
    assert "22 records with a loss" in render(result, axes, loss_curves(result, axes, log=False), log=False)


@pytest.mark.parametrize(
    ("samples", "said"),
    [((50, 60, 70, 80, 90, 100), "60"), ((70,), "60 or 64")],  # broken all along; broken in one validation
)
def test_validations_on_other_numbers_of_samples_are_warned_of(
    samples: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    whole = {"1x64x64": 32, "17x64x64": 64}

    def broken(record: Record) -> Record:
        fewer = record["stage"] == "video" and record["samples"] in samples
        return record | {"valid": whole | {"17x64x64": 60} if fewer else whole}

    sound = [write_run(tmp_path / name, lambda r: r | {"valid": whole}) for name in ("a", "b")]
    folders = [*sound, write_run(tmp_path / "c", broken), write_run(tmp_path / "unrecorded")]
    runs = load_runs([str(folder) for folder in folders], ["A", "B", "C", "D"])
    assert measure(runs, 2).warnings == [
        f"In stage video, bucket 17x64x64 was validated on 64 held-out samples by A, on {said} by C: "
        "their losses are means over different samples."
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": None}, "model=None"),
        ({"model": "dit"}, "model=dit"),
        ({"stages": {"i": {"name": "image", "samples": "x", "buckets": []}}}, "stages.i.samples=x"),
        ({"stages": {"i": {"name": "image", "samples": 1, "buckets": None}}}, "stages.i.buckets=None"),
        ({"stages": ["image"]}, "stages="),
    ],
)
def test_a_config_of_another_kind_is_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", config=CONFIG | change)
    with pytest.raises(UserError) as caught:
        load(run)
    assert f"runs: {run / 'config.yaml'}: {named}" in str(caught.value)


@pytest.mark.parametrize("text", ["model: [", "a: 2026-99-99", "\xff", "model: {name: dit}", ""])
def test_a_config_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"runs: .*config\.yaml"):
        load(run)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "x"},
        {"bucket_loss": None},
        {"bucket_loss": {"1x64x64": "x"}},
        {"bin_loss": 1.0},
        {"bin_loss": ["x", 1.0]},
        {"valid": 3},
        {"valid": {"1x64x64": "x"}},
        {"samples": None},
        {"stage": None},
    ],
)
def test_a_record_of_another_kind_is_named(change: Record, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lambda r: r | change if r["kind"] == "validation" else r)
    with pytest.raises(UserError, match=rf"metrics.jsonl, record 2 has no usable {next(iter(change))};"):
        load(run)


def test_what_a_guard_left_out_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    axes = {"step": 30, "samples": 30, "tokens": 30, "flops": 30, "hours": 0.3, "stage": "image"}
    with (folder / "metrics.jsonl").open("a") as file:
        for more in ({"kind": "rollback", "skipped": 16}, {"kind": "rollback", "skipped": 24}, {"kind": "refused"}):
            file.write(json.dumps(axes | more) + "\n")
    run = load(folder)
    assert (run.refused, run.skipped, len(run.stages)) == (1, 24, 2)
    (warning,) = measure([run], 2).warnings
    assert warning.startswith("DiT left out 1 steps and went past 24 samples")
