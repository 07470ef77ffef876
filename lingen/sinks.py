"""What shows the records of a run beside metrics.jsonl: Weights & Biases and the console."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from lingen.operation_config import LoggerConfig
from lingen.runfolder import write_aside

Record = dict[str, Any]
WandbMode = Literal["online", "offline", "disabled"]

AXES = ("step", "samples", "tokens", "flops", "hours")
PLAIN_EVERY_S = 5.0  # between train lines where the console is a file
BAR_EVERY_S = 0.1  # between redraws of the bar where it is a terminal
ETA_RECORDS = 50  # train records that the remaining time is judged from


class WandbLog:
    """Weights & Biases: online where a login is found, else offline; it says once which.

    The run id is kept in the run folder, so a resumed run goes on under it. The steps between the last checkpoint and a
    kill are drawn twice there: W&B cannot take back what it was sent. An offline run cannot go on in its folder, so
    each start makes one of its own with the same id; ``wandb sync`` joins them, since the axes are ours.
    """

    def __init__(self, run_dir: Path, config: LoggerConfig, run_name: str, run_config: dict[str, Any]) -> None:
        import wandb  # half a second that no other user of this module should pay

        mode, why = _mode(wandb) if config.wandb == "auto" else ("offline", "logger.wandb=offline")
        start = {
            "project": config.project,
            "entity": config.entity,
            "name": run_name,
            "id": _run_id(run_dir / "wandb_id"),
            "dir": str(run_dir),
            "config": run_config,
            # No console capture and no git: bars would flood the first, and a remote's address may hold a token.
            "settings": wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, init_timeout=30),
        }
        if mode == "online":
            try:
                self._run = wandb.init(mode=mode, resume="allow", **start)
                why = str(self._run.url)
            except Exception as error:  # not all of W&B's are of one kind
                mode, why = "offline", f"{' '.join(str(error).split())[:160]}"
                wandb.teardown()  # else the run id is taken
        self._alive = True
        if mode != "online":
            try:
                self._run = wandb.init(mode=mode, **start)
            except Exception as error:
                print(f"wandb: off ({' '.join(str(error).split())[:160]}); metrics.jsonl has it all", flush=True)
                self._alive = False
                return
        upload = f"; upload with: wandb sync {run_dir}/wandb/offline-*" if mode == "offline" else ""
        print(f"wandb: {mode} ({why}){upload}", flush=True)
        for axis in AXES:
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="samples")

    def write(self, record: Record) -> None:
        """``train/loss``, ``validation/bucket_loss/17x64x64``, ``validation/bin_loss/0``, ... beside the axes."""
        metrics = {axis: record[axis] for axis in AXES if axis in record}
        for key, value in record.items():
            if key not in (*AXES, "kind", "keys"):  # the samples of a refused step are for metrics.jsonl
                metrics |= _flatten(f"{record['kind']}/{key}", value)
        if self._alive:
            self._attempt(lambda: self._run.log(metrics))

    def close(self) -> None:
        if self._alive:
            self._attempt(self._run.finish)

    def _attempt(self, send: Callable[[], None]) -> None:
        """W&B's trouble ends W&B, not the training: metrics.jsonl has it all."""
        try:
            send()
        except Exception as error:
            self._alive = False
            print(f"wandb: no more records are sent, metrics.jsonl goes on: {error}", flush=True)


def _mode(wandb: Any) -> tuple[WandbMode, str]:
    """(mode, why) for logger.wandb=auto."""
    if os.environ.get("WANDB_MODE") == "offline":
        return "offline", "WANDB_MODE"
    if os.environ.get("WANDB_MODE") == "disabled":
        return "disabled", "WANDB_MODE"
    try:
        if wandb.login(prompt=False, verify=False):
            return "online", ""
    except wandb.Error as error:  # a key of the wrong form
        return "offline", str(error)
    return "offline", "no WANDB_API_KEY and no login"


