"""Slurm's commands as small shell scripts on a PATH of the test's own, which write down how they were called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lingen import diffusion
from lingen.cluster.checks import PlannedJob, plan_jobs
from lingen.cluster.request import Chain, read_request
from lingen.config import Config
from lingen.memory import Memory, predict

SBATCH = """#!/bin/sh
echo "sbatch $*" >> $FAKE/calls
if [ "$1" = --test-only ]; then
    cat > $FAKE/tested
    test ! -e $FAKE/refusal || { cat $FAKE/refusal >&2; exit 1; }
    exit 0
fi
number=$(($(cat $FAKE/last) + 1))
test $number -le $(cat $FAKE/room) || { echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }
echo $number > $FAKE/last
echo "$number;cluster"
"""
SQUEUE = """#!/bin/sh
test ! -e $FAKE/away || { echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
test "$1" != --me || { cat $FAKE/scripts; exit 0; }
test -s $FAKE/queue || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
cat $FAKE/queue
"""
SINFO = """#!/bin/sh
case "$*" in *--all*--partition*) echo "sinfo: error: Conflicting options, -a and -p" >&2; exit 1 ;; esac
case "$*" in *%P*) printf 'cpu*\\ngpu\\n' ;; *=cpu*) cat $FAKE/cpu_nodes ;; *) cat $FAKE/gpu_nodes ;; esac
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> $FAKE/calls
case "$2" in
    hostnames) printf 'node7\\nnode8\\n' ;;
    config) echo "KillWait                = 5 sec" ;;
    job) test -e $FAKE/away || echo "JobId=5 JobName=x JobState=$(cat $FAKE/state) Dependency=(null)" ;;
esac
test $1 = requeue || exit 0
left=$(cat $FAKE/refusals)
test $left -gt 0 || exit 0
echo $((left - 1)) > $FAKE/refusals
exit 1
"""
SCANCEL = """#!/bin/sh
echo "scancel $*" >> $FAKE/calls
"""
SRUN = """#!/bin/sh
printf '%s\\n' "$@" > $FAKE/srun
env > $FAKE/environment
test ! -e $FAKE/reason || cp $FAKE/reason $LINGEN_REASON
while test -e $FAKE/hold; do /bin/sleep 0.02; done
exit $(cat $FAKE/code)
"""
SLEEP = """#!/bin/sh
echo "$*" >> $FAKE/pauses
if test -e $FAKE/hold && test ! -e $FAKE/hung; then rm $FAKE/hold; /bin/sleep 0.3; fi
"""
COMMANDS = {
    "sbatch": SBATCH,
    "squeue": SQUEUE,
    "sinfo": SINFO,
    "scontrol": SCONTROL,
    "scancel": SCANCEL,
    "srun": SRUN,
    "sleep": SLEEP,
}


@dataclass(frozen=True)
class Fake:
    """The pretended cluster: two nodes without GPUs (cpu, the default partition) and one of eight (gpu)."""

    folder: Path

    def set(self, name: str, text: str | int) -> None:
        """What a command will say."""
        (self.folder / name).write_text(f"{text}\n" if str(text) else "")

    def text(self, name: str) -> str:
        """What a command was given."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    @property
    def calls(self) -> list[str]:
        """The calls of sbatch (without --test-only), scancel and scontrol, in order."""
        return [line for line in self.text("calls").splitlines() if "--test-only" not in line]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Slurm's commands, in an empty folder that is the current one."""
    made, commands = Fake(tmp_path / "fake"), tmp_path / "commands"
    for folder in (made.folder, commands, tmp_path / "here"):
        folder.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    said = {"last": 10, "room": 99, "queue": "", "scripts": "", "code": 0, "refusals": 0}
    made.set("state", "RUNNING Reason=None")
    for name, text in said.items():
        made.set(name, text)
    made.set("cpu_nodes", "n1|4|(null)\nn2|4+|(null)")
    made.set("gpu_nodes", "g1|64|gpu:h100:8(S:0-1),lustre:1")
    monkeypatch.setattr(diffusion, "predict", _remembered)
    monkeypatch.setenv("PATH", os.pathsep.join([str(commands), "/usr/bin", "/bin"]))
    monkeypatch.setenv("FAKE", str(made.folder))
    monkeypatch.chdir(tmp_path / "here")
    return made


_predicted: dict[Any, Memory] = {}


def _remembered(config: Config, grid: Any, **rest: Any) -> Memory:
    """``predict``, which takes longer than all the rest, once for each case."""
    key = (config.model.name, config.engine, grid, str(rest))
    if key not in _predicted:
        _predicted[key] = predict(config, grid, **rest)
    return _predicted[key]


@cache
def _chains(words: tuple[str, ...]) -> list[Chain]:
    return read_request(list(words)).chains


@dataclass(frozen=True)
class Words:
    """The words of a small launch."""

    base: list[str]

    def plan(self, *more: str) -> list[list[PlannedJob]]:
        """As slurm/launch.py plans it: two stages, on the pretended cluster."""
        return plan_jobs(_chains((*self.base, *more)))


@pytest.fixture
def words(world: Any) -> Words:
    """Two stages of the small world on two processes."""
    return Words(["name=a", *world.words, "cluster=cpu", "cluster.nodes=2", "until=demo_video"])
