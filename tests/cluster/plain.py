"""Two ranks as plain processes of this machine, which anyone may kill."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster import common
from tests.cluster.slurm import free_ports
from tests.conftest import ENVIRONMENT, ROOT


class Ranks:
    """One start of a training on ``world`` ranks, joined over loopback."""

    def __init__(self, words: list[str], world: int = 2) -> None:
        (port,) = free_ports(1)
        joint = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the last reference to it
        self.processes = [
            subprocess.Popen(
                [sys.executable, "train.py", *words],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | joint | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(*range(len(self.processes)))
        for process in self.processes:
            process.wait()

    def ended(self) -> bool:
        """Whether one of them has."""
        return any(process.poll() is not None for process in self.processes)

    def run_until(self, run: Path, step: int) -> None:
        """Return once the run's records have come to ``step``, or a rank has ended."""
        common.wait(lambda: self.ended() or common.step(run) >= step, f"step {step} of {run}")

    def wait(self) -> tuple[list[int], str]:
        """(codes, all that was printed) once all have ended; those that a dead rank left behind, by themselves.

        Raises:
            AssertionError: one of them did not.
        """
        common.wait(lambda: all(process.poll() is not None for process in self.processes), "the end of all ranks", 120)
        self._output.seek(0)
        return [process.returncode for process in self.processes], self._output.read()

    def kill(self, *ranks: int) -> None:
        """SIGKILL."""
        for rank in ranks:
            self.processes[rank].send_signal(signal.SIGKILL)


def moment(ranks: Ranks, run: Path, chance: random.Random, *, saving: bool) -> bool:
    """Let some random steps pass, and then come to the next save or some more of a step. Whether all ranks live yet."""
    ranks.run_until(run, common.step(run) + chance.randint(1, common.STEPS))
    if saving:
        common.wait(lambda: ranks.ended() or common.is_saving(run), f"a save of {run}", every=0.0005)
    else:
        time.sleep(chance.uniform(0, 0.03))
    return not ranks.ended()


def victims(chance: random.Random) -> tuple[int, ...]:
    """One rank, the other or both."""
    return chance.choice([(0,), (1,), (0, 1)])
