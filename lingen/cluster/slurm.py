"""Slurm's commands, as few of them as will do. Nothing here goes through a shell."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lingen.errors import UserError, nearest

PATIENCE_S = 120  # a busy controller answers late


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm has not done with."""

    job: int
    state: str  # PENDING, RUNNING, COMPLETING, ...
    nodes: str
    reason: str  # why it waits


@dataclass(frozen=True)
class Node:
    """What a node has."""

    name: str
    cpus: int
    gpus: int


def require(*commands: str) -> None:
    """Raises:
    UserError: one of Slurm's commands is not on PATH.
    """
    for command in commands:
        if shutil.which(command) is None:
            raise UserError(
                f"no Slurm on this machine: {command} is not on PATH; use torchrun train.py ... (docs/training.md), or "
                "dry_run=true to see the plan and the scripts"
            )


def submit(script: Path, after: int | None) -> int:
    """Queue a script, to begin once job ``after`` has ended well, and return the job's number."""
    order = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    answer = _run("sbatch", "--parsable", *order, str(script))
    found = re.match(r"(\d+)", answer.strip().splitlines()[-1] if answer.strip() else "")
    if found is None:
        raise UserError(f"sbatch {script} answered '{answer.strip()}', which is no job's number")
    return int(found[1])


def test(script: str) -> None:
    """Raises:
    UserError: Slurm would not take the script, and why.
    """
    try:
        _run("sbatch", "--test-only", text=script)
    except UserError as error:
        # Said of nodes that are down now, too, for which a job may wait. Where it is so for good, submitting says so.
        if "Requested node configuration is not available" not in str(error):
            raise


def queue(jobs: Iterable[int]) -> dict[int, QueuedJob]:
    """Those of ``jobs`` that are queued or running."""
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    try:
        answer = _run("squeue", "--noheader", "--format=%i|%T|%r|%N", f"--jobs={','.join(map(str, wanted))}")
    except UserError as error:
        if "Invalid job id" in str(error):  # Slurm has forgotten all of them
            return {}
        raise
    found = {}
    for line in answer.splitlines():
        number, state, reason, nodes = (part.strip() for part in line.split("|", 3))
        if number.isdigit():
            found[int(number)] = QueuedJob(int(number), state, nodes, "" if reason == "None" else reason)
    return found


def cancel(jobs: Iterable[int]) -> None:
    """End jobs; the last first, so that none begins because the one before it went."""
    wanted = sorted(set(jobs), reverse=True)
    if wanted:
        _run("scancel", *map(str, wanted))


def nodes_of(partition: str | None) -> list[Node]:
    """The nodes of a partition, or of the cluster's default one.

    Raises:
        UserError: there is no such partition, or no default one.
    """
    names = _run("sinfo", "--all", "--noheader", "--format=%P").split()
    known = {name.rstrip("*") for name in names}
    if partition is None:
        default = next((name.rstrip("*") for name in names if name.endswith("*")), None)
        if default is None:
            raise UserError(
                f"cluster.partition is not set, and there is no default one; known: {', '.join(sorted(known))}"
            )
        partition = default
    missing = [name for name in partition.split(",") if name not in known]
    if missing:
        raise UserError(f"cluster.partition={missing[0]} does not exist{nearest(missing[0], known)}")
    answer = _run("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%c|%G")
    nodes = {}
    for line in answer.splitlines():
        name, cpus, gres = line.split("|", 2)
        gpus = sum(int(n) for n in re.findall(r"\bgpu(?::[^:(,]+)?:(\d+)", gres))
        nodes[name] = Node(name, int(re.sub(r"\D.*", "", cpus)), gpus)
    return list(nodes.values())


def _run(*command: str, text: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} did not answer in {PATIENCE_S} s; is the cluster's controller up?") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{' '.join(command[:2])} failed with code {done.returncode}: {said}")
    return done.stdout
