"""Shards that are fetched: through a server that drops, stalls and refuses, into a cache of a few of them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data.decode import BadSample
from data.pipeline import StageLoader
from data.remote import Source
from data.shards import Index, LostShard, load_index, read_member
from lingen.config import BucketConfig, DataConfig, StageConfig
from lingen.errors import UserError
from tests.conftest import ENVIRONMENT, ROOT

DOWN = "down"


@dataclass
class Server:
    """Serves a folder on the loopback; each request takes the next of ``troubles``."""

    folder: Path
    ranges: bool = True
    troubles: Iterator[str] = field(default_factory=lambda: itertools.repeat(""))
    asked: list[tuple[str, str]] = field(default_factory=list)  # path, range
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, span = request.path.partition("?")[0], request.headers.get("Range", "")
        self.asked.append((path, span))
        trouble = next(self.troubles)
        file = self.folder / path.lstrip("/")
        if trouble == "drop":
            return
        if trouble == "slow":
            time.sleep(0.05)
        if trouble in ("503", DOWN) or not file.is_file():
            request.send_response(404 if not trouble else 503)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content, begin, end = file.read_bytes(), 0, file.stat().st_size
        if span and self.ranges:
            begin, end = (int(at) for at in span.removeprefix("bytes=").split("-"))
            content = content[begin : end + 1]
        request.send_response(206 if span and self.ranges else 200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        with suppress(BrokenPipeError):  # who asked is gone
            request.wfile.write(content[: len(content) // 2] if trouble == "short" else content)


@pytest.fixture
def server(mixed_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("data.remote.PAUSES", (0.01,) * 6)
    monkeypatch.setattr("data.remote.FIRST_PART", 4096)  # the shards are small
    monkeypatch.setattr("data.remote.SMALLEST_PART", 1024)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    serving = Server(mixed_shards)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.close_connection = True
            serving.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        serving.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        http.shutdown()
        thread.join()


def shelved(index: Index, folder: Path, limit: int = 10**9) -> Index:
    """With another cache."""
    assert index.shelf is not None
    return replace(index, shelf=replace(index.shelf, folder=folder, limit=limit))


def make_config(path: str, cache: Path, **changes: object) -> DataConfig:
    words = {"path": path, "workers": 0, "window_shards": 2, "prefetch": 2, "cache_dir": str(cache), "cache_gb": 0.001}
    return DataConfig.model_validate(words | {"holdout_share": 0.1} | changes)


def steps(index: Index, data: DataConfig, **changes: Any) -> Iterator[list[Any]]:
    stage = StageConfig(
        name="stage",
        buckets=[
            BucketConfig(frames=1, height=8, width=8, batch_size=8, share=2),
            BucketConfig(frames=5, height=8, width=8, batch_size=4, share=1),
        ],
        samples=120,
        lr=1,
        fps=8,
    )
    words = {"seed": 5, "rank": 0, "world": 1, "grad_accumulation": 1} | changes
    return iter(StageLoader(index, stage, data, **words))


def test_a_bad_connection_loses_no_sample(
    server: Server, index: Index, mixed_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch as from the disk, with a cache that holds four of the eleven shards."""
    local = list(steps(index, make_config(str(mixed_shards), tmp_path)))
    largest = max(file.stat().st_size for file in mixed_shards.glob("*.tar"))
    monkeypatch.setattr("data.remote.PAUSES", (0.005,) * 30)  # many processes share the troubles
    for workers, ranges in ((0, True), (2, False)):
        server.ranges = ranges
        server.troubles = itertools.cycle(["", "503", "", "drop", "slow", "short", "", "short", "503", ""])
        data = make_config(server.url, tmp_path / f"{workers}{ranges}", workers=workers, cache_gb=4.4 * largest / 1e9)
        far = load_index(server.url)
        assert far.shelf is not None and far.fingerprint == index.fingerprint and list(far.key) == list(index.key)
        steps_far = steps(far, data)
        for (got,), (wanted,) in zip(steps_far, local, strict=True):
            assert got.keys == wanted.keys and got.lost is None
            assert got.valid.all() and (got.pixels == wanted.pixels).all()
            with far.shelf.moved(data.cache_dir, 1, 1)._lock("folder", wait=True):  # what comes and goes is not counted
                held = sum(file.stat().st_size for file in Path(str(data.cache_dir)).rglob("*.tar*"))
            assert held <= 4.4 * largest
    assert any(span for _, span in server.asked)


