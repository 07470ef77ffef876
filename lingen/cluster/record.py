"""What a chain leaves in its run's folder, read and written without torch: RUN/chain/{chain.json,STAGE.json,...}.

chain.json says what was submitted, STAGE.json how the attempts of a stage's job went.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lingen.errors import UserError
from lingen.files import write_file

TAIL = 2**20  # bytes of metrics.jsonl that are searched for a stage's last record


@dataclass
class StageRecord:
    """How the job of a stage goes. Written at the beginning and the end of each attempt."""

    stage: str
    job: int
    state: str = "running"  # then requeued, finished, stopped or cancelled
    reason: str | None = None  # of a stop
    code: int | None = None  # the last one of srun
    requeues: int = 0
    failures: int = 0  # attempts in a row that ended badly without a new checkpoint
    preemptions: int = 0  # attempts in a row that were ended from outside without one
    step: int = 0  # of the run's newest checkpoint
    loss: float | None = None  # of the stage's last training record
    nodes: str = ""
    began: str = ""
    ended: str | None = None


@dataclass
class SubmittedStage:
    """One job of a chain."""

    stage: str
    job: int
    submitted: str
    cancelled: bool = False


@dataclass
class ChainRecord:
    """One chain: a run's stages in order."""

    name: str
    model: str
    words: list[str]  # of train.py, without until=
    cluster: dict[str, Any]
    folder: str  # where the words' relative paths begin
    stages: list[SubmittedStage] = field(default_factory=list)


def chain_folder(run: Path) -> Path:
    """RUN/chain."""
    return run / "chain"


def read_chain(run: Path) -> ChainRecord | None:
    """The chain of a run folder, or None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = chain_folder(run) / "chain.json"
    tree = _read(path)
    if tree is None:
        return None
    try:
        chain = ChainRecord(**tree)
        chain.stages = [SubmittedStage(**stage) for stage in tree["stages"]]
        if not all(isinstance(stage.stage, str) and isinstance(stage.job, int) for stage in chain.stages):
            raise TypeError("a stage's name or job is none")
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is no record of a chain: {error}; move it away to launch anew") from error
    return chain


def write_chain(run: Path, chain: ChainRecord) -> None:
    """Aside, then renamed."""
    _write(chain_folder(run) / "chain.json", asdict(chain))


def read_stage(run: Path, stage: str, job: int | None = None) -> StageRecord | None:
    """How a stage's job went; None where nothing was written yet, or only about another job than ``job``."""
    path = chain_folder(run) / f"{stage}.json"
    tree = _read(path)
    if tree is None:
        return None
    if tree.keys() != {f.name for f in fields(StageRecord)}:
        raise UserError(f"{path} is no record of a stage's job; move it away")
    record = StageRecord(**tree)
    return record if job in (None, record.job) else None


def write_stage(run: Path, record: StageRecord) -> None:
    """Aside, then renamed."""
    _write(chain_folder(run) / f"{record.stage}.json", asdict(record))


def newest_step(run: Path) -> int:
    """The step of the run's newest checkpoint; 0 without one. What is visible is complete."""
    steps = [step for folder in (run / "checkpoints").glob("*") for step, _ in _checkpoints(folder)]
    return max(steps, default=0)


def newest_of_stage(run: Path, stage: str) -> tuple[int, bool] | None:
    """(step, whether the stage ended there) of its newest checkpoint, or None."""
    found = _checkpoints(run / "checkpoints" / stage)
    if not found:
        return None
    step, manifest = max(found)
    return step, bool((_read(manifest) or {}).get("final"))


def _checkpoints(stage_dir: Path) -> list[tuple[int, Path]]:
    manifests = stage_dir.glob("step_*/manifest.json")
    return [(int(m.parent.name.removeprefix("step_")), m) for m in manifests if m.parent.name[5:].isdigit()]


def last_record(run: Path, stage: str) -> dict[str, Any] | None:
    """The last training record of a stage, from the end of metrics.jsonl; None where it is not there."""
    try:
        with (run / "metrics.jsonl").open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - TAIL))
            lines = stream.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if b'"train"' not in line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue  # being written, or cut by the window
        if isinstance(record, dict) and record.get("kind") == "train" and record.get("stage") == stage:
            return record
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no JSON object")
    return tree


def _write(path: Path, tree: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(tree, indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
