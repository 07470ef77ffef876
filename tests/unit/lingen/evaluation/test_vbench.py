"""VBench through a program that pretends to be it: how it is called, what it is given, what is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingen.errors import UserError
from lingen.evaluation.folder import Asked, SampledRun, read_run
from lingen.evaluation.vbench import VBenchConfig, file_names, score_run

from .conftest import Make

# Writes what VBench writes; dimensions are given values by the name of the video. Counts its calls.
FAKE = """#!{python}
import argparse, json, os, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("what"), parser.add_argument("--videos_path"), parser.add_argument("--output_path")
parser.add_argument("--mode"), parser.add_argument("--dimension", nargs="+"), parser.add_argument("--full_json_dir")
asked = parser.parse_args()
here = Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if (here / "broken").exists():
    print("loading"), sys.exit("CUDA is not available")
videos = sorted(Path(asked.videos_path).iterdir())
assert all(video.read_bytes()[4:8] == b"ftyp" for video in videos)
scale = {{"imaging_quality": 10.0, "dynamic_degree": True}}
value = lambda d, n: scale[d] * (n % 2 == 0) if d in scale else n / 10
entries = lambda d: [{{"video_path": str(v), "video_results": value(d, n)}} for n, v in enumerate(videos)]
tree = {{d: [0.5, entries(d)] for d in asked.dimension}}
if (here / "strange").exists():
    tree = json.loads((here / "strange").read_text())
(Path(asked.output_path) / "results_x_eval_results.json").write_text(json.dumps(tree))
(Path(asked.output_path) / "results_x_full_info.json").write_text("[]")
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    program = tmp_path / "env" / "vbench"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    return program


def config(program: Path, *dimensions: str, **more: Any) -> VBenchConfig:
    return VBenchConfig(command=str(program), dimensions=list(dimensions) or ["motion_smoothness"], **more)


def run_of(make_run: Make, *prompts: str) -> SampledRun:
    return read_run(make_run("a", videos=[Asked(prompt=prompt, seed=n) for n, prompt in enumerate(prompts)]))


def test_videos_are_named_by_prompt_and_number(make_run: Make) -> None:
    run = run_of(make_run, "a cat; rm -rf *", "a dog", "a cat; rm -rf *")
    assert file_names(run) == ["a cat; rm -rf *-0.mp4", "a dog-0.mp4", "a cat; rm -rf *-1.mp4"]


def test_scores_are_read_and_kept(make_run: Make, fake: Path, tmp_path: Path) -> None:
    run = run_of(make_run, "b", "a", "$(touch x)")
    dimensions = ("motion_smoothness", "imaging_quality", "dynamic_degree")
    scores = score_run(run, config(fake, *dimensions), tmp_path / "out")
    assert {name: values.tolist() for name, values in scores.items()} == {
        "motion_smoothness": [0.2, 0.1, 0.0],  # sorted by name: $, a, b
        "imaging_quality": [0.1, 0, 0.1],
        "dynamic_degree": [1, 0, 1],
    }
    place = (tmp_path / "out" / "vbench" / "a").absolute()
    calls = (fake.parent / "calls").read_text().splitlines()
    expected = ["evaluate", "--videos_path", str(place / "videos"), "--output_path", str(place / "results")]
    assert json.loads(calls[0]) == [*expected, "--mode", "custom_input", "--dimension", *dimensions]
    again = score_run(run, config(fake, *dimensions), tmp_path / "out")
    assert all(np.array_equal(again[name], scores[name]) for name in dimensions)
    assert len((fake.parent / "calls").read_text().splitlines()) == 1
    score_run(run, config(fake, "motion_smoothness"), tmp_path / "out")
    assert len((fake.parent / "calls").read_text().splitlines()) == 2


def test_its_own_prompts(make_run: Make, fake: Path, tmp_path: Path) -> None:
    (tmp_path / "info.json").write_text("[]")
    words = config(fake, "scene", mode="vbench_standard", full_info=str(tmp_path / "info.json"))
    assert list(score_run(run_of(make_run, "a", "a"), words, tmp_path / "out")) == ["scene"]
    (call,) = map(json.loads, (fake.parent / "calls").read_text().splitlines())
    assert call[5:] == [
        "--mode",
        "vbench_standard",
        "--dimension",
        "scene",
        "--full_json_dir",
        str(tmp_path / "info.json"),
    ]


def test_what_cannot_be_is_one_message(make_run: Make, fake: Path, tmp_path: Path) -> None:
    run = run_of(make_run, "a", "b")
    out = tmp_path / "out"
    for words, message in (
        (config(tmp_path / "nowhere"), "nowhere is no program"),
        (config(fake, "motion_smothness"), "did you mean 'motion_smoothness'"),
        (config(fake, "color"), "color needs VBench's own prompts"),
        (config(fake, full_info="nowhere.json"), "full_info=nowhere.json is no file"),
    ):
        with pytest.raises(UserError, match=message):
            score_run(run, words, out)
    assert not out.exists()
    for prompt in ("../../x", "x" * 250):
        other = SampledRun(
            run.path, run.file.model_copy(update={"videos": [Asked(prompt=prompt, seed=0)]}), run.records
        )
        with pytest.raises(UserError, match="too long, or a /"):
            score_run(other, config(fake), out)
    assert not out.exists()


def test_a_command_that_fails_and_results_that_are_strange(make_run: Make, fake: Path, tmp_path: Path) -> None:
    run, out = run_of(make_run, "a", "b"), tmp_path / "out"
    (fake.parent / "broken").touch()
    with pytest.raises(UserError, match=r"ended with 1: CUDA is not available \(all of it in .*log\)"):
        score_run(run, config(fake), out)
    (fake.parent / "broken").unlink()
    for tree, message in (
        ({}, "KeyError"),
        ({"motion_smoothness": [0.5]}, "IndexError"),
        (
            {"motion_smoothness": [0.5, [{"video_path": "c-0.mp4", "video_results": 1}]]},
            "no value of motion_smoothness",
        ),
        ([], "TypeError"),
    ):
        (fake.parent / "strange").write_text(json.dumps(tree))
        with pytest.raises(UserError, match=message):
            score_run(run, config(fake), out)
    (fake.parent / "strange").unlink()
    assert score_run(run, config(fake), out)["motion_smoothness"].tolist() == [0, 0.1]