def test_what_came_before_a_break_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    index = shelved(load_index(server.url), tmp_path)
    assert index.shelf is not None
    server.troubles, server.asked = itertools.cycle(["", "short"]), []
    index.shelf.open(0).close()
    begins = [int(span.removeprefix("bytes=").split("-")[0]) for _, span in server.asked]
    assert begins == sorted(begins) and len(begins) > 4


def test_a_server_that_stays_down_is_a_lost_shard(server: Server, tmp_path: Path) -> None:
    far = load_index(server.url)
    for workers in (0, 1):
        server.troubles = itertools.chain([""] * 8, itertools.repeat(DOWN))
        data = make_config(server.url, tmp_path / str(workers), workers=workers)
        for rank in range(2):  # what one rank meets stops all
            batches = steps(far, data, rank=rank, world=2)
            lost = next((batch.lost for (batch,) in batches if batch.lost), "")
            assert "the server answered 503" in lost and "shard-0000" in lost
    server.troubles = itertools.repeat("")
    assert not any(batch.lost for (batch,) in steps(far, make_config(server.url, tmp_path / "0")))


def test_who_waited_for_one_that_failed_does_not_wait_again(server: Server, tmp_path: Path) -> None:
    """Eight workers on a server that is down need the time of one."""
    index = shelved(load_index(server.url), tmp_path)
    server.troubles, server.asked = itertools.repeat(DOWN), []

    def read(_: int) -> str:
        with pytest.raises(LostShard) as caught:
            read_member(index, 0)
        return str(caught.value)

    with ThreadPoolExecutor(8) as pool:
        problems = set(pool.map(read, range(8)))
    assert len(problems) == 1 and len(server.asked) <= 2 * 7  # some may have come when the first had gone


def test_a_shard_is_fetched_once_for_all(server: Server, tmp_path: Path, mixed_shards: Path) -> None:
    server.ranges, server.troubles = False, itertools.repeat("slow")
    far = shelved(load_index(server.url), tmp_path)
    server.asked.clear()
    with ThreadPoolExecutor(8) as pool:
        media = list(pool.map(lambda i: read_member(far, i % len(far)), range(3 * len(far))))
    assert media[: len(far)] == media[len(far) : 2 * len(far)]
    assert sorted(path for path, _ in server.asked) == sorted(f"/{file.name}" for file in mixed_shards.glob("*.tar"))


def test_what_is_used_stays_and_what_is_read_is_not_torn_away(server: Server, tmp_path: Path) -> None:
    far = load_index(server.url)
    assert far.shelf is not None
    shelf = replace(far.shelf, folder=tmp_path, limit=3 * max(far.shelf.sizes))
    held = shelf.open(0)
    for n in range(1, 10):
        shelf.open(n).close()
        os.utime(shelf._path(n), (n, n))  # long ago
        shelf.open(5 if n >= 5 else n).close()
    names = {file.name for file in tmp_path.rglob("*.tar")}
    assert "shard-000005.tar" in names and "shard-000000.tar" not in names and len(names) <= 3
    assert len(held.read()) == shelf.sizes[0]  # removed, and still whole for its reader


def test_damaged_caches_heal(server: Server, tmp_path: Path, index: Index) -> None:
    far = shelved(load_index(server.url), tmp_path)
    assert far.shelf is not None
    wanted = read_member(far, 0)
    path = far.shelf._path(int(far.shard[0]))
    content = bytearray(path.read_bytes())
    content[int(far.offset[0]) + 5] ^= 255
    path.write_bytes(content)  # as long, but not the same
    assert read_member(far, 0) == wanted
    path.write_bytes(content[:100])
    assert read_member(far, 0) == wanted
    abandoned = path.with_name("shard-000009.tar.part")
    abandoned.write_bytes(b"half")
    far.shelf._make_room(tmp_path / far.fingerprint[:16] / "x.part", far.shelf.limit)
    assert not abandoned.exists() and not path.exists()


def test_a_source_that_is_damaged_itself_is_a_bad_sample(server: Server, tmp_path: Path, mixed_shards: Path) -> None:
    hurt = tmp_path / "hurt"
    hurt.mkdir()
    for file in mixed_shards.iterdir():
        (hurt / file.name).write_bytes(file.read_bytes())
    server.folder = hurt
    far = shelved(load_index(server.url), tmp_path / "cache")
    shard = hurt / far.shards[far.shard[0]]
    content = bytearray(shard.read_bytes())
    content[int(far.offset[0]) + 5] ^= 255
    shard.write_bytes(content)
    for _ in range(3):
        with pytest.raises(BadSample, match="wrong checksum"):
            read_member(far, 0)
    assert sum(path == f"/{shard.name}" and span.startswith("bytes=0-") for path, span in server.asked) == 2


