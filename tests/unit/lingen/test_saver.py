"""Saving beside training, in one process."""

from __future__ import annotations

import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen import checkpoint, saver, shardfiles
from lingen.dist import Dist
from lingen.errors import UserError
from lingen.files import sha256
from lingen.manifest import read_manifest
from lingen.saver import Saver
from tests.tiny import ONE, begin, latest, load, make, make_saver, save, state, train


def names(stage: Path) -> list[str]:
    return sorted(path.name for path in stage.iterdir())


def steps(stage: Path) -> list[int]:
    """Of the checkpoints; fails where anything else is there."""
    return [int(name.removeprefix("step_")) for name in names(stage)]


class Gate:
    """Holds the threads that write, before each part of a file, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        go_on = saver._Job.go_on

        def wait(job: saver._Job) -> None:
            self.opened.wait(20)
            go_on(job)

        monkeypatch.setattr(saver._Job, "go_on", wait)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """A write beyond so many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def step_of_training(one: Saver, dist: Dist = ONE) -> Path | None:
    """What the loop does with a save in each step."""
    votes = torch.tensor(one.votes())
    dist.all_reduce_sum(votes)
    return one.advance(*votes.tolist())


def test_what_is_saved_is_what_was_there_at_the_start(tmp_path: Path, gate: Gate) -> None:
    engine, ema = make()
    one = make_saver()
    assert one.votes() == (0.0, 0.0) and one.advance(0, 0) is None and one.finish() is None
    train(engine, ema, 0, 3)
    wanted, progress = state(engine, ema), {"position": {"step": 3}}
    begin(one, tmp_path / "stage", 3, engine, ema, progress=progress)
    progress["position"]["step"] = 99
    losses = train(engine, ema, 3, 6)  # while the thread is held
    assert step_of_training(one) is None and not list((tmp_path / "stage").glob("step_*"))
    gate.opened.set()
    assert one.finish() == tmp_path / "stage" / "step_00000003" and one.finish() is None

    other, other_ema = make(seed=1)
    found = latest(tmp_path / "stage")
    load(found, other, other_ema)
    got = state(other, other_ema)
    assert found.progress == {"position": {"step": 3}} and found.manifest.adam_steps == 3
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert train(other, other_ema, 3, 6) == losses


def test_it_appears_while_training_goes_on(tmp_path: Path) -> None:
    engine, ema = make()
    one = make_saver()
    begin(one, tmp_path, 1, engine, ema)
    deadline, shown = time.monotonic() + 20, None
    while shown is None and time.monotonic() < deadline:
        shown = step_of_training(one)
    assert shown == tmp_path / "step_00000001" and step_of_training(one) is None
    assert steps(tmp_path) == [1]


def test_a_start_finishes_the_one_before_and_forgets_its_votes(tmp_path: Path) -> None:
    engine, ema = make()
    one = make_saver()
    begin(one, tmp_path, 1, engine, ema)
    one.votes()
    begin(one, tmp_path, 2, engine, ema)
    assert (tmp_path / "step_00000001").exists() and not (tmp_path / "step_00000002").exists()
    assert one.advance(1.0, 0.0) is None and one.advance(0.0, 1.0) is None  # those votes were about the first one
    assert one.finish() == tmp_path / "step_00000002"
    assert steps(tmp_path) == [1, 2]


def test_the_copy_is_made_into_the_same_memory(tmp_path: Path) -> None:
    engine, ema = make()
    recorder = shardfiles.Recorder()
    first = recorder.take(engine.fragments(), ema)
    wanted = sum(f.master.numel() for f in engine.fragments()) * 4
    assert first.body.numel() == wanted and first.body.dtype == torch.float32
    assert recorder.take(engine.fragments(), ema).body.data_ptr() == first.body.data_ptr()
    wide, wide_ema = make(width=9)
    assert recorder.take(wide.fragments(), wide_ema).body.numel() > wanted


