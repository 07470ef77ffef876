"""What dry_run=true prints, and that the published ladder fits the nodes that conf/cluster/h100.yaml describes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.shards import Index
from lingen.cluster import checks
from lingen.cluster.checks import plan_jobs, problems
from lingen.cluster.config import seconds
from lingen.cluster.dry import print_dry_run
from lingen.cluster.request import attempts, read_request
from lingen.cluster.script import ROOT
from lingen.errors import UserError


def index_of(samples: int) -> Index:
    """Half images, square and wide, half clips of 20, 40 and 120 s: some for every bucket."""
    rows = np.arange(samples)
    video = rows % 2 == 1
    seconds = np.choose(rows % 6 // 2, [20, 40, 120])
    return Index(
        path=Path("nowhere"),
        shards=["0.tar"],
        key=[f"{row:06d}" for row in rows],
        caption=["a"] * samples,
        frames=np.where(video, 24 * seconds + 1, 1),
        fps=np.where(video, 24.0, 0.0),
        height=np.full(samples, 1080),
        width=np.where(rows % 4 == 0, 1080, 1920),
        bytes=np.ones(samples, dtype=np.int64),
        shard=np.zeros(samples, dtype=np.int64),
        offset=rows,
        sha256=[""] * samples,
        fingerprint="",
        begin=np.zeros(samples),
        end=np.zeros(samples),
        root=Path("nowhere"),
    )


def test_everything_is_printed_and_nothing_done(
    fake: Any, words: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")  # it needs no Slurm
    planned = words.plan("models=[lingen,dit]", "cluster.gpu={peak_tflops: 1, memory_gb: 1, mfu: 0.5}")
    print_dry_run(planned)
    printed = capsys.readouterr().out
    for part in (
        "a/lingen: lingen tiny",
        "total: 900 steps",
        "2 x cpu",
        "the chain of a/dit:\n  1. demo_image: at once\n  2. demo_video: after demo_image has ended well",
        *(each.script for jobs in planned for each in jobs),
    ):
        assert part in printed
    assert not Path("runs").exists() and not fake.calls


def test_what_would_be_refused_is_said_at_the_end(fake: Any, words: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"stage demo_video on 2 nodes: .* nothing would be submitted"):
        print_dry_run(words.plan("cluster.mem=3M"))
    printed = capsys.readouterr()
    assert "srun" in printed.out and "stage demo_image on 2 nodes" in printed.err and " no " in printed.out


def test_the_published_ladder_fits_the_h100_nodes(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "load_index", lambda _: index_of(400))
    request = read_request(
        [
            "name=p",
            "experiment=paper_4b",
            "models=[lingen,dit]",
            "data.path=x",
            "autoencoder.path=y",
            "cluster=h100",
            "cluster.partition=gpu",
            "dry_run=true",
        ]
    )
    planned = plan_jobs(request.chains)
    assert request.dry_run and not list(problems(planned))
    lingen, dit = planned
    assert len(lingen) == len(dit) == 5 and {each.job.world for each in lingen} == {64}
    hours = [each.gpu_hours for each in lingen]
    assert hours[0] == pytest.approx(lingen[0].plan.stages[0].flops / (0.4 * 989e12 * 3600))
    print_dry_run(planned)
    printed = capsys.readouterr().out
    assert printed.count("GPU-hours at an MFU of 0.4 of 989 TFLOP/s") == 2
    assert "#SBATCH --gpus-per-node=8" in printed and "engine.device=cuda" in printed and "empty" not in printed


def test_attempts_by_the_time_limit(fake: Any, words: Any) -> None:
    each = words.plan("cluster.time=1:00:00", "cluster.signal_s=600")[0][0]
    assert [attempts(each.job, hours, each.chain.cluster) for hours in (0.0, 0.8, 0.9, 10.0)] == [1, 1, 2, 12]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("90:30", 5430), ("12:00:01", 43201), ("2-12", 216000), ("2-12:30", 217800), ("1-0:0:1", 86401)],
)
def test_times_are_read_as_slurm_does(text: str, expected: int) -> None:
    assert seconds(text) == expected


def test_the_command_says_how_it_is_used(python: Any) -> None:
    done = python("slurm/launch.py", "-h")
    assert done.returncode == 0 and "cpu, default, h100" in done.stdout
    done = python("slurm/launch.py", "status", "name=a", "runs_dir=nowhere")
    assert (done.returncode, done.stderr) == (
        2,
        "error: name=a: there is no chain in nowhere/a; set runs_dir where it is another than nowhere\n",
    )
    done = python("slurm/launch.py", "statsu", "name=a")
    assert (done.returncode, done.stderr) == (
        2,
        "error: 'statsu' is neither key=value nor a command; did you mean 'status'?\n",
    )
    done = python("train.py", "name=a", "cluster=cpu")
    assert done.returncode == 2 and "cluster=cpu is for slurm/launch.py" in done.stderr


def test_the_template_is_bash(fake: Any, words: Any) -> None:
    done = subprocess.run(["bash", "-n"], input=words.plan()[0][0].script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (ROOT / "slurm" / "stage.sbatch").is_file()
