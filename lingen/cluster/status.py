"""What a chain is doing, from the queue and from what its jobs wrote down; and its end on demand."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lingen.cluster import slurm
from lingen.cluster.record import (
    ChainRecord,
    SubmittedStage,
    chain_folder,
    last_record,
    newest_of_stage,
    read_chain,
    read_stage,
    write_chain,
)
from lingen.cluster.slurm import QueuedJob
from lingen.errors import UserError


@dataclass(frozen=True)
class StageStatus:
    """A row of the table."""

    stage: str
    job: int
    state: str
    nodes: str
    step: int | None  # of the last training record
    loss: float | None
    checkpoint: int | None  # the step of the stage's newest
    requeues: int
    reason: str  # why it waits, or why it stopped


def find_runs(runs_dir: str, name: str) -> list[Path]:
    """The run folders of ``name`` that hold a chain: itself, or those of its models.

    Raises:
        UserError: there is none, or ``name`` is no run's: an empty one would be all of them.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise UserError(f"name={name}: must be the name that was launched, such as 'demo' or 'demo/lingen'")
    folder = Path(runs_dir).expanduser() / name
    found = [path.parent.parent for path in (folder / "chain" / "chain.json", *folder.glob("*/chain/chain.json"))]
    runs = sorted({run for run in found if (chain_folder(run) / "chain.json").exists()})
    if not runs:
        raise UserError(f"name={name}: there is no chain in {folder}; set runs_dir where it is another than {runs_dir}")
    return runs


def chain_of(run: Path) -> ChainRecord:
    """The chain of a folder that ``find_runs`` found."""
    chain = read_chain(run)
    if chain is None:
        raise UserError(f"{chain_folder(run)} holds no chain any more")
    return chain


def queued_of(chain: ChainRecord) -> dict[int, QueuedJob]:
    """The chain's jobs that are in the queue; none on a machine without Slurm."""
    return slurm.queue(stage.job for stage in chain.stages) if shutil.which("squeue") else {}


def look(run: Path, chain: ChainRecord) -> list[StageStatus]:
    """One row a stage."""
    queued, rows, stopped = queued_of(chain), [], None
    for stage in chain.stages:
        row = _row(run, stage, queued.get(stage.job), stopped)
        rows.append(row)
        if row.state in ("stopped", "cancelled", "gone"):
            stopped = stopped or row.stage
    return rows


def _row(run: Path, stage: SubmittedStage, queued: QueuedJob | None, stopped: str | None) -> StageStatus:
    record = read_stage(run, stage.stage, stage.job)
    newest = newest_of_stage(run, stage.stage)
    trained = last_record(run, stage.stage)
    reason = (record.reason if record else None) or ""
    if queued is not None and not (queued.state == "COMPLETING" and record and record.state != "running"):
        state, reason = queued.state.lower(), reason or queued.reason
    elif newest is not None and newest[1]:
        state = "finished"
    elif stage.cancelled:
        state = "cancelled"
    elif record is not None and record.state in ("stopped", "cancelled", "finished"):
        state = record.state
    elif record is None and stopped is not None:
        state, reason = "cancelled", f"{stopped} before it did not end well"
    else:
        state, reason = "gone", f"ended without a word; see {chain_folder(run) / f'{stage.stage}.log'}"
    return StageStatus(
        stage.stage,
        stage.job,
        state,
        (queued.nodes if queued else "") or (record.nodes if record else ""),
        trained["step"] if trained else (record.step if record else None),
        trained["loss"] if trained else (record.loss if record else None),
        newest[0] if newest else None,
        record.requeues if record else 0,
        reason,
    )


def print_status(runs: list[Path]) -> None:
    """A table a chain on stdout, and below it why stages wait or stopped. It is readable on 80 columns."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if not shutil.which("squeue"):
        console.print("no Slurm here: states are those that were last written down")
    for run in runs:
        chain = chain_of(run)
        rows = look(run, chain)
        console.print(Text.assemble((chain.name, "bold"), f": {chain.model}, {run}"), soft_wrap=True)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for column in ("stage", "job", "state", "nodes", "step", "loss", "saved", "requeues"):
            table.add_column(column, no_wrap=column in ("stage", "job"), overflow="fold")
        for row in rows:
            loss = None if row.loss is None else f"{row.loss:.4f}"
            cells = (row.stage, row.job, row.state, row.nodes, row.step, loss, row.checkpoint, row.requeues)
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))
        console.print(table)
        for row in rows:
            if row.reason:
                console.print(Text(f"  {row.stage}: {row.reason}"), soft_wrap=True)


def rows_of(runs: list[Path]) -> dict[str, list[dict[str, object]]]:
    """The same for programs: run folder -> rows."""
    return {str(run): [asdict(row) for row in look(run, chain_of(run))] for run in runs}


def cancel(runs: list[Path]) -> None:
    """End what is queued or running of each chain, and write it down."""
    slurm.require("squeue", "scancel")
    for run in runs:
        chain = chain_of(run)
        queued = {
            job: there
            for job, there in queued_of(chain).items()
            if there.state != "COMPLETING" or not any(stage.job == job and stage.cancelled for stage in chain.stages)
        }
        ended = [stage for stage in chain.stages if stage.job in queued]
        if not ended:
            print(f"{chain.name}: nothing is queued or running")
            continue
        chain.stages = [replace(stage, cancelled=stage.cancelled or stage.job in queued) for stage in chain.stages]
        write_chain(run, chain)  # before, so that a job which ends in its own time finds it
        slurm.cancel(queued)
        for stage in ended:
            print(
                f"{chain.name}: cancelled {stage.stage}, job {stage.job}, which was {queued[stage.job].state.lower()}"
            )
