"""What is measured of fabricated runs whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lingen.comparison.curves import AXES, Curve, below_for_good, first_at_or_below, window_mean, wobble
from lingen.comparison.read import load_runs
from lingen.comparison.result import Result, as_json, measure
from lingen.errors import UserError

START = dict.fromkeys(AXES, 0.0)
TOKENS, FLOPS, HOURS = 10, 1000.0, 0.01  # a sample


def curve(losses: list[float], step: float = 10.0, first: float = 0.0) -> Curve:
    samples = first + step * np.arange(len(losses))
    return Curve(dict.fromkeys(AXES, samples), np.array(losses, dtype=float))


def counts(samples: int, flops: float) -> dict[str, float]:
    return {"samples": samples, "tokens": samples * TOKENS, "flops": samples * flops, "hours": samples * HOURS}


def write_run(folder: Path, stages: list[dict[str, Any]], *, flops: float = FLOPS, config: Any = None) -> Path:
    """``stages``: name, train {samples: loss}, validation {samples: {bucket: loss}}; samples run on across stages."""
    records: list[dict[str, Any]] = []
    done = 0
    for before, stage in zip([None, *stages], stages, strict=False):
        head = {"step": done, "stage": stage["name"], **counts(done, flops)}
        records.append({"kind": "transfer", "from": before and before["name"], "checkpoint": None, **head})
        held_out = stage.get("validation", {})
        for samples in sorted({*stage["train"], *held_out}):
            at = {"step": samples, "stage": stage["name"], **counts(samples, flops)}
            if samples in stage["train"]:
                records.append({"kind": "train", "loss": stage["train"][samples], "bucket": "b", **at})
            if samples in held_out:
                buckets = held_out[samples]
                loss = sum(buckets.values()) / len(buckets)
                end = "start" if samples == done else "interval"
                record = {"kind": "validation", "loss": loss, "bucket_loss": buckets, "bin_loss": [loss, loss / 2]}
                records.append({**record, "at": end, **at})
        done = max(stage["train"])
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def two_stages(second: dict[int, dict[str, float]], train: float = 1.0) -> list[dict[str, Any]]:
    """Images to 1.0 at 100 samples, then video with the validation losses of ``second``."""
    first = {0: {"1x64x64": 3.0}, 50: {"1x64x64": 2.0}, 100: {"1x64x64": 1.0}}
    steps = dict.fromkeys(range(110, 201, 10), train)
    return [
        {"name": "image", "train": dict.fromkeys(range(10, 101, 10), 1.0), "validation": first},
        {"name": "video", "train": steps, "validation": second},
    ]


LINGEN = {
    100: {"17x64x64": 3.0, "1x64x64": 1.0},  # 2.0
    150: {"17x64x64": 1.0, "1x64x64": 1.5},  # 1.25
    180: {"17x64x64": 0.5, "1x64x64": 0.5},  # 0.5
    200: {"17x64x64": 0.5, "1x64x64": 0.25},  # 0.375
}
DIT = {
    100: {"17x64x64": 3.0, "1x64x64": 2.0},  # 2.5
    150: {"17x64x64": 2.0, "1x64x64": 1.5},  # 1.75
    200: {"17x64x64": 1.5, "1x64x64": 1.0},  # 1.25
}


@pytest.fixture
def pair(tmp_path: Path) -> Result:
    lingen = write_run(tmp_path / "lingen", two_stages(LINGEN))
    dit = write_run(tmp_path / "dit", two_stages(DIT, train=2.0), flops=2 * FLOPS)
    return measure(load_runs([str(lingen), str(dit)], ["LinGen", "DiT"]), smoothing=2)


def test_jump_and_recovery_of_the_validation_loss(pair: Result) -> None:
    transfer = as_json(pair)["transfers"][0]
    assert (transfer["source"], transfer["target"]) == ("image", "video")
    lingen, dit = transfer["runs"]["LinGen"], transfer["runs"]["DiT"]
    assert lingen["first_validation"] == 0.0
    effect = lingen["validation"]
    assert (effect["before"], effect["after"], effect["jump"]) == (1.0, 2.0, 1.0)
    # From 1.25 at +50 to 0.5 at +80, the level 1.0 lies a third of the way: +60 samples.
    assert effect["back_to"]["cost"] == pytest.approx({"samples": 60, "tokens": 600, "flops": 60e3, "hours": 0.6})
    assert effect["back_to"]["between"] == (50.0, 80.0)
    assert effect["below_for_good"] == effect["back_to"]
    assert (dit["validation"]["jump"], dit["validation"]["back_to"], dit["validation"]["best"]) == (1.5, None, 1.25)
    assert dit["validation"]["below_for_good"] is None


def test_common_buckets_are_compared_like_for_like(pair: Result) -> None:
    lingen = as_json(pair)["transfers"][0]["runs"]["LinGen"]
    assert list(lingen["buckets"]) == ["1x64x64"]
    effect = lingen["common"]
    assert effect == lingen["buckets"]["1x64x64"]
    assert (effect["before"], effect["jump"], effect["peak"], effect["best"]) == (1.0, 0.0, 1.5, 0.25)
    assert effect["back_to"]["cost"]["samples"] == 0.0  # the weights are the same, so it begins at its level
    assert effect["below_for_good"]["cost"]["samples"] == 65.0  # half-way from 1.5 at +50 to 0.5 at +80


def test_training_jump_comes_from_windows_inside_the_stages(tmp_path: Path) -> None:
    stages = two_stages({})
    stages[0] |= {"train": dict(zip(range(10, 101, 10), [9, 9, 9, 9, 9, 9, 9, 9, 2, 4], strict=True)), "validation": {}}
    stages[1]["train"] = dict(zip(range(110, 201, 10), [6, 8, 6, 4, 4, 2, 1, 3, 2, 2], strict=True))
    run = write_run(tmp_path / "run", stages)
    transfer = as_json(measure(load_runs([str(run)], None), smoothing=2))["transfers"][0]["runs"]["run"]
    assert transfer["validation"] is None and transfer["common"] is None
    effect = transfer["training"]
    assert (effect["before"], effect["after"], effect["jump"]) == (3.0, 7.0, 4.0)
    assert effect["jump_error"] == pytest.approx(np.sqrt(2.0))  # both windows have a standard error of 1
    # Window means of two from the transfer on: 7 at +15, 7, 5, 4 at +45, 3 at +55, then lower.
    assert effect["back_to"]["cost"]["samples"] == 55.0
    assert effect["below_for_good"]["between"] == (55.0, 65.0)


def test_head_to_head(pair: Result) -> None:
    stage = as_json(pair)["stages"][1]
    assert stage["stage"] == "video"
    reach = next(r for r in stage["reaches"] if r["run"] == "LinGen")
    assert reach["difference"] == -0.875
    assert reach["reached"]["cost"]["samples"] == 50.0  # 1.25 is a record of LinGen's
    assert reach["share"] == pytest.approx({"samples": 0.5, "tokens": 0.5, "flops": 0.25, "hours": 0.5})
    assert reach["total_share"]["flops"] == pytest.approx(150e3 / 400e3)
    back = next(r for r in stage["reaches"] if r["run"] == "DiT")
    assert back["reached"] is None and back["best"] == 1.25 and back["share"]["flops"] is None
    assert stage["samples"] == [0.0, 25.0, 50.0, 75.0, 100.0]
    assert stage["leads"][0]["lead"] == pytest.approx([0.5, 0.5, 0.5, 1.5 - 0.625, 0.875])
    assert stage["finals"]["DiT"]["cost"] == pytest.approx({"samples": 100, "tokens": 1000, "flops": 200e3, "hours": 1})


def test_window_means_keep_to_the_stage_and_to_full_windows() -> None:
    smooth = window_mean(curve([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), 2)
    assert smooth.loss.tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5]
    assert smooth.counts["samples"].tolist() == [5, 15, 25, 35, 45, 55, 65, 75, 85]
    assert len(window_mean(curve([1.0] * 10), 100)) == 9  # a fifth of the stage, not more than the stage
    assert len(window_mean(curve([]), 5)) == 0


def test_crossings() -> None:
    falling = curve([4, 2, 3, 1])
    first, good = first_at_or_below(falling, 2.0, START), below_for_good(falling, 2.0, START)
    assert first is not None and (first.cost["samples"], first.between) == (10.0, (0.0, 10.0))
    assert good is not None and (good.cost["samples"], good.between) == (25.0, (20.0, 30.0))
    assert first_at_or_below(falling, 0.5, START) is None
    assert below_for_good(curve([1, 2]), 2.0, START) is None
    late = first_at_or_below(curve([1.0], first=40.0), 2.0, START)  # no record at the transfer itself
    assert late is not None and late.cost["samples"] == 40.0


def test_wobble_sees_scatter_and_not_the_trend() -> None:
    assert wobble(curve([1.0 - 0.01 * i for i in range(20)])) == pytest.approx(0, abs=1e-12)
    noise = np.random.default_rng(0).normal(0, 0.1, 4000)
    measured = wobble(curve((2.0 - 1e-4 * np.arange(4000) + noise).tolist()))
    assert measured == pytest.approx(0.1, rel=0.1)
    assert wobble(curve([1.0] * 8)) is None


def test_a_run_in_progress_is_compared_as_far_as_it_is(tmp_path: Path) -> None:
    model = {"name": "dit"}
    plan = {
        "model": model,
        "stages": {name: {"name": name, "samples": 100, "buckets": []} for name in ("image", "video", "long")},
    }
    ahead = write_run(tmp_path / "ahead", two_stages(LINGEN), config=plan)
    behind = write_run(tmp_path / "behind", two_stages(DIT)[:1], config=plan)
    result = measure(load_runs([str(ahead), str(behind)], None), 2)
    tree = as_json(result)
    assert [run["in_progress"] for run in tree["runs"]] == [True, True]
    assert [stage["complete"] for stage in tree["runs"][0]["stages"]] == [True, True]  # its samples are seen
    assert list(tree["transfers"][0]["runs"]) == ["ahead"]
    assert tree["stages"][1]["reaches"] == []
    assert any("behind is in progress" in note for note in result.notes)
    assert result.warnings == []


def test_a_stage_that_only_began(tmp_path: Path) -> None:
    stages = two_stages({100: {"17x64x64": 3.0}})
    run = write_run(tmp_path / "run", stages)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["kind"] != "train" or json.loads(line)["stage"] == "image"]
    (run / "metrics.jsonl").write_text("".join(kept) + '{"kind": "train", "st')  # and a torn last line
    tree = as_json(measure(load_runs([str(run)], None), 2))
    assert [stage["complete"] for stage in tree["runs"][0]["stages"]] == [True, False]
    assert tree["transfers"][0]["runs"]["run"]["validation"]["jump"] == 2.0
    assert tree["transfers"][0]["runs"]["run"]["training"] is None


def test_a_first_validation_after_the_transfer_is_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", two_stages({n: losses for n, losses in LINGEN.items() if n > 100}))
    result = measure(load_runs([str(run)], None), 2)
    assert as_json(result)["transfers"][0]["runs"]["run"]["first_validation"] == 50.0
    assert any("first validated 50 samples after the transfer to video" in note for note in result.notes)


def test_data_fingerprints_are_compared_where_they_are_recorded(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, two_stages(LINGEN)) for name in ("a", "b")]
    for run in runs:
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text.replace('"checkpoint": null', f'"data_fingerprint": "{run.name}"'))
    warned = measure(load_runs([str(run) for run in runs], None), 2).warnings
    assert sum("differ in data_fingerprint" in warning for warning in warned) == 2  # once a stage


def test_losses_that_are_not_finite_are_left_out_and_said(tmp_path: Path) -> None:
    stages = two_stages(LINGEN)
    stages[1]["train"][150] = float("nan")
    run = write_run(tmp_path / "run", stages)
    text = (run / "metrics.jsonl").read_text().replace("NaN", "null")
    (run / "metrics.jsonl").write_text(text)
    result = measure(load_runs([str(run)], None), 2)
    assert len(result.runs[0].stages[1].train) == 9
    assert any("1 records with a loss that is not a finite number" in warning for warning in result.warnings)
    json.dumps(as_json(result), allow_nan=False)


def config_of(**changes: Any) -> dict[str, Any]:
    bucket = {"frames": 1, "height": 64, "width": 64, "batch_size": 8, "share": 1.0}
    stage = {"name": "image", "samples": 100, "lr": 1e-3, "buckets": [bucket]}
    base = {
        "model": {"name": "lingen"},
        "seed": 0,
        "validation": {"samples": 64, "every_steps": 5},
        "stages": {"i": stage},
    }
    return base | changes


def test_what_makes_runs_incomparable_is_warned_of(tmp_path: Path) -> None:
    wider = {"frames": 1, "height": 64, "width": 128, "batch_size": 8}
    stage = {"name": "image", "samples": 100, "lr": 2e-3, "buckets": [wider]}
    other = config_of(validation={"samples": 32, "every_steps": 9}, stages={"i": stage}, model={"name": "dit"}, seed=1)
    a = write_run(tmp_path / "a", two_stages(LINGEN)[:1], config=config_of())
    b = write_run(tmp_path / "b", two_stages(DIT)[:1], config=other)
    result = measure(load_runs([str(a), str(b)], None), None)
    assert [run.label for run in result.runs] == ["LinGen", "DiT"]
    warned, noted = " ".join(result.warnings), " ".join(result.notes)
    assert "validation.samples is 64 for LinGen, 32 for DiT" in warned
    assert "1x64x64 (share 1.0) for LinGen, 1x64x128 (share 1.0) for DiT" in warned
    assert "every_steps" not in warned + noted and "model.name" not in warned + noted
    assert "seed is 0 for LinGen, 1 for DiT" in noted and "lr is 0.001 for LinGen, 0.002 for DiT" in noted


def test_other_stages_are_warned_of_and_common_ones_compared(tmp_path: Path) -> None:
    stages = two_stages(DIT)
    stages[1] |= {"name": "long"}
    runs = [write_run(tmp_path / "a", two_stages(LINGEN)), write_run(tmp_path / "b", stages)]
    result = measure(load_runs([str(run) for run in runs], None), 2)
    assert any("went through different stages" in warning for warning in result.warnings)
    assert [(s.stage, len(s.reaches)) for s in result.stages] == [("image", 2), ("video", 0), ("long", 0)]


def test_other_validation_buckets_are_warned_of(tmp_path: Path) -> None:
    renamed = {n: {"9x64x64": 1.0} for n in DIT}
    runs = [write_run(tmp_path / "a", two_stages(LINGEN)), write_run(tmp_path / "b", two_stages(renamed))]
    result = measure(load_runs([str(run) for run in runs], None), 2)
    assert any("stage video" in w and "different buckets" in w for w in result.warnings)


def test_bad_input_is_named(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", two_stages(LINGEN))
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    head = {"kind": "transfer", "step": 0, "stage": "a", **counts(0, FLOPS)}
    (bare / "metrics.jsonl").write_text(json.dumps(head) + "\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1, "stage": "a"}\n')
    for folders, labels, message in (
        ([str(tmp_path / "none")], None, "is not a folder"),
        ([str(tmp_path / "empty")], None, "no metrics.jsonl"),
        ([str(bare)], None, "no train records"),
        ([str(broken)], None, "record 1 has no usable samples, tokens, flops, hours"),
        ([str(good), str(good / ".." / "good")], None, "names a folder twice"),
        ([str(good)], ["a", "b"], "must be 1 different names"),
        ([], None, "runs is empty"),
    ):
        with pytest.raises(UserError, match=message):
            load_runs(folders, labels)
