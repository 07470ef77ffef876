"""Looking at a chain and cancelling it, with pretended commands of Slurm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lingen.cluster import status
from lingen.cluster.record import StageRecord, write_stage
from lingen.cluster.submit import launch
from lingen.errors import UserError

RUN = Path("runs/a")


def test_the_status_of_a_chain(fake: Any, words: Any, capsys: pytest.CaptureFixture[str]) -> None:
    launch(words.plan())
    fake.set("queue", "11|RUNNING|None|n[1-2]\n12|PENDING|Dependency|")
    write_stage(RUN, StageRecord("demo_image", 11, requeues=3, nodes="n[1-2]"))
    (RUN / "metrics.jsonl").write_text('{"kind": "train", "stage": "demo_image", "step": 7, "loss": 0.51239}\n')
    folder = RUN / "checkpoints/demo_image/step_00000005"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"final": false}')
    capsys.readouterr()
    status.print_status(status.find_runs("runs", "a"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split() == ["demo_image", "11", "running", "n[1-2]", "7", "0.5124", "5", "3"]
    assert printed[3].split() == ["demo_video", "12", "pending", "0"]
    assert printed[4:] == ["  demo_video: Dependency"]


def test_the_status_on_a_narrow_terminal(
    fake: Any, words: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(words.plan())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    reason = "cluster.stages.demo_image.words=[engine=zero3] is too much for a GPU of 40 GB, which is what there is"
    fake.set("queue", "12|PENDING|Dependency|")
    write_stage(
        RUN, StageRecord("demo_image", 11, state="stopped", reason=reason, nodes="gpu[001-008,012-016,032-040]")
    )
    capsys.readouterr()
    status.print_status([RUN])
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert f"  demo_image: {reason}\n" in printed  # in brackets too, and in one piece
    assert "demo_image  11" in printed and "demo_video  12" in printed and "…" not in printed


def test_the_status_of_what_slurm_has_forgotten(
    fake: Any, words: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(words.plan())
    runs = status.find_runs("runs", "a")

    def states() -> list[tuple[str, str]]:
        return [(str(row["state"]), str(row["reason"])) for row in status.rows_of(runs)[str(runs[0])]]

    assert [state for state, _ in states()] == ["gone", "cancelled"]
    write_stage(RUN, StageRecord("demo_image", 11, state="stopped", reason="the disk is full", step=5, loss=0.5))
    assert states() == [("stopped", "the disk is full"), ("cancelled", "demo_image before it did not end well")]
    (RUN / "checkpoints/demo_image/step_00000008").mkdir(parents=True)
    (RUN / "checkpoints/demo_image/step_00000008/manifest.json").write_text('{"final": true}')
    assert states()[0][0] == "finished"
    monkeypatch.setenv("PATH", "")
    capsys.readouterr()
    status.print_status(runs)
    assert "no Slurm here" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no chain in runs/b"):
        status.find_runs("runs", "b")


def test_cancelling_ends_what_is_queued_and_writes_it_down(
    fake: Any, words: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(words.plan("models=[lingen,dit]"))
    fake.set("queue", "11|RUNNING|None|n[1-2]\n12|PENDING|Dependency|")
    runs = status.find_runs("runs", "a")
    assert [run.name for run in runs] == ["dit", "lingen"]
    capsys.readouterr()
    status.cancel(runs)
    assert fake.calls[-1] == "scancel 12 11"
    assert capsys.readouterr().out.splitlines() == [
        "a/dit: nothing is queued or running",
        "a/lingen: cancelled demo_image, job 11, which was running",
        "a/lingen: cancelled demo_video, job 12, which was pending",
    ]
    fake.set("queue", "11|COMPLETING|None|n1")
    status.cancel([RUN / "lingen"])
    assert "nothing is queued" in capsys.readouterr().out
    fake.set("queue", "")
    assert [row["state"] for row in status.rows_of([RUN / "lingen"])[str(RUN / "lingen")]] == ["cancelled"] * 2


@pytest.mark.parametrize("name", ["", ".", "..", "a/../..", "/"])
def test_a_name_that_would_be_all_runs(fake: Any, words: Any, name: str) -> None:
    launch(words.plan())
    with pytest.raises(UserError, match="must be the name that was launched"):
        status.find_runs("runs", name)
