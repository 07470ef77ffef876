from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lingen.watchdog import EXIT_HUNG, Watchdog

ROOT = Path(__file__).resolve().parents[3]
HEAD = """
import ctypes, os, sys, threading, time
from pathlib import Path
from lingen import watchdog
from lingen.dist import StopSignal

folder, rank, timeout = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
stop = StopSignal()
watchdog.BACKSTOP_S = 0.3
dog = watchdog.Watchdog(folder, rank, timeout)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start ``code`` beside a watchdog, with its reports in ``tmp_path``/run, which is not there."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def begin(code: str, *, rank: int = 3, timeout_s: float = 0.4, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", HEAD + code, str(tmp_path / "run"), str(rank), str(timeout_s)],
            env=os.environ | environ,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize(
    ("doing", "job"),
    [("while True: time.sleep(0.01)", {}), ("threading.Lock().acquire() and lock.acquire()", {"SLURM_JOB_ID": "17"})],
)
def test_a_hung_rank_says_where_and_ends(doing: str, job: dict[str, str], start: Start, tmp_path: Path) -> None:
    code = f"""
lock = threading.Lock()
lock.acquire()
def wait_for_what_never_comes():
    {doing}
print("ready", flush=True)
dog.beat("step 7 of stage one")
threading.Thread(target=time.sleep, args=(60,), name="loader", daemon=True).start()
try:
    wait_for_what_never_comes()
finally:
    print("a signal was no longer only asked", flush=True)
"""
    process = start(code, **job)
    ready(process)
    process.send_signal(signal.SIGTERM)  # only asks, as without a watchdog
    out, error = process.communicate(timeout=30)
    assert process.returncode == EXIT_HUNG and out == ""
    (path,) = (tmp_path / "run").iterdir()
    number = "17-" if job else ""
    assert re.fullmatch(rf"hang-{number}rank00003-\d{{8}}T\d{{6}}Z\.txt", path.name)
    what = rf"rank 3 \({socket.gethostname()} pid {process.pid}\) has shown no life for \d+\.\d s: step 7 of stage one"
    assert re.fullmatch(rf"{what}; stacks in {path}; exit code 76\n", error)
    text = path.read_text()
    assert re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC: {what}\n\n", text)
    assert "in wait_for_what_never_comes" in text and text.count("hread 0x") >= 3


def test_signs_of_life_keep_it_quiet(start: Start, tmp_path: Path) -> None:
    process = start(
        """
for _ in range(30):
    dog.beat("step")
    time.sleep(0.05)
dog.stop()
time.sleep(1.4)
""",
        timeout_s=1.2,
    )
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error, list(tmp_path.iterdir())) == (0, "", [])


def test_a_process_that_was_stopped_has_the_whole_time_again(start: Start, tmp_path: Path) -> None:
    process = start('dog.beat("step"); print("ready", flush=True); input(); dog.beat("step"); dog.stop()', timeout_s=2)
    ready(process)
    time.sleep(0.7)  # it has looked once since the beat
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)  # longer than the watchdog waits
    process.send_signal(signal.SIGCONT)
    time.sleep(0.7)  # it looks again before the next beat comes
    process.communicate("\n", timeout=30)
    assert (process.returncode, list(tmp_path.iterdir())) == (0, [])


@pytest.mark.parametrize(("job", "code"), [({}, 0), ({"SLURM_JOB_ID": "17"}, 1)])
def test_a_call_that_keeps_the_interpreter(job: dict[str, str], code: int, start: Start, tmp_path: Path) -> None:
    process = start(
        """
def call_c():
    ctypes.PyDLL(None).usleep(2_500_000)
dog.beat("step")
time.sleep(0.2)
call_c()
dog.beat("step")
dog.stop()
""",
        timeout_s=0.8,
        **job,
    )
    _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert error.startswith("Timeout (0:00:01.5") and "in call_c" in error
    assert not list(tmp_path.iterdir())


def test_both_ranks_write_their_stacks(start: Start, tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    code = """
import torch
from lingen.dist import init
dist = init("cpu")
dist.barrier()
dog.stop()
dog = watchdog.Watchdog(folder, rank, 3)
def decode_a_clip():
    time.sleep(60)
if rank == 1:
    decode_a_clip()
dist.any(False)
"""
    environ = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(code, rank=rank, timeout_s=60, RANK=str(rank), LOCAL_RANK=str(rank), **environ) for rank in range(2)]
    for process in ranks:
        process.communicate(timeout=60)
    assert [process.returncode for process in ranks] == [EXIT_HUNG] * 2
    first, second = (path.read_text() for path in sorted((tmp_path / "run").iterdir()))
    assert "in all_reduce" in first and "in decode_a_clip" in second


def test_no_time_no_watch_and_a_beat_costs_nothing(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0, 0.0)
    began = time.process_time()
    for _ in range(100_000):
        dog.beat("step")
    assert time.process_time() - began < 0.5  # 5 microseconds each, by far
    dog.stop()
    assert not dog._thread.is_alive()
