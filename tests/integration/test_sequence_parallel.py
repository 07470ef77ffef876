"""Training with two groups of two ranks, and with one of four, against one process alone.

This file is also the program that runs in those four processes (see ``work``): one launch serves all tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import data.workers
from data.shards import Index, load_index, read_member
from lingen.compose import compose
from lingen.dist import Dist
from lingen.errors import UserError
from lingen.loop import train
from tests.runs import Signal, lines

ROOT = Path(__file__).resolve().parents[2]
STOP_AT, DAMAGED = 2, "damaged-shards"
SMALL = [
    "size.head_dim=8", "~stages.demo_video_128", "logger.console=false", "stages.demo_image.samples=12",
    "stages.demo_image.buckets.0.batch_size=4", "stages.demo_video.samples=12",
    "stages.demo_video.buckets=[{frames: 17, height: 48, width: 32, batch_size: 4}]", "validation.every_steps=2",
]  # fmt: skip
LINGEN, DIT = ["model=lingen", "model.mate.mamba_head_dim=16"], ["model=dit"]
ZERO2, ZERO3 = ["engine=zero2", "engine.dtype=fp32"], ["engine=zero3", "engine.dtype=fp32"]
RUNS = {
    "torch": LINGEN,
    "zero3": [*LINGEN, *ZERO3, "engine.activation_checkpointing=true"],
    "zero2": [*DIT, *ZERO2, "engine.grad_accumulation=2", "data.max_bad_share=0.9", "data.holdout_share=0.3"],
}


def trained(run: Path) -> list[tuple[int, str, int, float, float]]:
    return [(r["step"], r["stage"], r["valid"], r["loss"], r["grad_norm"]) for r in lines(run, "train")]


def start(folder: Path, words: list[str], stop_at: int | None = None) -> int:
    """Train in this process, and in its siblings where there are some."""
    config = compose([f"runs_dir={folder.parent}", f"name={folder.name}", *words])
    return train(config, Signal(folder, stop_at))  # type: ignore[arg-type]


def work(jobs: Path) -> None:
    """Do what the file says in this process and its siblings; rank 0 writes what came of it beside it."""
    torch.set_num_threads(1)
    Dist.close = lambda self: None  # type: ignore[method-assign] # the launcher's store serves one process group
    came: dict[str, int | str] = {}
    for name, (folder, words, stop_at) in json.loads(jobs.read_text()).items():
        paths = [word.removeprefix("data.path=") for word in words if word.startswith("data.path=")]
        is_second = int(os.environ.get("RANK", "0")) % 2  # broken samples are so for the first of two ranks alone
        data.workers.read_member = partial(read_from, paths[0]) if is_second else read_member
        try:
            came[name] = start(Path(folder), words, stop_at)
        except UserError as error:
            came[name] = str(error)
    if os.environ.get("RANK", "0") == "0":
        jobs.with_suffix(".came").write_text(json.dumps(came))


def read_from(path: str, index: Index, row: int, *, verify: bool) -> bytes:
    """Read a member out of the shards in ``path`` instead."""
    return read_member(replace(index, path=Path(path), root=Path(path)), row, verify=verify)


def damaged(world: Any, out: Path) -> Path:
    """The world's shards, every third sample of which is broken."""
    shutil.copytree(world.shards, out)
    index = load_index(out)
    for n in range(0, len(index.key), 3):
        with (out / index.shards[index.shard[n]]).open("r+b") as shard:
            shard.seek(int(index.offset[n] + index.bytes[n] // 2))
            shard.write(bytes(64))
    return out


@dataclass(frozen=True)
class Together:
    """What four processes did, and the same alone."""

    runs: Path
    came: dict[str, int | str]  # of each launch of ``train``: its exit code, or what it refused

    def pair(self, name: str) -> tuple[Path, Path]:
        return self.runs / "together" / name, self.runs / "alone" / name.split("-")[0]


@pytest.fixture(scope="module")
def together(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Together:
    runs = tmp_path_factory.mktemp("sequence")
    words = {name: [*world.words, *SMALL, *own] for name, own in RUNS.items()}
    words["zero2"].append(f"data.path={damaged(world, runs / DAMAGED)}")
    alone = {f"alone/{name}": (own, None) for name, own in words.items()}
    launch(runs, 1, alone | {"together/zero3-resumed": (words["zero3"], STOP_AT)})
    two, four, eight = ([f"engine.sequence_parallel={ranks}"] for ranks in (2, 4, 8))
    came = launch(
        runs,
        4,
        {f"together/{name}": ([*own, *two], None) for name, own in words.items()}
        | {
            "together/zero3-resumed": ([*words["zero3"], *two], None),
            "together/torch-left": ([*words["torch"], *four], STOP_AT),
            "batch": ([*words["torch"], *two, "stages.demo_image.buckets.0.batch_size=3"], None),
            "ranks": ([*words["torch"], *eight, "size.head_dim=4", "model.mate.mamba_head_dim=8"], None),
        },
    )
    assert start(runs / "together" / "torch-left", words["torch"]) == 0
    return Together(runs, came)


def launch(runs: Path, processes: int, jobs: dict[str, tuple[list[str], int | None]]) -> dict[str, int | str]:
    """Start ``work``: the words of each run, by its folder, and the step that a signal comes in."""
    path = runs / f"jobs{processes}.json"
    path.write_text(json.dumps({name: (str(runs / name), *job) for name, job in jobs.items()}))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID")}
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, str(path)],
        env=environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    came: dict[str, int | str] = json.loads(path.with_suffix(".came").read_text())
    return came


@pytest.mark.parametrize("name", [*RUNS, "zero3-resumed", "torch-left"])
def test_ranks_together_train_as_one_alone(together: Together, name: str) -> None:
    """From the first step; going on from a checkpoint that one process left; and one going on from theirs."""
    ours, theirs = together.pair(name)
    assert together.came[f"together/{name}"] == (75 if name == "torch-left" else 0)
    found, expected = trained(ours), trained(theirs)
    assert len(found) == len(expected) == 6
    for (*place, loss, norm), (*place_, loss_, norm_) in zip(found, expected, strict=True):
        assert place == place_ and loss == pytest.approx(loss_, rel=1e-5) and norm == pytest.approx(norm_, rel=1e-4)
    measured, expected_ = lines(ours, "validation"), lines(theirs, "validation")
    assert len(measured) == len(expected_) == 6
    for record, record_ in zip(measured, expected_, strict=True):
        for key in ("stage", "step", "at", "valid"):
            assert record[key] == record_[key]
        assert record["loss"] == pytest.approx(record_["loss"], rel=1e-5)
        assert record["bin_loss"] == pytest.approx(record_["bin_loss"], rel=1e-5)


def test_holes_are_counted_and_named_once(together: Together) -> None:
    ours, theirs = together.pair("zero2")
    assert 0 < min(valid for _, _, valid, *_ in trained(ours)) < 4
    assert min(min(record["valid"].values()) for record in lines(ours, "validation")) < 4
    named = [hole for rank in range(4) for hole in bad_samples(ours, rank)]
    assert sorted(named) == sorted(bad_samples(theirs, 0))


def bad_samples(run: Path, rank: int) -> list[str]:
    path = run / f"bad_samples-rank{rank}.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_what_cannot_be_shared_out_is_refused_before_anything_is_written(together: Together) -> None:
    parts = {
        "batch": "batch_size=3, which is not a multiple of 2 groups of engine.sequence_parallel=2 ranks x engine.grad",
        "ranks": "engine.sequence_parallel=8 must divide the number of processes, which is 4",
    }
    for name, part in parts.items():
        assert part in str(together.came[name])
        assert not (together.runs / name).exists()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
