"""The shards vanish under a run: it ends without a trace of it, and started again it is as if nothing had been."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lingen.compose import compose
from lingen.errors import UserError
from lingen.loop import train
from tests.runs import Signal, lines

Start = Callable[..., Path]
SMALL = [
    "~stages.demo_video_128", "~stages.demo_video", "model=dit", "logger.console=false", "checkpoint.every_steps=2",
    "validation.every_steps=2", "stages.demo_image.samples=24", "stages.demo_image.buckets.0.batch_size=4",
]  # fmt: skip


@dataclass
class Vanish(Signal):
    """No signal comes; where one would, the shards go."""

    shards: Path

    @property
    def asked(self) -> bool:
        if super().asked and self.shards.exists():
            hidden(self.shards).mkdir()
            for shard in self.shards.glob("*.tar"):
                shard.rename(hidden(self.shards) / shard.name)
        return False


def hidden(shards: Path) -> Path:
    return shards.with_name("hidden")


def come_back(shards: Path) -> None:
    for shard in hidden(shards).iterdir():
        shard.rename(shards / shard.name)
    hidden(shards).rmdir()


@pytest.fixture
def start(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Train in this process and return the run's folder; the shards vanish during step ``gone_at``."""
    monkeypatch.setattr("data.shards.PAUSES", (0.001,))
    shards = shutil.copytree(world.shards, tmp_path / "shards")

    def run(name: str, gone_at: int | None = None) -> Path:
        folder = tmp_path / name
        words = [f"name={name}", f"runs_dir={tmp_path}", *world.words, f"data.path={shards}", *SMALL]
        assert train(compose(words), Vanish(folder, gone_at, shards)) == 0  # type: ignore[arg-type]
        return folder

    return run


def told(run: Path) -> list[tuple[Any, ...]]:
    return [(r["kind"], r["step"], r["loss"], r["valid"]) for kind in ("train", "validation") for r in lines(run, kind)]


def weights(run: Path) -> bytes:
    return (run / "export" / "demo_image" / "model.safetensors").read_bytes()


def test_while_training(start: Start, tmp_path: Path) -> None:
    undisturbed = start("undisturbed")
    with pytest.raises(UserError, match=r"shard \S+ cannot be read: No such file .*; nothing of this step was taken"):
        start("run", gone_at=3)
    run = tmp_path / "run"
    assert [r["step"] for r in lines(run, "train")] == [1, 2, 3]
    with pytest.raises(UserError, match=r"the shard \S+ is missing"):
        start("run")
    come_back(tmp_path / "shards")
    assert start("run") == run
    assert told(run) == told(undisturbed) and weights(run) == weights(undisturbed)
    assert not list(run.glob("bad_samples*"))


def test_while_validating(start: Start, tmp_path: Path) -> None:
    undisturbed = start("undisturbed")
    with pytest.raises(UserError, match=r"shard \S+ cannot be read: No such file .*; nothing was measured"):
        start("run", gone_at=2)  # what is read next is held out
    run = tmp_path / "run"
    assert [r["step"] for r in lines(run, "train")] == [1, 2]
    come_back(tmp_path / "shards")
    assert start("run") == run
    assert told(run) == told(undisturbed) and weights(run) == weights(undisturbed)
