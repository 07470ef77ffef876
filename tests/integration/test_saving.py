"""Saving beside training: processes that end or are killed meanwhile, and two ranks that save together.

This file is also the program of the two ranks (see ``work``): one launch serves all their tests.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen import saver
from lingen.dist import Dist, init
from lingen.errors import UserError
from lingen.saver import Saver
from lingen.shardfiles import Snapshot, write_shard
from tests.tiny import begin, latest, load, make, make_saver, state, train

EXITS = """
import sys, time
from pathlib import Path
from lingen import saver
from tests import tiny
def hang(job):
    time.sleep(1000)
saver.PATIENCE = 0.5
if sys.argv[2] == "hangs":
    saver._Job.go_on = hang
engine, ema = tiny.make()
tiny.begin(tiny.make_saver(), Path(sys.argv[1]), 1, engine, ema)
"""

# Kills itself before the n-th time that something is made to last, renamed, removed or begun, for every n.
KILLED = """
import hashlib, os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lingen import checkpoint, saver, shardfiles
from tests import tiny
stage, step = Path(sys.argv[1]), int(sys.argv[2])
shardfiles.CHUNK = 1000
engine, ema = tiny.make()
tiny.train(engine, ema, 0, 1)
tiny.save(stage, 1, engine, ema)
tiny.train(engine, ema, 1, 2)
tiny.save(stage, 2, engine, ema)
tiny.train(engine, ema, 2, 3)
def dying(function, left):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for n in range(1000):
    child = os.fork()
    if child == 0:
        left = [n]
        for owner, names in (
            (os, "fsync rename replace mkdir"), (hashlib, "file_digest"), (shutil, "rmtree"), (saver._Job, "go_on"),
        ):
            for name in names.split():
                setattr(owner, name, dying(getattr(owner, name), left))
        one = tiny.make_saver()
        tiny.begin(one, stage, step, engine, ema, keep_last=2)
        tiny.train(engine, ema, 3, 4)
        one.finish()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    checkpoint.sweep(stage, tiny.ONE)
    found = tiny.latest(stage)
    print(n, os.WIFSIGNALED(status), found.manifest.step, found.manifest.adam_steps, *sorted(os.listdir(stage)))
    if status == 0:
        break
"""


@pytest.mark.parametrize("disk", ["hangs", "works"])
def test_a_process_that_ends_leaves_no_half(tmp_path: Path, python: Any, disk: str) -> None:
    began = time.monotonic()
    done = python("-c", EXITS, tmp_path, disk)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert time.monotonic() - began < 60
    hidden = [path.name[:8] for path in tmp_path.iterdir()] == [".saving_"]
    assert hidden or (disk == "works" and latest(tmp_path).manifest.step == 1)


@pytest.mark.parametrize("step", [3, 2])
def test_killed_at_any_moment_of_a_save(tmp_path: Path, python: Any, step: int) -> None:
    """Saving a new step, and replacing one: what is found is the old one or the new one, and nothing is left over."""
    done = python("-c", KILLED, tmp_path / "stage", step)
    assert done.returncode == 0, done.stderr
    moments = [line.split() for line in done.stdout.splitlines()]
    assert len(moments) >= 20 and moments[-1][1] == "False" and all(m[1] == "True" for m in moments[:-1])
    assert {tuple(m[2:4]) for m in moments} == {("2", "2"), (str(step), "3")}
    before, after = ["step_00000001", "step_00000002"], ["step_00000002", "step_00000003"]
    allowed = [before, [*before, "step_00000003"], after] if step == 3 else [before]
    assert all(m[4:] in allowed for m in moments)


Write = Callable[[Path, Snapshot, Callable[[], None]], dict[str, Any]]


def heard(action: Callable[[], Any]) -> str:
    """The error that ``action`` ends with."""
    try:
        action()
    except UserError as error:
        return str(error)
    return "nothing"


def timed(seen: list[tuple[float, float]], *, meet: bool) -> Write:
    """Notes when it writes; where they are to ``meet``, not before both ranks are about to."""

    def write(path: Path, snapshot: Snapshot, go_on: Callable[[], None]) -> dict[str, Any]:
        began = time.monotonic()
        (path.parent / f".begun_{path.stem}").touch()
        while meet and len(list(path.parent.glob(".begun_*"))) < 2 and time.monotonic() < began + 30:
            time.sleep(0.01)
        time.sleep(0.1)
        entry = write_shard(path, snapshot, go_on)
        seen.append((began, time.monotonic()))
        return entry

    return write


def failing(dist: Dist) -> Write:
    """Rank 1's disk is full; rank 0 would write for a minute if nobody stopped it."""

    def write(path: Path, snapshot: Snapshot, go_on: Callable[[], None]) -> dict[str, Any]:
        write_shard(path, snapshot, go_on)
        if dist.rank == 1:
            raise OSError("disk full")
        for _ in range(600):
            go_on()
            time.sleep(0.1)
        raise AssertionError("nobody stopped it")

    return write