def test_the_next_window_is_there_before_it_is_needed(server: Server, tmp_path: Path) -> None:
    batches = steps(load_index(server.url), make_config(server.url, tmp_path, window_shards=2))
    next(batches)
    until = time.monotonic() + 10
    while time.monotonic() < until and len(list(tmp_path.rglob("*.tar"))) < 4:
        time.sleep(0.01)
    assert len(list(tmp_path.rglob("*.tar"))) >= 4
    server.troubles = itertools.repeat(DOWN)
    assert next(batches)[0].lost is None


def test_a_cache_too_small_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_gb=1e-06: two windows .* set data\.cache_gb="):
        next(steps(load_index(server.url), make_config(server.url, tmp_path, cache_gb=1e-6)))


def test_a_full_disk_is_a_lost_shard(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    far = shelved(load_index(server.url), tmp_path)
    monkeypatch.setattr(Source, "_bring", full)
    with pytest.raises(LostShard, match=r"is full; lower data\.cache_gb"):
        read_member(far, 0)
    assert not list(tmp_path.rglob("*.part"))


def test_shards_may_lie_elsewhere_than_their_index(server: Server, index: Index, tmp_path: Path) -> None:
    content = json.loads((index.path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**content, "root": f"{server.url}/?sig=secret"}))
    far = shelved(load_index(tmp_path), tmp_path / "cache")
    assert read_member(far, 3) == read_member(index, 3)
    server.troubles = itertools.repeat(DOWN)
    (tmp_path / "cache" / far.fingerprint[:16] / far.shards[far.shard[3]]).unlink()
    with pytest.raises(LostShard) as caught:
        read_member(far, 3)
    assert "secret" not in str(caught.value) and "503" in str(caught.value)


def test_an_index_names_no_command(index: Index, tmp_path: Path) -> None:
    """Whoever made a data set must not run what they like."""
    content = json.loads((index.path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**content, "root": f"pipe:touch {tmp_path}/{{}}"}))
    with pytest.raises(UserError, match=r"\(root: .*it is a command, which only data\.path may name\)"):
        load_index(tmp_path)


def test_an_index_that_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.remote.PAUSES", (60.0,))  # nobody waits for it
    with pytest.raises(UserError, match=r"data\.path=http://127.*/none.*there is no such file"):
        load_index(f"http://user:secret@{server.url.removeprefix('http://')}/none?sig=secret")


def test_what_an_orphan_still_writes_goes_nowhere(server: Server, tmp_path: Path, index: Index) -> None:
    """A command outlives the process that was killed while it waited for it."""
    far = shelved(load_index(server.url), tmp_path)
    assert far.shelf is not None
    part = tmp_path / far.fingerprint[:16] / f"{far.shards[0]}.part"
    part.parent.mkdir()
    with part.open("wb", buffering=0) as orphan:
        far.shelf.open(0).close()
        orphan.write(b"more")
    with far.shelf.open(0) as stream:
        assert stream.read() == (index.path / far.shards[0]).read_bytes()


FETCH = """
import sys
from dataclasses import replace
from pathlib import Path
from data.shards import load_index
far = load_index(sys.argv[1])
print("here", flush=True)
replace(far.shelf, folder=Path(sys.argv[2])).open(0)
"""


def test_a_process_killed_in_a_transfer_leaves_nothing_in_the_way(server: Server, tmp_path: Path) -> None:
    stalled = threading.Event()
    answer = server.answer

    def stall(request: BaseHTTPRequestHandler) -> None:
        if request.path.endswith(".tar") and not stalled.is_set():
            stalled.set()
            time.sleep(1)
        answer(request)

    server.answer = stall  # type: ignore[method-assign]
    command = [sys.executable, "-c", FETCH, server.url, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT) as process:
        assert stalled.wait(30)
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.rglob("*.part"))) == 1
    far = shelved(load_index(server.url), tmp_path)
    assert far.shelf is not None
    far.shelf.open(0).close()
    assert not list(tmp_path.rglob("*.part"))
