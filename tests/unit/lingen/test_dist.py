from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from lingen.dist import Place, StopSignal, find_place, init
from lingen.errors import UserError


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(5, 8, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, Place(3, 4, 1)),
        # A step may have fewer tasks than its job.
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "4",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_LOCALID": "0",
            },
            Place(1, 2, 0),
        ),
        # The batch script itself is one process, whatever the job's size.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Place(0, 1, 0)),
        # torchrun inside of a Slurm step
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
            Place(1, 2, 1),
        ),
    ],
)
def test_place_is_read_from_the_launcher(environ: dict[str, str], place: Place) -> None:
    assert find_place(environ) == place


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2"),
    ],
)
def test_an_incomplete_launcher_is_refused(environ: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        find_place(environ)


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_only_ask(handlers: None, number: int) -> None:
    stop = StopSignal()
    assert not stop.asked
    os.kill(os.getpid(), number)
    assert stop.asked


@pytest.fixture
def environ() -> Iterator[os._Environ[str]]:
    """The environment, without any launcher's variables; restored afterwards."""
    before = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "MASTER_ADDR", "DS_ACCELERATOR"):
        os.environ.pop(name, None)
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


def test_one_process_needs_no_group(environ: os._Environ[str]) -> None:
    dist = init("cpu")
    tensor = torch.tensor([3.0])
    dist.all_reduce_sum(tensor)
    dist.barrier()
    assert tensor.item() == 3.0
    assert dist.gather({"a": [1, None]}) == [{"a": [1, None]}]
    assert dist.any(True) and not dist.any(False)
    assert environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(environ: os._Environ[str]) -> None:
    with pytest.raises(UserError, match=r"engine\.device=cuda"):
        init("cuda")


def test_several_processes_need_a_meeting_point(environ: os._Environ[str]) -> None:
    environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        init("cpu")


@pytest.mark.parametrize(("module", "loaded"), [("lingen.dist", []), ("lingen.checkpoint", ["torch"])])
def test_slow_imports_are_left_to_those_who_need_them(module: str, loaded: list[str]) -> None:
    """The signal handlers are installed before torch is imported, and DeepSpeed is never imported for plain torch."""
    code = f"import json, sys, {module}; print(json.dumps([m for m in ('torch', 'deepspeed') if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == loaded
