"""Where the records of a run go: metrics.jsonl always, W&B and the console where they are asked for.

A record is a dict with its ``kind`` ("train", "validation", "transfer", "refused", "rollback"), its stage, and the axes
step, samples, tokens, flops and hours, which run on across stages. metrics.jsonl is the truth; the other sinks read the
same records.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lingen.errors import UserError
from lingen.files import rename, sync
from lingen.operation_config import LoggerConfig
from lingen.sinks import ConsoleLog, WandbLog

Record = dict[str, Any]


class Metrics:
    """All sinks of a run behind one ``log``. On ranks other than 0 it does nothing.

    ``resume_step`` is the step that this start goes on from (0: from nothing): records of later steps are dropped,
    since they will be made again. ``total_samples`` is where the samples axis ends.

    Raises:
        UserError: the run folder cannot be written, or a line of metrics.jsonl amid the others is not a record.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggerConfig,
        *,
        run_name: str,
        run_config: dict[str, Any],
        rank: int,
        resume_step: int,
        anew: str | None = None,
        total_samples: int,
    ) -> None:
        self._file: JsonLog | None = None
        self._others: list[ConsoleLog | WandbLog] = []
        if rank:
            return
        self._file = JsonLog(run_dir / "metrics.jsonl", resume_step, anew)
        if config.wandb != "disabled":
            self._others.append(WandbLog(run_dir, config, run_name, run_config))
        if config.console:  # last: its bar would be torn by what W&B prints at its start
            self._others.append(ConsoleLog(total_samples))

    def log(self, record: Record) -> None:
        """Write one record to every sink; a validation or transfer that is there already is left out.

        Non-finite numbers become null in metrics.jsonl.
        """
        if self._file is not None and self._file.append(record):
            for sink in self._others:
                sink.write(record)

    def has(self, kind: str, step: int, stage: str, at: str) -> bool:
        """Whether such a record was there at the start or was logged since; False on all ranks but 0."""
        return self._file is not None and self._file.has((kind, step, stage, at))

    def rewind(self, step: int) -> None:
        """Forget the records after ``step``, which will be made anew. W&B cannot, and draws them twice."""
        if self._file is not None:
            self._file.rewind(step)

    def sync(self) -> None:
        """Force metrics.jsonl to the disk; called with each checkpoint, so that it never lacks a checkpointed step."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Finish every sink; restores the terminal."""
        for sink in self._others:
            sink.close()
        self._others = []
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics.jsonl in order; a half-written last line is left out (the run may be going on).

    Raises:
        UserError: the file is missing, or a line before the last is not a record.
    """
    return [record for _, record in _complete_lines(Path(path))]


def _complete_lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; a run writes it with its first record")
    with path.open("rb") as lines:
        broken = 0
        for number, line in enumerate(lines, 1):
            if broken:
                raise UserError(f"{path}, line {broken} is not a metrics record; repair it, or move the file away")
            record = _parse(line)
            if record is None:
                broken = number  # forgiven where no line follows
            else:
                yield line, record


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = line.endswith(b"\n") and isinstance(record, dict) and "kind" in record and "step" in record
    return record if is_record else None


class JsonLog:
    """metrics.jsonl: one JSON object a line, flushed with each record."""

    def __init__(self, path: Path, resume_step: int, anew: str | None) -> None:
        self._path = path
        self._open(resume_step, anew)

    def _open(self, resume_step: int, anew: str | None) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._seen = _rewind(self._path, resume_step, anew)
            self._file = self._path.open("ab", buffering=0)  # nothing is left to be flushed where the disk is full
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror}); set runs_dir to a folder that can"
            ) from error

    def rewind(self, step: int) -> None:
        self._file.close()
        self._open(step, None)

    def append(self, record: Record) -> bool:
        """Write the record. False where it is there already; only training records come once by themselves."""
        if record["kind"] != "train":
            if _identity(record) in self._seen:
                return False
            self._seen.add(_identity(record))
        line = _encode(record)
        with self._told():
            if self._file.write(line) < len(line):  # the next start drops the half line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True

    def has(self, identity: tuple[Any, ...]) -> bool:
        return identity in self._seen

    def sync(self) -> None:
        with self._told():
            os.fsync(self._file.fileno())

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror}); checkpoints are whole: mend it, then run again"
            ) from error

    def close(self) -> None:
        self._file.close()


def _rewind(path: Path, resume_step: int, anew: str | None) -> set[tuple[Any, ...]]:
    """Drop the records after ``resume_step``, those of the stage that begins ``anew`` (an earlier start of it died
    before its first checkpoint), and a half-written last line. Returns what was seen besides training."""
    if not path.exists():
        return set()
    seen = set()
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as kept:
        for line, record in _complete_lines(path):
            if record["step"] <= resume_step and (anew is None or record.get("stage") != anew):
                kept.write(line)
                if record["kind"] != "train":
                    seen.add(_identity(record))
        sync(kept)
    rename(aside, path)
    return seen


def _identity(record: Record) -> tuple[Any, ...]:
    return record["kind"], record["step"], record.get("stage"), record.get("at")


def _encode(record: Record) -> bytes:
    try:
        line = json.dumps(record, allow_nan=False)
    except ValueError:  # JSON has no NaN
        line = json.dumps(_with_null(record), allow_nan=False)
    return line.encode() + b"\n"


def _with_null(value: Any) -> Any:
    """``value`` with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _with_null(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
