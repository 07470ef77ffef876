from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen import agreement
from lingen.agreement import code, refuse_disagreement
from lingen.compose import compose
from lingen.config import Config
from lingen.dist import Dist
from lingen.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
WORDS = ["name=a", "data.path=x", "autoencoder.path=y"]
CODE = {"python": "3.11", "torch": "2.12", "lingen/loop.py": "aaa", "lingen/flow.py": "bbb"}
HERE = threading.local()


@dataclass
class Meeting:
    """Where the ranks, a thread each, exchange what they gather."""

    world: int
    sent: list[list[Any]] = field(default_factory=list)  # one entry a collective

    def __post_init__(self) -> None:
        self.values: list[Any] = [None] * self.world
        self.barrier = threading.Barrier(self.world, timeout=10)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        if rank == 0:
            self.sent.append(values)
        return values


class ThreadDist(Dist):
    """A rank that is a thread."""

    def gather(self, value: Any) -> list[Any]:
        return HERE.meeting.gather(self.rank, value)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Rank:
    """What a rank says of itself."""

    config: Config
    code: dict[str, str]
    index: str = "f" * 64
    autoencoder: str = "a" * 64


def compare(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Meeting]:
    """The message on each rank, empty where there was none, and what was exchanged; two ranks a host."""
    monkeypatch.setattr(agreement, "code", lambda: HERE.rank.code)
    monkeypatch.setattr(socket, "gethostname", lambda: f"n{HERE.number // 2}")
    messages, meeting = ["?"] * len(ranks), Meeting(len(ranks))

    def run(number: int, rank: Rank) -> None:
        HERE.meeting, HERE.number, HERE.rank = meeting, number, rank
        try:
            dist = ThreadDist(number, len(ranks), 0, torch.device("cpu"))
            refuse_disagreement(rank.config, rank.index, {"autoencoder": rank.autoencoder}, dist)
            messages[number] = ""
        except UserError as error:
            messages[number] = str(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return messages, meeting


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(WORDS)


def test_equal_ranks_exchange_digests_only(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    messages, meeting = compare([Rank(config, CODE)] * 4, monkeypatch)
    assert messages == [""] * 4
    assert len(meeting.sent) == 2 and len(str(meeting.sent[-1])) < 4 * 400


def reordered(config: Config) -> Config:
    return config.model_copy(update={"stages": dict(reversed(config.stages.items()))})


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (lambda c: Rank(c, CODE | {"torch": "2.13"}), "another code than rank 0 (n0): torch is 2.13, not 2.12;"),
        (
            lambda c: Rank(c, {k: v for k, v in CODE.items() if k != "lingen/loop.py"} | {"lingen/flow.py": "ccc"}),
            "another code than rank 0 (n0): lingen/loop.py is missing, not aaa, lingen/flow.py is ccc, not bbb;",
        ),
        (
            lambda c: Rank(compose([*WORDS, "optim.weight_decay=0.5"]), CODE),
            "another configuration than rank 0 (n0): optim.weight_decay is 0.5, not 0.01;",
        ),
        (lambda c: Rank(reordered(c), CODE), "another configuration than rank 0 (n0): the order of its keys;"),
        (
            lambda c: Rank(c, CODE, index="e" * 64),
            "another data index than rank 0 (n0): the fingerprint of data.path is eeeeeeeeeeee, not ffffffffffff;",
        ),
        (
            lambda c: Rank(c, CODE, autoencoder="b" * 64),
            "another autoencoder than rank 0 (n0): the fingerprint of autoencoder.path is bbbbbbbbbbbb, not aaaa",
        ),
    ],
)
def test_who_differs_and_in_what_is_said_on_all_ranks(
    odd: Callable[[Config], Rank], named: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    equal, other = Rank(config, CODE), odd(config)
    messages, meeting = compare([equal, equal, other, equal, equal, other], monkeypatch)
    assert messages[0].startswith(f"rank 2 (n1), rank 5 (n2): {named}")
    assert set(messages) == {messages[0]}
    assert [bool(shown) for shown in meeting.sent[-1]] == [True, False, True, False, False, False]


def test_many_that_differ_are_counted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Rank(config, {f"lingen/{i}.py": "a" for i in range(9)}, index="e" * 64)
    messages, _ = compare([Rank(config, {}), *[other] * 6], monkeypatch)
    assert "rank 3 (n1), rank 4 (n2) and 2 more ranks: another code" in messages[0]
    assert "lingen/3.py is a, not missing and 5 more differences; rank 1 (n0)" in messages[0]
    assert "another data index" in messages[0]


def test_all_sources_count_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        path.relative_to(ROOT).as_posix() for folder in ("lingen", "data") for path in (ROOT / folder).rglob("*.py")
    } | {"scripts/train_autoencoder.py"}
    versions = {"python", "torch", "deepspeed", "numpy"}
    assert code().keys() == {"train.py", *names} | versions
    assert code()["torch"] == torch.__version__ and code()["deepspeed"] != "missing"
    monkeypatch.setattr(agreement, "ROOT", tmp_path)
    (tmp_path / "lingen" / "deep").mkdir(parents=True)
    source = tmp_path / "lingen" / "deep" / "a.py"
    source.write_text("a = 1")
    source.with_suffix(".pyc").touch()
    source.with_name(".#a.py").symlink_to("somebody@somewhere.1")  # Emacs, while they write
    before = code()
    assert before.keys() - versions == {"lingen/deep/a.py"}
    source.write_text("a = 2")
    assert code() != before


def test_two_real_ranks_from_two_checkouts(tmp_path: Path) -> None:
    checkouts = [tmp_path / "one", tmp_path / "other"]
    for folder in ("lingen", "data", "conf"):
        shutil.copytree(ROOT / folder, checkouts[0] / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", checkouts[0])
    shutil.copytree(checkouts[0], checkouts[1])
    with (checkouts[1] / "lingen" / "flow.py").open("a") as stream:
        stream.write("# another line\n")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        environ = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    script = f"""
from lingen.agreement import refuse_disagreement
from lingen.compose import compose
from lingen.dist import init
refuse_disagreement(compose({WORDS}), "f" * 64, {{"autoencoder": "a" * 64}}, init("cpu"))
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(checkout)},
            cwd=checkout,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, checkout in enumerate(checkouts)
    ]
    host = socket.gethostname()
    for process in ranks:
        last = process.communicate(timeout=60)[1].splitlines()[-1]
        assert f"rank 1 ({host}): another code than rank 0 ({host}): lingen/flow.py is " in last
        assert process.returncode == 1