def _run_id(path: Path) -> str:
    if not path.exists():
        write_aside(path, secrets.token_hex(6))
    return path.read_text().strip()


def _flatten(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {f"{name}/{key}": inner for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return {f"{name}/{i}": inner for i, inner in enumerate(value)}
    return {} if value is None else {name: value}


class ConsoleLog:
    """A bar on a terminal; elsewhere a plain line now and then. Validation and transfers always get their line."""

    def __init__(self, total_samples: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total = total_samples
        self._window: deque[tuple[float, int]] = deque(maxlen=ETA_RECORDS)  # (time, samples) of this stage
        self._stage = ""
        self._shown = -math.inf
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(None), TaskProgressColumn())
            speed = TextColumn("{task.fields[speed]}", markup=False)
            self._bar = Progress(*columns, speed, console=self._console, auto_refresh=False, expand=True)
            self._bar.add_task("", total=total_samples, speed="")
            self._bar.start()

    def write(self, record: Record) -> None:
        if record["kind"] != "train":
            self._line(describe(record))
            return
        now = time.monotonic()
        if record["stage"] != self._stage:
            self._stage = record["stage"]
            self._window.clear()
        self._window.append((now, record["samples"]))
        last = record["samples"] >= self._total
        if last or now - self._shown >= (BAR_EVERY_S if self._bar else PLAIN_EVERY_S):
            self._shown = now
            self._show(record)

    def _show(self, record: Record) -> None:
        wait = record["data_wait_s"] / max(record["data_wait_s"] + record["step_time_s"], 1e-9)
        speed = f"{_human(record['tokens_per_s'])} tok/s, data wait {wait:.0%}, ETA {self._eta()}"
        if self._bar is None:
            share = record["samples"] / max(self._total, 1)
            self._line(f"{describe(record)} | {_human(record['samples'])} samples, {share:.0%} | {speed}")
        else:
            self._bar.update(
                self._bar.task_ids[0],
                description=describe(record),
                completed=record["samples"],
                speed=speed,
                refresh=True,
            )

    def _eta(self) -> str:
        """Time left at this stage's pace; a later stage with longer clips will take more."""
        (t0, first), (t1, now) = self._window[0], self._window[-1]
        if now <= first or t1 <= t0:
            return "-:--"
        seconds = int(max(self._total - now, 0) * (t1 - t0) / (now - first))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(record: Record) -> str:
    """What a person wants to read of a record, in one line without the speed."""
    at = f"step {record['step']} {record['stage']}"
    if record["kind"] == "train":
        loss = f"loss {record['loss']:.4f}, grad {record['grad_norm']:.2f}, lr {record['lr']:.1e}"
        return f"{at} {record['bucket']} | {loss}"
    if record["kind"] == "validation":
        buckets = ", ".join(f"{name} {loss:.4f}" for name, loss in record["bucket_loss"].items())
        if "bucket_psnr" in record:  # of an autoencoder
            more = "PSNR " + ", ".join(f"{name} {value:.2f} dB" for name, value in record["bucket_psnr"].items())
        else:
            more = "by sigma, low to high: " + " ".join(f"{loss:.3f}" for loss in record["bin_loss"])
        return f"{at} | held-out loss {record['loss']:.4f} ({record['at']}); {buckets}; {more}"
    if record["kind"] == "refused":
        return f"{at} | left out: {record['reason']}; its {len(record['keys'])} samples are named in metrics.jsonl"
    if record["kind"] == "rollback":
        return f"{at} | WENT BACK to this checkpoint, past {record['skipped']} samples: {record['reason']}"
    came_from = f"from {record['from']}" if record["from"] else "from the start"
    return f"{at} | begins {came_from}, at {_human(record['samples'])} samples and {_human(record['tokens'])} tokens"


def _human(number: float) -> str:
    """1234567 -> "1.23M"."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or unit == "P":
            break
        number /= 1000
    return f"{number:.3g}{unit}"
