"""The commands that the README and the demo promise, as they stand there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = [
    "stages.demo_image.samples=16",
    "stages.demo_video.samples=16",
    "stages.demo_video_128.samples=8",
    "stages.demo_video_128.buckets.0.batch_size=2",
    "stages.demo_video_128.buckets.1.batch_size=2",
    "validation.every_steps=2",
]
SMALL = ["frames=17", "height=64", "width=64"]


def readme_commands() -> list[list[str]]:
    """The words of the commands under "From clips to curves", without "python"."""
    blocks = (ROOT / "README.md").read_text().split("## From clips to curves")[1].split("\n\n")[1:]
    lines = "\n".join(block for block in blocks if block.startswith("    python scripts/")).replace("\\\n", "")
    return [shlex.split(line, comments=True)[1:] for line in lines.splitlines()]


def test_the_readme_takes_clips_to_curves(python: Any, tmp_path: Path) -> None:
    made = python(
        "-m", "data.synthetic", f"out={tmp_path}/CLIPS", "clips=48", "images=48", "size=64", "frames=33", "fps=8"
    )
    assert made.returncode == 0, made.stderr
    commands = readme_commands()
    assert len(commands) == 9
    for words in commands:
        here = [w.replace("CLIPS", f"{tmp_path}/CLIPS").replace("SHARDS", f"{tmp_path}/SHARDS") for w in words]
        here = [w.replace("AE.", f"{tmp_path}/AE.").replace("runs/a", f"{tmp_path}/runs/a") for w in here]
        here = [w.replace("fast.yaml", f"{tmp_path}/fast.yaml") for w in here]
        if words[0] == "train.py":
            here += ["debug=smoke", f"runs_dir={tmp_path}/runs", *SHORT]
        if words[0] == "scripts/calibrate_cache.py":
            here += [*SMALL, "seeds=2", "steps=8", "tolerance=0.2"]
        if words[0] == "scripts/evaluate.py":
            here = [w.replace("seeds=16", "seeds=2").replace("{name", "{steps: 8, name") for w in here]
            here = [w.replace(", steps: 15", "") for w in here] + SMALL
        done = python(*here)
        assert done.returncode == 0, (words, done.stderr)
    assert {p.name for p in (tmp_path / "runs/a/report").iterdir()} == {
        "loss_curves.png",
        "report.html",
        "compare.json",
    }
    assert len(list((tmp_path / "runs/a/samples").iterdir())) == 2
    assert len(list((tmp_path / "runs/a/fast").iterdir())) == 2
    assert (tmp_path / "runs/a/evaluation/index.html").stat().st_size > 1000
    transfers = json.loads((tmp_path / "runs/a/report/compare.json").read_text())
    assert "demo_video_128" in json.dumps(transfers)


def test_the_demo_leaves_what_it_says_and_does_nothing_twice(python: Any, tmp_path: Path) -> None:
    overrides = shlex.join([*SHORT, "debug=smoke", "sampler.steps=2"])
    words = ["scripts/demo.py", f"out={tmp_path}/demo", "clips=64", "images=64", f"overrides={overrides}"]
    first = python(*words)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr
    report = tmp_path / "demo" / "report"
    last = first.stdout.splitlines()[-5:]
    assert last == [
        str(tmp_path / "demo" / "lingen"),
        str(tmp_path / "demo" / "dit"),
        *(str(report / name) for name in ("loss_curves.png", "report.html", "compare.json")),
    ]
    assert all(Path(line).exists() for line in [*last, report / "samples.png"])
    assert "lingen: the asked colour is on screen in" in first.stdout and "dit: the asked" in first.stdout
    metrics = (tmp_path / "demo" / "dit" / "metrics.jsonl").read_bytes()
    second = python(*words)
    assert second.returncode == 0, second.stdout[-2000:]
    assert "data.synthetic" not in second.stdout and "make_shards" not in second.stdout
    assert (tmp_path / "demo" / "dit" / "metrics.jsonl").read_bytes() == metrics


def test_the_published_ladder_can_be_planned(world: Any, python: Any) -> None:
    paths = (f"data.path={world.shards}", "autoencoder.path=x")
    done = python("train.py", "experiment=paper_4b", "name=planned", *paths, "dry_run=true")
    assert done.returncode == 0, done.stderr
    for part in ("1081x512x896", "243,712", "4,03", "empty"):
        assert part in done.stdout


@pytest.mark.parametrize("words", [["train.py", "--help"], ["train.py"]])
def test_help_lists_the_groups(words: list[str], python: Any) -> None:
    done = python(*words)
    assert done.returncode == 0 and "curriculum: demo, paper" in done.stdout
