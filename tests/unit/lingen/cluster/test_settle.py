"""What is decided after an attempt, and after those that never came to their end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lingen.cluster.record import StageRecord, newest_step, read_stage
from lingen.cluster.settle import GO_ON, QUEUE_AGAIN, STOP, begin, end, reason_file
from lingen.errors import UserError, run_main

STAGE, JOB = "demo", 5


class Attempts:
    """The attempts of one job, on a run folder with checkpoints that are nothing but manifests."""

    def __init__(self, run: Path) -> None:
        self.run, self.restarts = run, 0

    def checkpoint(self, step: int) -> None:
        folder = self.run / "checkpoints" / STAGE / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"final": False}))

    def begin(self) -> int:
        code = begin(self.run, STAGE, JOB, nodes="n[1-2]", restarts=self.restarts, max_preemptions=3)
        self.restarts += 1
        return code

    def end(self, code: int, job_state: str = "RUNNING None") -> int:
        return end(self.run, STAGE, JOB, code=code, job_state=job_state, max_failures=2, max_preemptions=3)

    @property
    def record(self) -> StageRecord:
        record = read_stage(self.run, STAGE, JOB)
        assert record is not None
        return record


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


def test_a_stage_that_ends_well_is_finished(attempts: Attempts) -> None:
    (attempts.run / "metrics.jsonl").write_text(
        '{"kind": "train", "stage": "demo", "loss": 0.5}\n{"kind": "train", "stage": "next", "loss": 9}\n{"kind": "tr'
    )
    assert attempts.begin() == GO_ON
    assert (attempts.record.state, attempts.record.nodes) == ("running", "n[1-2]")
    assert attempts.end(0) == GO_ON
    assert (attempts.record.state, attempts.record.loss) == ("finished", 0.5)


def test_a_preempted_attempt_is_queued_again(attempts: Attempts) -> None:
    attempts.begin()
    attempts.checkpoint(40)
    assert attempts.end(75) == QUEUE_AGAIN
    attempts.begin()
    assert (attempts.record.requeues, attempts.record.step, attempts.record.preemptions) == (1, 40, 0)


@pytest.mark.parametrize("code", [1, 76, 137, 143])
def test_a_crash_is_tried_again_until_nothing_moves(attempts: Attempts, code: int) -> None:
    attempts.begin()
    assert attempts.end(code) == QUEUE_AGAIN
    attempts.begin()
    attempts.checkpoint(1)  # progress forgives what was before
    assert attempts.end(code) == QUEUE_AGAIN
    attempts.begin()
    assert attempts.end(code) == QUEUE_AGAIN
    attempts.begin()
    assert attempts.end(code) == STOP
    assert attempts.record.reason == (
        f"2 attempts without progress, the last with exit code {code}; see {attempts.run}/chain/demo.log"
    )


def test_preemptions_do_not_count_as_failures_but_are_not_endless(attempts: Attempts) -> None:
    attempts.begin()
    assert attempts.end(1) == QUEUE_AGAIN
    for _ in range(2):
        attempts.begin()
        assert attempts.end(75) == QUEUE_AGAIN
    attempts.begin()
    assert attempts.end(75) == STOP
    assert attempts.record.reason == "3 preemptions in a row without a new checkpoint"


def test_attempts_that_slurm_ended_are_counted_at_the_next_begin(attempts: Attempts) -> None:
    assert [attempts.begin() for _ in range(3)] == [GO_ON] * 3
    attempts.checkpoint(3)
    assert [attempts.begin() for _ in range(3)] == [GO_ON] * 3
    assert attempts.begin() == STOP
    assert attempts.record.state == "stopped"


@pytest.mark.parametrize("code", [2, 137, 1])
def test_a_rank_s_reason_stops_the_chain_whatever_srun_says(attempts: Attempts, code: int) -> None:
    attempts.begin()
    reason_file(attempts.run, STAGE).write_text("data.path=x is gone\n")
    assert attempts.end(code) == STOP
    assert attempts.record.reason == "data.path=x is gone"


def test_a_reason_of_an_earlier_attempt_is_forgotten(attempts: Attempts) -> None:
    reason_file(attempts.run, STAGE).parent.mkdir(parents=True)
    reason_file(attempts.run, STAGE).write_text("old")
    attempts.begin()
    assert attempts.end(137) == QUEUE_AGAIN


def test_bad_input_without_a_reason_stops_too(attempts: Attempts) -> None:
    attempts.begin()
    assert attempts.end(2) == STOP
    assert "exit code 2; see" in (attempts.record.reason or "")


@pytest.mark.parametrize(
    ("job_state", "answer", "state"),
    [
        ("COMPLETING None", STOP, "cancelled"),
        ("CANCELLED None", STOP, "cancelled"),
        ("COMPLETING TimeLimit", QUEUE_AGAIN, "requeued"),
        ("", QUEUE_AGAIN, "requeued"),  # the controller did not answer
    ],
)
def test_a_job_that_slurm_is_ending(attempts: Attempts, job_state: str, answer: int, state: str) -> None:
    attempts.begin()
    assert attempts.end(75, job_state) == answer
    assert attempts.record.state == state


def test_another_job_begins_to_count_anew(attempts: Attempts) -> None:
    attempts.begin()
    attempts.end(1)
    begin(attempts.run, STAGE, JOB + 1, nodes="n1", restarts=0, max_preemptions=3)
    assert read_stage(attempts.run, STAGE, JOB) is None
    record = read_stage(attempts.run, STAGE)
    assert record is not None and (record.failures, record.job) == (0, JOB + 1)


def test_folders_that_are_no_whole_checkpoints_are_no_progress(attempts: Attempts) -> None:
    attempts.checkpoint(5)
    for name in (".step_00000009", "step_00000008", "step_x"):
        (attempts.run / "checkpoints" / STAGE / name).mkdir()
    assert newest_step(attempts.run) == 5


def test_a_record_that_cannot_be_written_stops(attempts: Attempts) -> None:
    (attempts.run / "chain").write_text("in the way")
    with pytest.raises(UserError, match=r"demo\.json"):
        attempts.begin()


def test_settling_needs_no_torch(python: Any) -> None:
    done = python("-X", "importtime", "-m", "lingen.cluster.settle", "--help")
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "lingen" in loaded and not loaded & {"torch", "pydantic", "numpy", "yaml", "hydra"}


def test_an_error_leaves_its_reason_where_the_job_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise UserError("data.path=x\nis gone")

    monkeypatch.setenv("RANK", "1")  # rank 0 may be killed before it comes to it
    monkeypatch.setenv("LINGEN_REASON", str(tmp_path / "reason"))
    with pytest.raises(SystemExit) as left:
        run_main(fails)
    assert left.value.code == 2
    assert (tmp_path / "reason").read_text() == "data.path=x is gone\n"
    assert [path.name for path in tmp_path.iterdir()] == ["reason"]
    monkeypatch.setenv("LINGEN_REASON", str(tmp_path / "no" / "reason"))
    with pytest.raises(SystemExit):
        run_main(fails)
    assert "LINGEN_REASON" in capsys.readouterr().err
