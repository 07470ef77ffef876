from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lingen import lease
from lingen.errors import UserError
from lingen.lease import LEASE, Lease, myself, read

# Takes leases as it is told: 'FOLDER WHEN', with WHEN on the clock that all processes share.
STARTER = """
import sys, time
from pathlib import Path
from lingen import lease
from lingen.errors import UserError

lease.BEAT_S, lease.EXPIRY_S = 0.05, 0.1
print("ready", flush=True)
for line in sys.stdin:
    folder, when = line.split()
    while time.monotonic() < float(when):
        pass
    try:
        held = lease.Lease.take(Path(folder))
    except UserError:
        print("refused", flush=True)
        continue
    print("won", flush=True)
    sys.stdin.readline()
    held.check()
    held.release()
    print("released", flush=True)
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats that a test can wait for; no job of the machine's own Slurm."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRY_S", 0.4)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def starter() -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that takes leases as it is told."""
    processes = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).resolve().parents[3],
        )
        processes.append(process)
        assert answer(process) == "ready"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write(path: Path, **changes: Any) -> dict[str, Any]:
    """A lease like ours would be, but for ``changes``."""
    content = myself().model_dump() | changes
    path.write_text(json.dumps(content))
    return content


def nothing(path: Path) -> None:
    """A folder without a lease."""


def ended(path: Path) -> None:
    write(path, started="1")  # the id is a living process's, but another one had it


def silent(path: Path) -> None:
    write(path, host="far")


def damaged(path: Path) -> None:
    path.write_bytes(b'{"token": \xff')


def ended_on_the_way(path: Path) -> None:
    """A takeover that was killed half-way, and a second one too."""
    first = write(path, started="1")
    second = write(path.with_name(f".lease-{first['token']}.next"), started="1")
    write(path.with_name(f".lease-{second['token']}.next"), started="1")


@pytest.mark.parametrize(
    ("before", "rounds"), [(nothing, 40), (ended, 40), (ended_on_the_way, 30), (silent, 6), (damaged, 3)]
)
def test_of_several_starters_one_wins(
    before: Callable[[Path], None], rounds: int, tmp_path: Path, starter: Callable[[], subprocess.Popen[str]]
) -> None:
    starters = [starter() for _ in range(3)]
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        before(folder / LEASE)
        when = time.monotonic() + 0.003
        for process in starters:
            tell(process, f"{folder} {when}")
        answers = [answer(process) for process in starters]
        assert sorted(answers) == ["refused", "refused", "won"], f"round {number}"
        winner = starters[answers.index("won")]
        assert [p.name for p in folder.iterdir()] == [LEASE]
        held = read(folder / LEASE)
        assert held is not None and held.holder is not None and held.holder.pid == winner.pid
        tell(winner, "release")
        assert answer(winner) == "released" and not list(folder.iterdir())


