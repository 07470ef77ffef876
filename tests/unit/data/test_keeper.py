"""Decoders that crash, leak, hang or have a bug, and processes that are killed."""

from __future__ import annotations

import errno
import faulthandler
import json
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from data.batch import Batch, Bucket
from data.decode import decode_into
from data.keeper import WorkerError
from data.shards import Index, read_member
from data.workers import PADDING, Hole, Job, decode
from lingen.config import DataConfig
from lingen.errors import UserError
from tests.conftest import ENVIRONMENT, ROOT

MakeConfig = Callable[..., DataConfig]
Decoded = list[tuple[Batch, list[Hole]]]


def make_jobs(index: Index, batch: int = 4) -> list[Job]:
    """All images of the index, each in a batch of its neighbours."""
    rows = np.flatnonzero(index.frames == 1)
    parts = [rows[at : at + batch] for at in range(0, len(rows), batch)]
    return [Job(Bucket(1, 8, 8), 8.0, part, np.zeros(len(part)), np.arange(len(part))) for part in parts]


def alike(one: Decoded, other: Decoded, but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """The same batches in the same order, but for the holes of some keys."""
    assert [batch.keys for batch, _ in one] == [batch.keys for batch, _ in other]
    for (got, _), (wanted, _) in zip(one, other, strict=True):
        for n, key in enumerate(wanted.keys):
            assert bool(got.valid[n]) == (key not in but)
            assert (got.pixels[n] == (128 if key in but else wanted.pixels[n])).all()
            assert got.captions[n] == ("" if key in but else wanted.captions[n])


@pytest.fixture
def reference(index: Index, data_config: MakeConfig) -> Decoded:
    return list(decode(index, data_config(), iter(make_jobs(index))))


def break_decoder(monkeypatch: pytest.MonkeyPatch, index: Index, keys: list[str], harm: Callable[[str], None]) -> None:
    """Have ``harm(key)`` called before these samples are decoded; workers are forks, so they have it too."""
    media = {read_member(index, index.key.index(key)): key for key in keys}

    def decode_or_break(clip: torch.Tensor, some: bytes, **words: Any) -> None:
        if some in media:
            harm(media[some])
        decode_into(clip, some, **words)

    monkeypatch.setattr("data.workers.decode_into", decode_or_break)


def crash(_: str) -> None:
    faulthandler.disable()  # pytest enabled it; the dump would be long
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)  # until it arrives


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_is_a_hole_and_ends_nothing(
    index: Index,
    data_config: MakeConfig,
    reference: Decoded,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    """The first and the last of a batch, two in a row, and a batch of nothing else."""
    bad = [key for n in (0, 3, 6) for key in (reference[n][0].keys if n == 3 else reference[n][0].keys[:2])]
    bad.append(reference[7][0].keys[-1])
    break_decoder(monkeypatch, index, bad, crash)
    done = list(decode(index, data_config(workers=workers), iter(make_jobs(index))))
    alike(done, reference, set(bad))
    holes = [hole for _, found in done for hole in found]
    assert sorted(hole.key for hole in holes) == sorted(bad)
    assert {(hole.reason, hole.detail) for hole in holes} == {("decoder crashed", "SIGSEGV, twice")}
    assert capfd.readouterr().err.count("a data worker died (SIGSEGV)") == len(bad)


def test_a_crash_that_does_not_come_again_is_no_hole(
    index: Index, data_config: MakeConfig, reference: Decoded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crash_once(key: str) -> None:
        if not (tmp_path / key).exists():
            (tmp_path / key).touch()
            crash(key)

    break_decoder(monkeypatch, index, [key for batch, _ in reference[:4] for key in batch.keys], crash_once)
    done = list(decode(index, data_config(workers=2), iter(make_jobs(index))))
    alike(done, reference)
    assert len(list(tmp_path.iterdir())) == 16


def test_a_worker_that_leaks_is_replaced(
    index: Index, data_config: MakeConfig, reference: Decoded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """40 MB a sample: without a limit the last would hold 1.6 GB."""
    leaked = []

    def leak(key: str) -> None:
        # Not from a heap, which may have room that this process inherited.
        leaked.append(mmap.mmap(-1, 40 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        np.frombuffer(leaked[-1], np.uint8)[:] = 1
        (tmp_path / key).write_text(f"{os.getpid()} {len(leaked)}")

    break_decoder(monkeypatch, index, [key for batch, _ in reference for key in batch.keys], leak)
    done = list(decode(index, data_config(workers=1, worker_memory_mb=100), iter(make_jobs(index))))
    alike(done, reference)
    lives = [file.read_text().split() for file in tmp_path.iterdir()]
    assert len(lives) == sum(len(batch.keys) for batch, _ in reference)
    assert max(int(count) for _, count in lives) == 3
    assert len({worker for worker, _ in lives}) == -(-len(lives) // 3)


def test_a_worker_that_is_killed_from_outside_is_replaced(
    index: Index, data_config: MakeConfig, reference: Decoded
) -> None:
    batches = decode(index, data_config(workers=1), iter(make_jobs(index)))
    done = [next(batches)]
    for _ in range(3):
        (keeper,) = multiprocessing.active_children()
        for worker in psutil.Process(keeper.pid).children():
            worker.kill()
        done += [next(batches)]
    alike(done + list(batches), reference)


def test_a_keeper_says_what_it_ended_of(
    index: Index, data_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none_left(_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("data.keeper.recv_handle", none_left)
    with pytest.raises(WorkerError, match="keeps a data worker was killed"):
        next(decode(index, data_config(workers=1), iter(make_jobs(index))))
    assert "Too many open files" in capfd.readouterr().err


def test_a_bug_and_a_wrong_setting_are_raised(
    index: Index, data_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers in (0, 1):
        for error, expected in ((ZeroDivisionError("bug"), WorkerError), (UserError("data.key=1"), UserError)):

            def fail(*_: Any, error: Exception = error, **__: Any) -> None:
                raise error

            monkeypatch.setattr("data.workers.decode_into", fail)
            with pytest.raises(expected, match=str(error)):
                next(decode(index, data_config(workers=workers), iter(make_jobs(index))))
            assert not multiprocessing.active_children()


def test_places_of_padding_are_not_read(index: Index, data_config: MakeConfig) -> None:
    job = make_jobs(index)[0]
    rows = np.array([PADDING, job.rows[0], PADDING, PADDING])
    for workers in (0, 1):
        padded = [Job(job.bucket, 8.0, rows, np.zeros(4), np.arange(4))]
        ((batch, holes),) = decode(index, data_config(workers=workers), iter(padded))
        assert batch.valid.tolist() == [False, True, False, False] and not holes
        assert (batch.pixels[[0, 2, 3]] == 128).all() and not (batch.pixels[1] == 128).all()


def test_a_decoder_that_hangs_does_not_keep_the_loop_from_ending(
    index: Index, data_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, reference: Decoded
) -> None:
    break_decoder(monkeypatch, index, reference[1][0].keys, lambda _: time.sleep(600))
    batches: Any = decode(index, data_config(workers=1), iter(make_jobs(index)))
    next(batches)
    (keeper,) = multiprocessing.active_children()
    workers = psutil.Process(keeper.pid).children()
    began = time.monotonic()
    batches.close()
    assert workers and not psutil.wait_procs(workers, timeout=10)[1]
    assert time.monotonic() - began < 10 and not multiprocessing.active_children()


def test_batches_hold_no_files_open(index: Index, data_config: MakeConfig) -> None:
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    kept = list(decode(index, data_config(workers=2), iter(make_jobs(index, batch=2))))
    assert len(kept) > 10
    # A batch in use lies in a block of its own, which holds two handles.
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_files + 2 * len(kept) + 2
    kept.clear()
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_files + 2


KILLED = """
import json, sys, time
import psutil
from data.pipeline import holdout_batches
from data.shards import load_index
from lingen.config import BucketConfig, DataConfig, StageConfig
index, data = load_index(sys.argv[1]), DataConfig(path=sys.argv[1], workers=2, holdout_share=0.5)
bucket = BucketConfig(frames=1, height=8, width=8, batch_size=2)
stage = StageConfig(name="s", buckets=[bucket], samples=8, lr=1, fps=8)
loaders = [
    holdout_batches(index, stage, bucket, data, limit=16, batch_size=2, rank=0, world=1) for _ in "ab"
]  # the second one's processes inherit what the first one's talk through
for batches in [*loaders, *loaders]:
    next(batches)
print(json.dumps([child.pid for child in psutil.Process().children(recursive=True)]), flush=True)
time.sleep(60)
"""


@pytest.fixture
def training(mixed_shards: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that loads, and all that it started."""
    command, environment = [sys.executable, "-c", KILLED, str(mixed_shards)], os.environ | ENVIRONMENT
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
        process.kill()


def test_nothing_outlives_a_training_that_is_killed(training: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, children = training
    assert len(children) == 8 and all(psutil.pid_exists(child) for child in children)
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and any(map(psutil.pid_exists, children)):
        time.sleep(0.05)
    assert not [child for child in children if psutil.pid_exists(child)]
