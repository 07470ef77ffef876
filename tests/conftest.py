"""A small rendered world, its shards and its autoencoder, made once for all tests; and the project's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# One thread a process: tests run beside each other, and a sum has one order.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "TRITON_INTERPRET": "0",
}
# For this process, before torch and Triton are imported. Triton's kernels run in its interpreter, on any machine.
os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1", MAMBA_DETERMINISTIC="1")
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def run_python(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS...`` from the repository's root with the tests' environment, and return what it printed."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def python() -> Command:
    """``run_python``."""
    return run_python


@pytest.fixture(autouse=True)
def _ordinary_priority() -> Iterator[None]:
    """SVT-AV1 makes the thread that encodes a real-time one where it may, and what that starts later inherits it: two
    such threads that spin would take two cores from everybody else."""
    yield
    if hasattr(os, "SCHED_OTHER") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@dataclass(frozen=True)
class World:
    """What a training needs."""

    clips: Path
    shards: Path
    autoencoder: Path

    @property
    def words(self) -> list[str]:
        """The words of a small run on it."""
        return ["debug=smoke", f"data.path={self.shards}", f"autoencoder.path={self.autoencoder}"]


def make_world(folder: Path) -> World:
    """64 clips of 17 frames and 64 images, at 64 x 64 pixels, in shards, with a fitted autoencoder."""
    made = World(folder / "clips", folder / "shards", folder / "autoencoder.safetensors")
    for words in (
        ("-m", "data.synthetic", f"out={made.clips}", "clips=64", "images=64", "size=64", "frames=17", "fps=8"),
        ("scripts/make_shards.py", f"input={made.clips}", f"output={made.shards}", "samples_per_shard=16"),
        ("scripts/fit_autoencoder.py", f"data={made.shards}", f"out={made.autoencoder}"),
    ):
        done = run_python(*words)
        assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """``make_world``, once."""
    return make_world(tmp_path_factory.mktemp("world"))
