"""Blind votes: fair sides, a file that loses nothing, win rates, and a server that answers nobody else."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from lingen.errors import UserError
from lingen.evaluation import votes as module
from lingen.evaluation.folder import Asked, SampledRun, read_runs
from lingen.evaluation.vote_server import VoteServer
from lingen.evaluation.votes import VoteFile, as_table, pairs, tally

from .conftest import Make, clip

vote = importlib.import_module("scripts.vote")
ROOT = Path(__file__).parents[4]


@pytest.fixture
def runs(make_run: Make) -> list[SampledRun]:
    return read_runs([str(make_run("secret-a")), str(make_run("secret-b", noise=20))])


def test_sides_are_fair_and_of_the_seed_alone(make_run: Make) -> None:
    videos = [Asked(prompt=clip(0)[1], seed=n) for n in range(31)]
    file = read_runs([str(make_run("a", count=1))])[0].file
    two = [SampledRun(Path(name), file.model_copy(update={"name": name, "videos": videos}), []) for name in "ab"]
    found = pairs(two, 3)
    assert sorted(pair.video for pair in found) == list(range(31)) and found == pairs(two, 3) != pairs(two, 4)
    assert sum(pair.left.name == "a" for pair in found) in (15, 16)
    assert all({pair.left.name, pair.right.name} == {"a", "b"} for pair in found)
    assert [pair.video for pair in found] != list(range(31))
    with pytest.raises(UserError, match="between two runs, got 3"):
        pairs([*two, two[0]], 0)


def test_votes_are_kept_and_counted(runs: list[SampledRun], tmp_path: Path) -> None:
    path = tmp_path / "new" / "votes.jsonl"
    sides = {pair.video: pair for pair in pairs(runs, 0)}
    file = VoteFile(path, runs, seed=0)
    with pytest.raises(UserError, match="open in another"):
        VoteFile(path, runs, seed=0)
    for video in range(4):
        file.add("anna", video, "left" if sides[video].left.name == "secret-a" else "right", 1.5)
    file.add("bert", 0, "same", 2.0)
    file.add("anna", 3, "same", 0.5)  # changes her mind
    assert file.voted("anna") == {0, 1, 2, 3} and file.voted("bert") == {0} and file.voted("x") == set()
    file.close()
    with path.open("ab") as stream:
        stream.write(b'{"voter": "anna", "vi')  # the power went
    again = VoteFile(path, runs, seed=0)
    assert again.votes == file.votes and path.read_bytes().endswith(b"}\n")
    again.add("bert", 1, "left", 1.0)
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 7 and lines[0]["prompt"] == clip(0)[1]
    found = tally(again.votes, ["secret-a", "secret-b"])
    wins = 3 + (sides[1].left.name == "secret-a")
    assert (found.votes, found.same, found.voters) == (6, 2, 2)
    assert found.runs["secret-a"].wins == wins and found.runs["secret-b"].wins == 4 - wins
    assert found.runs["secret-a"].rate.value == wins / 4
    assert "6 votes of 2 voters" in as_table(found).as_text()


def test_other_files_are_refused_and_left_alone(runs: list[SampledRun], tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    file = VoteFile(path, runs, seed=0)
    for video in range(4):
        file.add("anna", video, "left", 1.0)
    for wrong in ({"video": 4}, {"video": -1}, {"choice": "both"}, {"seconds": float("nan")}, {"voter": "x" * 65}):
        with pytest.raises(ValueError, match=r"video|choice|seconds|voter"):
            file.add(**({"voter": "anna", "video": 0, "choice": "left", "seconds": 1.0} | wrong))  # type: ignore[arg-type]
    file.close()
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"line 1 has .* other runs, or another seed"):
        VoteFile(
            path, [runs[1], runs[0].__class__(runs[0].path, runs[0].file.model_copy(update={"name": "c"}), [])], seed=0
        )
    assert path.read_bytes() == whole
    path.write_bytes(b"notes of mine\n" + whole)
    with pytest.raises(UserError, match=r"line 1 is no vote; name another file"):
        VoteFile(path, runs, seed=0)
    assert path.read_bytes() == b"notes of mine\n" + whole
    path.write_bytes(whole.replace(b'"seed": 2', b'"seed": 9'))
    with pytest.raises(UserError, match="line 3 is of other videos"):
        VoteFile(path, runs, seed=0)


def test_a_full_disk_loses_no_vote(runs: list[SampledRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = VoteFile(tmp_path / "votes", runs, seed=0)
    file.add("anna", 0, "left", 1.0)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.add("anna", 1, "left", 1.0)
    assert file.voted("anna") == {0} and len((tmp_path / "votes").read_text().splitlines()) == 1
    file.add("anna", 1, "left", 1.0)
    file.close()


class Browser:
    """Asks a server as the page does; what is given overrides its headers."""

    def __init__(self, server: VoteServer) -> None:
        self.server = server

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        connection = HTTPConnection("127.0.0.1", self.server.server_port, timeout=10)
        sent = {"Host": f"127.0.0.1:{self.server.server_port}", "X-Token": self.server.token}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, content, sent)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())


@pytest.fixture
def browser(runs: list[SampledRun], tmp_path: Path) -> Iterator[Browser]:
    votes = VoteFile(tmp_path / "votes", runs, seed=0)
    server = VoteServer(pairs(runs, 0), votes, port=0, question="Which <b>moves</b> better?")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Browser(server)
    server.shutdown()
    thread.join()
    server.server_close()
    votes.close()


def test_a_voter_votes(browser: Browser, runs: list[SampledRun], capfd: pytest.CaptureFixture[str]) -> None:
    status, page, headers = browser.ask("/", X_Token="")
    text = page.decode()
    assert status == 200 and "Which &lt;b&gt;moves" in text and "http:" not in text and "https:" not in text
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    assert browser.server.token not in text
    status, answer, _ = browser.ask("/pairs?voter=anna%20m")
    shown = json.loads(answer)
    assert status == 200 and [one["done"] for one in shown] == [False] * 4
    side = {pair.video: pair for pair in pairs(runs, 0)}
    for video in (one["video"] for one in shown):
        assert browser.ask(f"/video/{video}/left")[1] == side[video].left.mp4(video)
        assert browser.ask(f"/video/{video}/right")[1] == side[video].right.mp4(video)
    assert b"secret" not in page + answer
    body = {"voter": "anna m", "video": 2, "choice": "left", "seconds": 3.5}
    assert browser.ask("/vote", body)[0] == 200
    assert [one["video"] for one in json.loads(browser.ask("/pairs?voter=anna%20m")[1]) if one["done"]] == [2]
    assert browser.server.votes.votes["anna m", 2].winner == side[2].left.name
    assert capfd.readouterr() == ("", "")  # no log, and so no token in one


def test_strangers_and_nonsense_are_turned_away(browser: Browser) -> None:
    good = {"voter": "a", "video": 0, "choice": "left", "seconds": 1}
    own = f"http://127.0.0.1:{browser.server.server_port}"
    for path in ("/pairs?voter=a", "/video/0/left"):
        assert (
            browser.ask(path, X_Token="")[0]
            == 403
            == browser.ask(path, X_Token="guess é".encode().decode("latin-1"))[0]
        )
    assert browser.ask("/vote", good, X_Token="guess")[0] == 403
    assert browser.ask("/", Host="evil.example")[0] == 403  # a name that was made to point here
    assert browser.ask("/vote", good, Origin="http://evil.example")[0] == 403
    for path in (
        "/video/9/left",
        "/video/0/middle",
        "/video/../../etc/passwd/left",
        "/../../etc/passwd",
        "/video/0/left/x",
    ):
        assert browser.ask(path)[0] == 404
    for wrong in (
        b"{", [], {**good, "video": 99}, {**good, "video": "../x"}, {**good, "choice": "up"}, {**good, "seconds": -1},
        {key: good[key] for key in ("voter", "video")}, {**good, "voter": "x" * 5000},
    ):  # fmt: skip
        assert browser.ask("/vote", wrong)[0] == 400
    assert browser.ask("/other", good)[0] == 400
    assert browser.server.votes.votes == {}
    assert browser.ask("/vote", good, Origin=own)[0] == 200
    assert browser.server.server_address[0] == "127.0.0.1"


def test_a_browser_that_goes_away_is_no_error(browser: Browser, capfd: pytest.CaptureFixture[str]) -> None:
    for error, said in ((BrokenPipeError(), False), (RuntimeError("a fault"), True)):
        try:
            raise error
        except type(error):
            browser.server.handle_error(None, ("127.0.0.1", 1))
        assert ("Traceback" in capfd.readouterr().err) is said


def test_a_port_that_is_taken(browser: Browser, runs: list[SampledRun]) -> None:
    with pytest.raises(UserError, match=r"port=\d+ cannot be opened"):
        VoteServer(pairs(runs, 0), browser.server.votes, port=browser.server.server_port, question="?")


def test_the_script_serves_until_it_is_ended(runs: list[SampledRun], tmp_path: Path) -> None:
    words = [f"runs=[{runs[0].path},{runs[1].path}]", f"out={tmp_path / 'votes'}", "labels=[one,two]"]
    process = subprocess.Popen(
        [sys.executable, "scripts/vote.py", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    address, token = process.stdout.readline().split()[-1].split("#")
    connection = HTTPConnection(address.split("/")[2], timeout=10)
    body = json.dumps({"voter": "a", "video": 1, "choice": "left", "seconds": 1.0})
    connection.request("POST", "/vote", body, {"X-Token": token.strip()})
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "1 votes of 1 voters, 0 of them undecided; left 1 of 1" in printed


def test_showing_needs_votes(runs: list[SampledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"runs=[{runs[0].path},{runs[1].path}]", f"out={tmp_path / 'votes'}", "show=true"]
    with pytest.raises(UserError, match="does not exist; there are no votes"):
        vote.main(words)
    file = VoteFile(tmp_path / "votes", runs, seed=0)
    file.add("anna", 1, "left", 1.0)
    with (tmp_path / "votes").open("ab") as stream:
        stream.write(b'{"voter": "ber')  # somebody's, as it is being written
    size = (tmp_path / "votes").stat().st_size
    vote.main(words)  # while the others go on
    assert "1 votes of 1 voters" in capsys.readouterr().out and (tmp_path / "votes").stat().st_size == size
    file.close()
    with pytest.raises(UserError, match="runs"):
        vote.main([f"runs=[{runs[0].path}]", f"out={tmp_path / 'votes'}"])
