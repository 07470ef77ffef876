"""A chain that ``slurm/launch.py`` submitted to the drills' own Slurm, and what can be done to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cluster import common
from tests.cluster.slurm import Slurm, environ
from tests.conftest import ENVIRONMENT, ROOT

# Two nodes with a rank each. A node takes two such chains beside each other.
CLUSTER = [
    "cluster=cpu",
    "cluster.nodes=2",
    "cluster.cpus_per_task=2",
    "cluster.signal_s=30",
    "cluster.env={OMP_NUM_THREADS: 1, MASTER_ADDR: 127.0.0.1, GLOO_SOCKET_IFNAME: lo}",
]
QUEUED_S = 2.0
ACTIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "SIGNALING",
    "REQUEUED",
    "STAGE_OUT",
    "STOPPED",
)


def command(slurm: Slurm, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS...`` of this repository where Slurm's clients find the cluster."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | slurm.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


class Chain:
    """One run's jobs."""

    def __init__(self, slurm: Slurm, words: list[str], run: Path) -> None:
        self.slurm, self.words, self.run = slurm, words, run
        self._queued_again: dict[str, float] = {}  # a job and its restart, and when it was seen to wait for its turn

    def launch(self) -> str:
        """Submit what is missing. Returns what was printed."""
        done = command(self.slurm, "slurm/launch.py", *self.words, *CLUSTER)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def jobs(self) -> dict[str, int]:
        """Stage -> the number of its job."""
        chain = json.loads((self.run / "chain" / "chain.json").read_text())
        return {stage["stage"]: stage["job"] for stage in chain["stages"]}

    def status(self) -> list[dict[str, Any]]:
        """The rows of ``slurm/launch.py status``."""
        where = [f"name={self.run.name}", f"runs_dir={self.run.parent}"]
        done = command(self.slurm, "slurm/launch.py", "status", *where, "as_json=true")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[str(self.run)]  # type: ignore[no-any-return]

    def state(self, stage: str) -> str:
        """What Slurm says of the stage's job. One that was queued again waits no longer than it must.

        Slurm lets seven seconds pass, so that what is left of the last attempt cannot be taken for the next one. One
        second is enough here, where all is on one machine; in the same second, the next attempt is refused.
        """
        job = self.slurm.job(self.jobs[stage])
        if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
            attempt = f"{job['JobId']}.{job['Restarts']}"
            if time.monotonic() - self._queued_again.setdefault(attempt, time.monotonic()) > QUEUED_S:
                with suppress(RuntimeError):  # it began just now
                    self.slurm.call("scontrol", "update", f"JobId={job['JobId']}", "StartTime=now")
        return job["JobState"]

    def restarts(self, stage: str) -> int:
        """How often the stage's job was queued again."""
        return int(self.slurm.job(self.jobs[stage])["Restarts"])

    def ranks(self, stage: str) -> dict[int, int]:
        """Rank -> process, of a stage that trains now."""
        job, found = f"SLURM_JOB_ID={self.jobs[stage]}", {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if b"train.py" not in path.read_bytes() or path.read_bytes().startswith(b"srun"):
                    continue
                variables = environ(int(path.parent.name))
                place = [word.partition("=")[2] for word in variables if word.startswith("SLURM_PROCID=")]
                if job in variables and place:
                    found[int(place[0])] = int(path.parent.name)
        return found

    def comes(self, stage: str, what: str, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Wait for ``condition``. False where the stage's job came to its end before.

        Raises:
            AssertionError: the job failed, or neither happened.
        """
        until, looked = time.monotonic() + seconds, 0.0
        while not condition():
            if time.monotonic() - looked > 0.3:
                state, looked = self.state(stage), time.monotonic()
                assert state in (*ACTIVE, "COMPLETED"), f"{stage} is {state} before {what}\n{self.log(stage)}"
                if state == "COMPLETED":
                    return condition()
            assert time.monotonic() < until, f"{what}: not within {seconds:g} s\n{self.log(stage)}"
            time.sleep(0.004)
        return True

    def wait(self, stage: str, what: str, condition: Callable[[], bool], seconds: float = 120) -> None:
        """The same for what must come.

        Raises:
            AssertionError: it did not.
        """
        assert self.comes(stage, what, condition, seconds), f"{stage} ended before {what}\n{self.log(stage)}"

    def started(self, stage: str) -> dict[int, int]:
        """Wait until both ranks of the stage are there, seconds before their first step. Returns their processes."""
        self.wait(stage, f"the ranks of {stage}", lambda: len(self.ranks(stage)) == 2)
        return self.ranks(stage)

    def at_step(self, stage: str, step: int) -> dict[int, int]:
        """Wait until the stage has just trained at least so many steps of its own. Returns its ranks' processes.

        Records of an attempt that ended, from beyond its last checkpoint, do not count: the next one drops them.
        """
        ranks, before = self.started(stage), common.version(self.run)
        whole = common.STAGES.index(stage) * common.STEPS + step
        self.wait(
            stage,
            f"step {step} of {stage}",
            lambda: common.step(self.run) >= whole and common.version(self.run) != before,
        )
        return ranks

    def at_save(self, stage: str) -> dict[int, int]:
        """Wait until the stage is amid a save. Returns its ranks' processes."""
        ranks = self.started(stage)
        self.wait(stage, f"a save of {stage}", lambda: common.is_saving(self.run))
        return ranks

    def restarted(self, stage: str, restarts: int) -> None:
        """Wait until the stage's job has been queued again so often, and runs."""
        self.wait(
            stage,
            f"restart {restarts} of {stage}",
            lambda: self.restarts(stage) >= restarts and self.state(stage) == "RUNNING",
        )

    def ended(self, seconds: float = 240) -> dict[str, str]:
        """Wait for all jobs to end. Returns stage -> state."""
        until = time.monotonic() + seconds
        while True:
            states = {stage: self.state(stage) for stage in self.jobs}
            if not set(states.values()) & set(ACTIVE):
                return states
            assert time.monotonic() < until, f"{states}: not within {seconds:g} s"
            time.sleep(0.2)

    def log(self, stage: str) -> str:
        """The end of what the stage's attempts printed."""
        path = self.run / "chain" / f"{stage}.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else "no log"

    def logs(self) -> str:
        """Those of all stages."""
        return "\n".join(f"--- {stage}\n{self.log(stage)}" for stage in common.STAGES)


def preempt(slurm: Slurm) -> int:
    """Submit a job that takes both nodes away from everybody for a moment."""
    words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    return int(slurm.call("sbatch", "--parsable", *words))


def kill(pid: int) -> None:
    """SIGKILL, where it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
