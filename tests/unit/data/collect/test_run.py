"""A run of make_shards: the same whatever the workers, whole whenever it is stopped, and it goes on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import data.collect.run
from data.collect.entries import Entry
from data.collect.examine import Outcome, examine
from data.collect.journal import Journal
from data.collect.words import Words
from data.encode import encode_mp4
from data.shards import load_index, read_member
from data.writer import ShardWriter
from lingen.errors import UserError
from tests.unit.data.collect.conftest import Make, content, moving, rejected

ROOT = Path(__file__).parents[4]


def crash_at_three(words: Words, root: str, entry: Entry) -> Outcome:
    if entry.name == "clip-03.mp4":
        os.kill(os.getpid(), signal.SIGABRT)
    return examine(words, root, entry)


def stop_at_eight(words: Words, root: str, entry: Entry) -> Outcome:
    if entry.name == "clip-08.mp4":
        time.sleep(60)
    return examine(words, root, entry)


def spoil(folder: Path) -> None:
    for name, media in {"clip-01": b"", "clip-05": b"words", "clip-11": b""}.items():
        (folder / f"{name}.mp4").write_bytes(media)


def test_the_result_does_not_depend_on_the_workers(folder: Path, make: Make) -> None:
    spoil(folder)
    words = {"samples_per_shard": 4, "max_bad_share": 0.5, "window_seconds": 0.5}
    one, three = make(folder, "one", **words), make(folder, "three", workers=3, **words)
    assert content(one) == content(three) and len(list(one.glob("*.tar"))) == 5
    assert [path for path, reason in rejected(one) if reason != "too short"] == [
        "clip-01.mp4",
        "clip-05.mp4",
        "clip-11.mp4",
    ]


def test_a_decoder_that_crashes_costs_one_file(folder: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.collect.run, "examine", crash_at_three)
    out = make(folder, workers=2, max_bad_share=0.2)
    assert rejected(out) == [("clip-03.mp4", "decoder crashed")]
    assert json.loads((out / "rejected.jsonl").read_text())["detail"] == "SIGABRT"
    assert [key[-2:] for key in load_index(out).key] == [f"{n:02d}" for n in range(12) if n != 3]


def test_names_that_are_no_text(folder: Path, make: Make) -> None:
    (folder / "bad\udcff.mp4").write_bytes((folder / "clip-00.mp4").read_bytes())
    (folder / "bad\udcff.txt").write_text("words")
    lines = [{"path": "half\ud800.mp4", "caption": "words"}, {"path": "clip-00.mp4", "caption": "good"}]
    (folder.parent / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert rejected(make(folder, max_bad_share=0.1)) == [("bad\\udcff.mp4", "bad path")]
    out = make(folder, "named", manifest=str(folder.parent / "rows.jsonl"))
    assert len(rejected(out)) == 1 and load_index(out).key == ["clip-00"]
    assert "bad\\udcff" in (folder.parent / "out" / "report.html").read_text()


def test_a_bad_video_in_many_windows_is_one_bad_sample(folder: Path, make: Make) -> None:
    (folder / "clip-00.mov").write_bytes((folder / "clip-00.mp4").read_bytes())
    out = make(folder, window_seconds=0.25, max_bad_share=0.1)
    assert [reason for _, reason in rejected(out) if reason != "too short"] == ["duplicate key"] * 4
    assert [step["bad"] for step in steps(out)] == [1]


def die(where: str, left: int, words: Words) -> None:
    """Collect, and be killed by the ``left``-th call of a function: before it, or just behind it."""
    owners = {"_take": data.collect.run._Run, "close": ShardWriter, "add": Journal}
    real = getattr(owners[where], where)

    def deadly(*given: object) -> object:
        nonlocal left
        left -= 1
        if left == 0 and where == "_take":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*given)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owners[where], where, deadly)
    data.collect.run.ordered = lambda task, items, **_: (task(item) for item in items)  # type: ignore[assignment]
    data.collect.run.collect(words)


def test_killed_at_any_moment_it_goes_on_to_the_same_end(folder: Path, tmp_path: Path, make: Make) -> None:
    spoil(folder)
    words = {"samples_per_shard": 2, "max_bad_share": 0.5}
    expected = content(make(folder, "whole", **words))
    out = tmp_path / "killed"
    given = Words.model_validate({"input": str(folder), "output": str(out), "workers": 1, **words})
    written: dict[str, tuple[int, bytes]] = {}
    # between a shard's name and the journal's line; inside a shard; behind the journal's line; behind the last one
    for where, left in (("close", 1), ("_take", 4), ("close", 1), ("add", 1), ("close", 2), ("add", 2)):
        process = multiprocessing.get_context("fork").Process(target=die, args=(where, left, given))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        told = [shard["name"] for step in steps(out) for shard in step["shards"]]
        assert set(written) <= set(told)
        written |= {n: ((out / n).stat().st_mtime_ns, (out / n).read_bytes()) for n in told if n not in written}
    assert len(written) == 5 and not (out / "index.json").exists()
    assert content(make(folder, "killed", **words)) == expected
    for name, (written_at, whole) in written.items():
        assert ((out / name).stat().st_mtime_ns, (out / name).read_bytes()) == (written_at, whole)
    assert not list(out.glob("*.tmp")) and not (out / "index.partial.json").exists()


def steps(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()[1:]]


def test_half_a_line_of_the_journal_counts_for_nothing(folder: Path, make: Make) -> None:
    out = make(folder, samples_per_shard=5)
    before, journal = content(out), out / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + lines[2][: len(lines[2]) // 2])
    (out / "index.json").unlink()
    assert content(make(folder, samples_per_shard=5)) == before
    assert journal.read_bytes().splitlines(keepends=True) == lines


def test_workers_end_with_who_gave_them_work(folder: Path, tmp_path: Path, make: Make) -> None:
    program = (
        "import multiprocessing, os, sys, data.collect.run as run\n"
        "from data.collect.words import Words\n"
        "def last(*_):\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "run._Run._take = last\n"
        "run.collect(Words(input=sys.argv[1], output=sys.argv[2], workers=2))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=False,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(pids) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived the run"
        time.sleep(0.05)


def test_ctrl_c_leaves_whole_shards(folder: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(make(folder, "whole", samples_per_shard=3))
    out = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(data.collect.run, "examine", stop_at_eight)
        patched.setattr(data.collect.run._Run, "_refuse_too_many", interrupt_after(8))
        with pytest.raises(KeyboardInterrupt):
            make(folder, "stopped", samples_per_shard=3)
    (out / "index.partial.json").rename(out / "index.json")
    index = load_index(out)
    assert len(index) == 8 and all(read_member(index, n) for n in range(8))
    assert json.loads((out / "report.json").read_text())["samples"] == 8
    (out / "index.json").rename(out / "index.partial.json")
    assert content(make(folder, "stopped", samples_per_shard=3)) == expected


def interrupt_after(left: int):  # type: ignore[no-untyped-def]
    def check(_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    return check


@pytest.mark.parametrize("place", ["data.writer.sync", "data.collect.journal.sync", "data.collect.run.write_file"])
def test_a_full_disk(folder: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The third write of some kind fails: an error, and what was written before is whole."""
    expected = content(make(folder, "whole", samples_per_shard=3))
    module, name = place.rsplit(".", 1)
    real, left = getattr(sys.modules[module], name), 2

    def full(*given: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(place, full)
        with pytest.raises(UserError, match="No space left on device; what was written is whole, and the same command"):
            make(folder, "full", samples_per_shard=3)
    out = tmp_path / "full"
    assert not list(out.glob("*.tmp"))
    whole = {file.name: file.read_bytes() for file in out.glob("*.tar")}
    assert whole and all(expected[name] == shard for name, shard in whole.items())
    if (out / "index.partial.json").exists():
        (out / "index.partial.json").rename(out / "index.json")
        assert len(load_index(out)) == 3 * len(load_index(out).shards)
        (out / "index.json").rename(out / "index.partial.json")
    assert content(make(folder, "full", samples_per_shard=3)) == expected


def test_a_rerun_writes_nothing_and_another_command_is_refused(folder: Path, make: Make) -> None:
    out = make(folder, samples_per_shard=4)
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    make(folder, samples_per_shard=4, workers=2, max_bad_share=0.5)  # these two are free
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    with pytest.raises(UserError, match="was begun with samples_per_shard=4, min_side=16, and not with samples_per_"):
        make(folder, samples_per_shard=5, min_side=32)
    (folder / "clip-99.mp4").write_bytes(encode_mp4(moving(), 8.0))
    with pytest.raises(UserError, match=r"held other files \(added, removed or changed since\)"):
        make(folder, samples_per_shard=4)
    (folder / "clip-99.mp4").unlink()
    (folder / "clip-03.txt").write_text("another caption")
    with pytest.raises(UserError, match="held other files"):
        make(folder, samples_per_shard=4)


def test_a_shard_or_journal_that_was_changed_is_refused(folder: Path, make: Make) -> None:
    out = make(folder, samples_per_shard=4)
    shard = out / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"shard-000001\.tar is not as it was written"):
        make(folder, samples_per_shard=4)
    shard.write_bytes(whole)
    journal = out / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"done":8', '"done":"x"'))
    with pytest.raises(UserError, match=r"journal\.jsonl is damaged"):
        make(folder, samples_per_shard=4)


def test_one_run_at_a_time(folder: Path, make: Make) -> None:
    import fcntl

    out = make(folder)
    with (out / "journal.jsonl").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another run"):
            make(folder)


def test_the_input_is_never_changed(folder: Path, make: Make) -> None:
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    make(folder)
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    for inside in (folder, folder / "below"):
        with pytest.raises(UserError, match=r"lies in input=.*which is never changed"):
            make(folder, str(inside))
    assert len(before) == len(list(folder.iterdir()))


def test_a_file_that_changes_while_it_is_read(folder: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.collect.run, "read_part", lambda *_: b"others")
    with pytest.raises(UserError, match=r"clip-00\.mp4 changed while it was read"):
        make(folder)