def work(out: Path) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    dist = init("cpu")
    stage = out / "stage"
    engine, ema = make(dist=dist)
    train(engine, ema, 0, 3)
    found: dict[str, Any] = {"state": dist.gather({key: part.tolist() for key, part in state(engine, ema).items()})}

    for writers in (1, 0):  # in the reductions of steps, as the loop does it
        one, seen = make_saver(dist, writers), []
        saver.write_shard = timed(seen, meet=writers == 0)  # type: ignore[attr-defined]
        begin(one, stage, 3 + (writers == 0), engine, ema)
        shown, steps = None, 0
        while shown is None and steps < 1000:
            votes = torch.tensor(one.votes())
            time.sleep(0.01 * (1 + dist.rank))
            dist.all_reduce_sum(votes)
            shown, steps = one.advance(*votes.tolist()), steps + 1
        found[f"writers {writers}"] = dist.gather({"seen": seen, "shown": str(shown), "steps": steps})

    saver.write_shard = failing(dist)  # type: ignore[attr-defined]
    one = make_saver(dist)
    begin(one, stage, 5, engine, ema)
    found["one fails"] = dist.gather([heard(one.finish), sorted(p.name for p in stage.iterdir()), one.votes()])

    saver.write_shard = write_shard  # type: ignore[attr-defined]

    def lost() -> None:
        raise UserError("the lease is another's")

    one = Saver(dist, writers=0, may_publish=lost)
    begin(one, stage, 6, engine, ema)
    found["lost"] = dist.gather([heard(one.finish), sorted(p.name for p in stage.iterdir())])

    if dist.rank == 1:
        engine.fragments = no_memory  # type: ignore[method-assign]
    found["no memory"] = dist.gather([heard(lambda: begin(one, stage, 7, engine, ema)), one.finish()])
    found["left"] = sorted(p.name for p in stage.iterdir())
    if dist.rank == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.close()


def no_memory() -> Any:
    raise RuntimeError("you tried to allocate 1 TiB")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(Path(__file__).parents[2])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(out)],
            env=os.environ | common | {"PYTHONPATH": root, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    return out / "stage", json.loads((out / "found.json").read_text())


def test_two_ranks_save_what_one_loads(ranks: tuple[Path, dict[str, Any]]) -> None:
    stage, found = ranks
    newest = latest(stage)
    assert (newest.manifest.step, newest.manifest.world_size, len(newest.shards)) == (4, 2, 2)
    engine, ema = make(seed=1)
    load(newest, engine, ema)
    got = state(engine, ema)
    both = [rank.get(key, []) for key in got for rank in found["state"]]
    assert [value for part in both for value in part] == [value for part in got.values() for value in part.tolist()]


def test_only_as_many_ranks_write_as_asked(ranks: tuple[Path, dict[str, Any]]) -> None:
    for writers, step, at_once in ((1, 3, False), (0, 4, True)):
        first, second = ranks[1][f"writers {writers}"]
        assert first["shown"] == second["shown"] == str(ranks[0] / f"step_{step:08d}")
        assert first["steps"] == second["steps"] >= 2  # both saw it in the same one
        (began, ended), (other_began, other_ended) = *first["seen"], *second["seen"]
        assert (began < other_ended and other_began < ended) == at_once


def test_all_ranks_hear_of_the_failure_of_one(ranks: tuple[Path, dict[str, Any]]) -> None:
    _, found = ranks
    end = "; earlier checkpoints are untouched"
    whole = ["step_00000003", "step_00000004"]
    for name, reason in (("one fails", "(rank 1: disk full)"), ("lost", "(rank 0: the lease is another's)")):
        for error, there, *_ in found[name]:
            assert error.endswith(f"could not be written {reason}{end}") and there == whole
    for error, _ in found["no memory"]:
        assert error.endswith(f"step_00000007 could not be written (rank 1: you tried to allocate 1 TiB){end}")
    assert [votes for *_, votes in found["one fails"]] == [[0.0, 0.0]] * 2  # and another save may begin
    assert found["left"] == whole


if __name__ == "__main__":
    work(Path(sys.argv[1]))
