"""The sinks of a run's records: no gap, no duplicate, no torn line, nothing that reads as a secret."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lingen.errors import UserError
from lingen.metrics import Metrics, read_metrics
from lingen.operation_config import LoggerConfig
from lingen.sinks import ConsoleLog


def _train(step: int, *, stage: str = "a", **more: Any) -> dict[str, Any]:
    axes = {"step": step, "samples": 8 * step, "tokens": 512 * step, "flops": 10**9 * step, "hours": step / 3600}
    measured = {"loss": 1 / step, "grad_norm": 0.5, "lr": 1e-3, "step_time_s": 0.3, "data_wait_s": 0.1}
    return {"kind": "train", "stage": stage, **axes, **measured, "tokens_per_s": 12345.0, "bucket": "17x64x64", **more}


def _validation(step: int, *, stage: str = "a", at: str = "interval") -> dict[str, Any]:
    axes = {"step": step, "samples": 8 * step, "tokens": 512 * step, "flops": 10**9 * step, "hours": step / 3600}
    loss = {"loss": 0.5, "bucket_loss": {"1x64x64": 0.4, "17x64x64": 0.6}, "bin_loss": [0.75, 0.25]}
    return {"kind": "validation", "stage": stage, **axes, **loss, "at": at}


def _transfer(step: int, *, stage: str, origin: str | None) -> dict[str, Any]:
    axes = {"step": step, "samples": 8 * step, "tokens": 512 * step, "flops": 10**9 * step, "hours": step / 3600}
    return {"kind": "transfer", "stage": stage, **axes, "from": origin, "checkpoint": None}


def _metrics(
    run: Path, *, resume_step: int = 0, rank: int = 0, console: bool = False, wandb: str = "disabled"
) -> Metrics:
    config = LoggerConfig.model_validate({"console": console, "wandb": wandb})
    return Metrics(
        run,
        config,
        run_name="demo/x",
        run_config={"seed": 1, "model": {"name": "dit"}},
        rank=rank,
        resume_step=resume_step,
        total_samples=800,
    )


def _write(run: Path, records: list[dict[str, Any]], **options: Any) -> None:
    metrics = _metrics(run, **options)
    for record in records:
        metrics.log(record)
    metrics.close()


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = [_transfer(0, stage="a", origin=None), _train(1), _validation(1), _train(2, loss=0.1 + 0.2)]
    _write(tmp_path / "deep" / "run", records)
    assert read_metrics(tmp_path / "deep" / "run" / "metrics.jsonl") == records


def test_each_record_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    metrics = _metrics(tmp_path)
    for step in (1, 2):
        metrics.log(_train(step))
        assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))
    metrics.sync()
    metrics.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = _metrics(tmp_path, rank=1, console=True, wandb="offline")
    metrics.log(_train(1))
    metrics.sync()
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_resume_drops_what_will_be_made_again_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    records = [_transfer(0, stage="a", origin=None), _train(1), _train(2), _validation(2), _train(3), _validation(3)]
    _write(tmp_path, records)
    before = file.read_bytes().splitlines(keepends=True)
    with file.open("ab") as half:
        half.write(b'{"kind": "train", "step": 4, "lo')
    _metrics(tmp_path, resume_step=2).close()
    assert file.read_bytes() == b"".join(before[:4])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]  # nothing is left aside


def test_a_killed_and_resumed_run_has_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    def steps(first: int, last: int) -> list[dict[str, Any]]:
        """What the loop logs; it begins with the transfer and the validation of the step that it starts from."""
        start = [_transfer(first, stage="a", origin=None), _validation(first, at="start")] if first == 0 else []
        return start + [r for s in range(first + 1, last + 1) for r in (_train(s), _validation(s))]

    _write(tmp_path / "whole", steps(0, 6))
    _write(tmp_path / "torn", steps(0, 5))
    _write(tmp_path / "torn", [_validation(3), *steps(3, 4)], resume_step=3)  # the validation at 3 is there already
    _write(tmp_path / "torn", steps(0, 2))  # killed before any checkpoint counted: from nothing
    _write(tmp_path / "torn", steps(2, 6), resume_step=2)
    assert read_metrics(tmp_path / "torn" / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")


def test_validations_of_one_step_differ_by_stage_and_place(tmp_path: Path) -> None:
    end, start = _validation(4, at="end"), _validation(4, stage="b", at="start")
    into_b = _transfer(4, stage="b", origin="a")
    _write(tmp_path, [_train(4), end, into_b, start, into_b, start, end])
    assert read_metrics(tmp_path / "metrics.jsonl") == [_train(4), end, into_b, start]


def test_non_finite_numbers_are_null_and_the_line_is_json(tmp_path: Path) -> None:
    validation = _validation(1) | {"bin_loss": [math.inf, 0.5], "bucket_loss": {"1x64x64": math.nan}}
    _write(tmp_path, [_train(1, loss=math.nan), validation])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    train, held_out = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert train["loss"] is None and train["grad_norm"] == 0.5
    assert held_out["bin_loss"] == [None, 0.5] and held_out["bucket_loss"] == {"1x64x64": None}


def test_reading_forgives_a_half_line_only_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    _write(tmp_path, [_train(1), _train(2)])
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])  # not even its newline came through
    assert [r["step"] for r in read_metrics(file)] == [1]
    file.write_bytes(b"garbage\n" + whole)
    for read in (lambda: read_metrics(file), lambda: _metrics(tmp_path, resume_step=2)):
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 1 is not"):
            read()
    assert file.read_bytes() == b"garbage\n" + whole
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_a_run_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="runs_dir"):
        _metrics(tmp_path / "file" / "run")


def test_a_record_costs_well_under_a_millisecond(tmp_path: Path) -> None:
    metrics = _metrics(tmp_path)
    began = time.process_time()
    for step in range(1, 501):
        metrics.log(_train(step))
    assert (time.process_time() - began) / 500 < 0.5e-3  # measured: 0.006 ms
    metrics.close()


def test_wandb_is_not_imported_before_it_is_used() -> None:
    code = "import sys, lingen.metrics; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class _Clock:
    """A monotonic clock that goes on by ``pace`` seconds a reading."""

    def __init__(self, pace: float) -> None:
        self.now, self.pace = 0.0, pace

    def monotonic(self) -> float:
        self.now += self.pace
        return self.now


def test_plain_console_prints_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = ConsoleLog(800, Console(file=out, width=80))
    monkeypatch.setattr("lingen.sinks.time", _Clock(2.0))  # a step takes two seconds
    for step in range(1, 101):
        console.write(_train(step))
        if step == 50:
            console.write(_validation(50, at="end"))
            console.write(_transfer(50, stage="b", origin="a"))
    console.close()
    lines = out.getvalue().splitlines()
    assert 30 <= len(lines) <= 40  # a train line at most every five seconds, not one a step
    assert "step 1 a 17x64x64 | loss 1.0000" in lines[0] and "ETA -:--" in lines[0]
    assert "12.3k tok/s, data wait 25%" in lines[1] and "ETA 3:12" in lines[1]  # 96 steps of two seconds at step 4
    assert sum("held-out loss 0.5000 (end); 1x64x64 0.4000, 17x64x64 0.6000" in line for line in lines) == 1
    assert sum("step 50 b | begins from a, at 400 samples and 25.6k tokens" in line for line in lines) == 1
    assert "800 samples, 100%" in lines[-1] and "ETA 0:00" in lines[-1]


def test_terminal_console_draws_a_bar_and_restores_the_cursor() -> None:
    out = io.StringIO()
    console = ConsoleLog(800, Console(file=out, width=140, force_terminal=True))
    console.write(_train(1))
    console.write(_validation(1))
    console.write(_train(100))
    console.close()
    text = out.getvalue()
    assert "100%" in text and "held-out loss 0.5000" in text and "ETA" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # shown again after it was hidden


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without W&B login, whatever the one that the test runs on has."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_wandb_goes_offline_without_a_key_and_keeps_its_id(
    tmp_path: Path, no_login: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _write(run, [_train(1), _validation(1), _train(2)], wandb="auto")
    run_id = (run / "wandb_id").read_text()
    _write(run, [_train(2)], wandb="auto", resume_step=1)
    assert (run / "wandb_id").read_text() == run_id
    assert capsys.readouterr().out.count("wandb: offline (no WANDB_API_KEY and no login)") == 2  # once a start
    histories = sorted((run / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(histories) == 2
    sent = histories[0].read_bytes()
    for key in (b"train/loss", b"validation/bucket_loss/17x64x64", b"validation/bin_loss/1", b"samples", b"hours"):
        assert key in sent


def test_wandb_falls_back_when_the_server_is_not_there(
    tmp_path: Path, no_login: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", key)
    init, modes = wandb.init, []

    def unreachable(**options: Any) -> Any:
        modes.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("no such host")
        return init(**options)

    monkeypatch.setattr(wandb, "init", unreachable)
    _write(tmp_path / "run", [_train(1)], wandb="auto")
    assert modes == ["online", "offline"]
    printed = capsys.readouterr()
    assert "wandb: offline (no such host)" in printed.out
    assert key not in printed.out + printed.err
    assert not any(key.encode() in p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())


def test_wandb_breaking_down_does_not_end_the_run(
    tmp_path: Path, no_login: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = _metrics(tmp_path / "run", wandb="offline")
    metrics.log(_train(1))
    import wandb

    def broken(*_: Any) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(type(wandb.run), "log", broken)
    for step in (2, 3):
        metrics.log(_train(step))
    monkeypatch.undo()
    wandb.finish()
    metrics.close()
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert capsys.readouterr().out.count("no more records are sent") == 1


def test_records_are_taken_back_to_a_step_and_go_on(tmp_path: Path) -> None:
    metrics = _metrics(tmp_path)
    for record in (_transfer(0, stage="a", origin=None), _train(1), _validation(1), _train(2), _validation(2)):
        metrics.log(record)
    metrics.rewind(1)
    again = {**_validation(1), "kind": "rollback", "at": "skipped 8"}
    for record in (again, again, _validation(1), _train(2, loss=7.0)):
        metrics.log(record)
    metrics.close()
    kinds = [(r["kind"], r["step"]) for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert kinds == [("transfer", 0), ("train", 1), ("validation", 1), ("rollback", 1), ("train", 2)]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == 7.0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    metrics = _metrics(tmp_path)
    metrics.log(_train(1))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    assert metrics._file is not None
    metrics._file._file = (tmp_path / "metrics.jsonl").open("ab", buffering=0)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(No space left on device\); .*run again"):
        metrics.log(_train(2))
    metrics.close()