def test_a_rank_without_fragments_writes_a_file_that_reads(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.safetensors"
    _, ema = make()
    entry = shardfiles.write_shard(path, shardfiles.Recorder().take([], ema), lambda: None)
    assert entry == {"size": path.stat().st_size, "sha256": sha256(path)}
    with shardfiles.ShardReader([path]) as reader:
        assert reader.shapes == {}


def test_pruning_keeps_the_newest_the_kept_and_the_final_ones(tmp_path: Path) -> None:
    engine, ema = make()
    kept = {1: {"final": True}, 3: {"kept": True}}
    for step in range(1, 7):
        folder = save(tmp_path, step, engine, ema, keep_last=2, **kept.get(step, {}))
        assert read_manifest(folder).kept == (step in kept)
    assert steps(tmp_path) == [1, 3, 5, 6]
    (tmp_path / "step_00000006" / "state.json").unlink()
    save(tmp_path, 7, engine, ema, keep_last=2)
    assert steps(tmp_path) == [1, 3, 5, 6, 7]  # a damaged one neither counts as kept nor is removed
    save(tmp_path, 4, engine, ema, keep_last=1)  # gone back to: what is further stays
    assert steps(tmp_path) == [1, 3, 4, 5, 6, 7]


def test_signals_do_not_push_the_regular_ones_out(tmp_path: Path) -> None:
    engine, ema = make()
    for step, regular in ((2, True), (4, True), (5, False), (6, False)):
        save(tmp_path, step, engine, ema, keep_last=1, regular=regular)
    assert steps(tmp_path) == [4, 6]


def test_what_cannot_be_removed_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, ema = make()
    save(tmp_path, 1, engine, ema)
    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", fail)
        save(tmp_path, 2, engine, ema, keep_last=1)
    assert "could not be removed, and takes room: broken" in caplog.text
    assert names(tmp_path) == [".pruned_step_00000001", "step_00000002"]
    rmtree = shutil.rmtree
    with monkeypatch.context() as broken:
        broken.setattr(
            shutil, "rmtree", lambda path, **more: (fail if path.name.endswith("1") else rmtree)(path, **more)
        )
        save(tmp_path, 3, engine, ema, keep_last=1)
    assert names(tmp_path) == [".pruned_step_00000001", "step_00000003"]  # it does not keep others from being removed
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "step_folders", fail)
        save(tmp_path, 4, engine, ema, keep_last=1)
    save(tmp_path, 5, engine, ema, keep_last=1)
    assert steps(tmp_path) == [5]


def test_of_a_checkpoint_that_lies_elsewhere_the_link_is_removed(tmp_path: Path) -> None:
    engine, ema = make()
    stage, elsewhere = tmp_path / "stage", tmp_path / "elsewhere"
    for step in (1, 3):
        save(elsewhere, step, engine, ema)
    stage.mkdir()
    (stage / "step_00000001").symlink_to(elsewhere / "step_00000001")
    save(stage, 2, engine, ema, keep_last=1)
    assert steps(stage) == [2]
    (stage / "step_00000003").symlink_to(elsewhere / "step_00000003")
    checkpoint.discard_after(stage, 2, ONE)
    assert steps(stage) == [2] and steps(elsewhere) == [1, 3] and latest(elsewhere).manifest.step == 3


def fail(*_: Any, ignore_errors: bool = False) -> None:
    if not ignore_errors:
        raise OSError("broken")


def test_saving_a_step_again_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ema = make()
    old = save(tmp_path, 6, engine, ema)
    digest = sha256(old / "manifest.json")
    train(engine, ema, 0, 1)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "rename", fail)
        with pytest.raises(UserError, match="broken"):
            save(tmp_path, 6, engine, ema)
    assert sha256(old / "manifest.json") == digest and steps(tmp_path) == [6]
    save(tmp_path, 6, engine, ema, final=True)
    assert latest(tmp_path).manifest.final and steps(tmp_path) == [6]