def test_a_living_holder_refuses_at_once_and_a_killed_one_is_succeeded_at_once(
    tmp_path: Path,
    starter: Callable[[], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_S", 60.0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    holder = starter()
    tell(holder, f"{tmp_path} 0")
    assert answer(holder) == "won"
    named = rf"^{tmp_path} is written by \S+ pid {holder.pid} \(Slurm job 17\), since .* UTC; scancel 17 first"
    began = time.monotonic()
    with pytest.raises(UserError, match=named):
        Lease.take(tmp_path)
    holder.send_signal(signal.SIGSTOP)  # asleep is not dead
    with pytest.raises(UserError, match=named):
        Lease.take(tmp_path)
    holder.kill()
    while lease._state_and_start(holder.pid)[0] != "Z":  # dead, and its parent has not looked yet
        time.sleep(0.01)
    held = Lease.take(tmp_path)
    assert time.monotonic() - began < 10
    held.check()
    held.release()
    assert f"going on after {os.uname().nodename} pid {holder.pid}" in capsys.readouterr().err


@pytest.mark.parametrize("first", [{"host": "far"}, {"boot": "other"}, {"namespace": "pid:[1]"}, None])
def test_of_another_machine_the_beat_decides(
    first: dict[str, str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, stop = tmp_path / LEASE, threading.Event()

    def put(beat: int) -> None:  # None: a holder whose file cannot be read
        if first is None:
            path.write_bytes(b"\xff%d" % beat)
        else:
            path.write_text(json.dumps(content | {"beat": str(beat)}))

    content = myself().model_dump() | (first or {})
    put(0)

    def beat() -> None:
        number = 0
        while not stop.wait(0.1):
            number += 1
            put(number)

    far = threading.Thread(target=beat)
    far.start()
    try:
        with pytest.raises(UserError, match=r"is written by .*; end that process first, or choose another name"):
            Lease.take(tmp_path)
    finally:
        stop.set()
        far.join()
    began = time.monotonic()
    held = Lease.take(tmp_path)
    assert time.monotonic() - began > lease.EXPIRY_S
    held.check()
    held.release()
    said = capsys.readouterr().err
    assert "waiting for 0.4 s to see whether it is alive" in said and "has shown no life for 0.4 s" in said
    assert ("far" in said) == (first == {"host": "far"}) and ("a holder unknown" in said) == (first is None)


def test_a_holder_that_lets_go_while_it_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRY_S", 20.0)
    silent(tmp_path / LEASE)
    threading.Timer(0.1, (tmp_path / LEASE).unlink).start()
    began = time.monotonic()
    Lease.take(tmp_path).release()
    assert time.monotonic() - began < lease.EXPIRY_S


def test_a_file_system_that_hangs_is_no_sign_of_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, looks = write(tmp_path / LEASE, host="far"), iter(range(99))

    def read_late(asked: Path) -> lease.Found | None:
        found = read(asked)
        if next(looks) == 2:  # the first at its beat, after two at the chain; the holder hangs as long, and goes on
            time.sleep(1.5 * lease.EXPIRY_S)
            write(tmp_path / LEASE, **(there | {"beat": "1"}))
        return found

    monkeypatch.setattr(lease, "read", read_late)
    with pytest.raises(UserError, match="is written by far"):
        Lease.take(tmp_path)


@pytest.mark.parametrize(
    ("job", "restart", "at_once"), [("17", 0, True), ("17", 1, False), ("17", 2, False), ("16", 0, False)]
)
def test_a_requeued_job_succeeds_itself(
    job: str,
    restart: int,
    at_once: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write(tmp_path / LEASE, host="far", job=job, restart=restart)
    Lease.take(tmp_path).release()
    said = capsys.readouterr().err
    assert ("which has ended" in said) == at_once and ("waiting for" in said) != at_once


def test_a_requeued_job_waits_for_what_is_left_of_itself(
    tmp_path: Path, starter: Callable[[], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that Slurm gave up may still run the last of its processes."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    holder = starter()
    tell(holder, f"{tmp_path} 0")
    assert answer(holder) == "won"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UserError, match=rf"is written by \S+ pid {holder.pid} \(Slurm job 17\)"):
        Lease.take(tmp_path)
    monkeypatch.setattr(lease, "EXPIRY_S", 60.0)
    threading.Timer(0.2, holder.kill).start()
    Lease.take(tmp_path).release()


def test_a_lost_lease_is_found_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / LEASE
    held = Lease.take(tmp_path)
    held.check()
    aside = path.with_name("other")
    other = write(aside, host="far", pid=7)
    aside.replace(path)
    time.sleep(3 * lease.BEAT_S)  # our beats do not touch it
    with pytest.raises(UserError, match="lost the lease to far pid 7"):
        held.check()
    held.release()
    assert json.loads(path.read_text()) == other
    path.unlink()
    held = Lease.take(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"lost the lease to nobody: .* is gone"):
        held.check()
    held.release()


def beats(path: Path, count: int) -> bool:
    """Whether ``count`` beats come; each file that is read on the way is whole."""
    seen, until = set(), time.monotonic() + 5
    while len(seen) <= count and time.monotonic() < until:
        there = read(path)
        assert there is not None and there.holder is not None
        seen.add(there.holder.beat)
    return len(seen) > count


def test_a_full_disk_does_not_lose_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full, pwrite, tried = threading.Event(), os.pwrite, []

    def write_or_fail(descriptor: int, content: bytes, offset: int) -> int:
        if not full.is_set():
            return pwrite(descriptor, content, offset)
        tried.append(content)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", write_or_fail)
    held = Lease.take(tmp_path)
    assert beats(tmp_path / LEASE, 3)
    full.set()
    while len(tried) < 3:
        time.sleep(0.01)
    held.check()
    full.clear()
    assert beats(tmp_path / LEASE, 2)
    held.release()
    assert capsys.readouterr().err.count("cannot be renewed: No space left on device; trying on") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_beats_that_ended_are_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Lease.take(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    while held._thread.is_alive():
        time.sleep(0.01)
    with pytest.raises(UserError, match="the thread that renews the lease has died"):
        held.check()
    monkeypatch.undo()
    held.release()


def test_a_folder_that_cannot_hold_a_lease_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / LEASE).symlink_to("nowhere")
    for folder, why in ((tmp_path / "file" / "run", "Not a directory"), (tmp_path, "lease.json is a link that leads")):
        with pytest.raises(UserError, match=rf"{folder} cannot hold a lease: {why}.*; name a folder that can"):
            Lease.take(folder)

    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match=r"run cannot hold a lease: Operation not permitted"):
        Lease.take(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