def test_sweeping_removes_leftovers_and_mends_a_half_done_replacement(tmp_path: Path) -> None:
    engine, ema = make()
    for step in (4, 6):
        save(tmp_path, step, engine, ema)
    (tmp_path / ".saving_step_00000008_0123abcd").mkdir()
    (tmp_path / ".pruned_step_00000001").mkdir()
    (tmp_path / "step_00000006").rename(tmp_path / ".replaced_step_00000006")
    shutil.copytree(tmp_path / "step_00000004", tmp_path / ".replaced_step_00000004")
    checkpoint.sweep(tmp_path, ONE)
    assert steps(tmp_path) == [4, 6] and latest(tmp_path).manifest.step == 6
    checkpoint.sweep(tmp_path / "nowhere", ONE)


def test_a_lease_that_is_lost_before_the_rename_shows_nothing(tmp_path: Path) -> None:
    engine, ema = make()
    save(tmp_path, 1, engine, ema)

    def lost() -> None:
        raise UserError("the lease is another's")

    one = Saver(ONE, writers=0, may_publish=lost)
    begin(one, tmp_path, 2, engine, ema)
    with pytest.raises(UserError, match=r"step_00000002 could not be written \(rank 0: the lease is another's\); earl"):
        one.finish()
    assert steps(tmp_path) == [1] and one.finish() is None


def test_a_full_disk_leaves_the_older_ones_whole(tmp_path: Path) -> None:
    engine, ema = make()
    save(tmp_path, 6, engine, ema)
    one = make_saver()
    with file_size_limit(1000):
        begin(one, tmp_path, 8, engine, ema)
        with pytest.raises(UserError, match=r"step_00000008 could not be written \(rank 0: .*rank_00000.*\); earlier"):
            one.finish()
    assert steps(tmp_path) == [6] and latest(tmp_path).manifest.step == 6
    begin(one, tmp_path, 9, engine, ema)  # there is room again
    assert one.finish() == tmp_path / "step_00000009"


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        engine, ema = make(width=3000)  # 24,000 weights, 16 bytes each: two fit, the third does not
        for step in (1, 2):
            save(disk, step, engine, ema)
        with pytest.raises(UserError, match="No space left on device"):
            save(disk, 3, engine, ema)
        assert steps(disk) == [1, 2] and latest(disk).manifest.step == 2
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_looked_at_is_an_error_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ema = make()
    monkeypatch.setattr(Path, "exists", fail)
    with pytest.raises(UserError, match=r"step_00000001 could not be written \(rank 0: broken\)"):
        begin(make_saver(), tmp_path / "stage", 1, engine, ema)


def test_a_file_that_reads_back_differently_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ema = make()
    save(tmp_path, 1, engine, ema)
    monkeypatch.setattr(shardfiles, "sha256", lambda path: "another")
    with pytest.raises(UserError, match=r"reads back as something else than was written: '.*rank_00000.safetensors'"):
        save(tmp_path, 2, engine, ema)
    assert steps(tmp_path) == [1]


def test_a_thread_that_dies_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def die(*_: Any) -> None:
        raise SystemExit(3)

    engine, ema = make()
    monkeypatch.setattr(saver, "write_shard", die)
    with pytest.raises(UserError, match=r"rank 0: SystemExit: 3"):
        save(tmp_path, 1, engine, ema)
    assert "Traceback" in caplog.text and steps(tmp_path) == []
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(UserError, match=r"rank 0: can't start new thread"):
        save(tmp_path, 1, engine, ema)


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_closing_gives_up_what_is_under_way(tmp_path: Path, gate: Gate) -> None:
    engine, ema = make()
    one = make_saver()
    begin(one, tmp_path, 1, engine, ema)
    threading.Timer(0.1, gate.opened.set).start()
    one.close()
    assert one.finish() is None and [name[:8] for name in names(tmp_path)] == [".saving_"]
    one.close()


def test_waiting_beats_only_while_the_own_part_gets_on(tmp_path: Path, gate: Gate) -> None:
    engine, ema = make()
    one = make_saver()
    begin(one, tmp_path, 1, engine, ema)
    beats: list[float] = []
    threading.Timer(0.5, gate.opened.set).start()
    one.finish(lambda: beats.append(time.monotonic()))
    assert beats and len([b for b in beats if b < beats[-1] - 0.2]) <= 1
