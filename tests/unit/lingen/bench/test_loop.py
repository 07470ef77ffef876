"""The loop's benchmark: who is charged for what, and that each part finds its figures. The figures are not tested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lingen.diffusion
from data.shards import load_index
from lingen.bench import loop
from lingen.bench.ledger import Ledger
from lingen.bench.loop import LoopWords, World
from lingen.engines.plain import TorchEngine
from lingen.errors import UserError
from lingen.saver import Saver


class Clock:
    """Stands still, but where somebody works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Office:
    """Works by a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def inner(self, seconds: float) -> float:
        self.clock.now += seconds
        return seconds

    def outer(self) -> None:
        self.clock.now += 1
        self.inner(10)
        self.clock.now += 2

    def broken(self) -> None:
        self.clock.now += 5
        raise KeyError

    def parts(self) -> Iterator[int]:
        for n in range(3):
            self.clock.now += 7
            yield n


def test_every_second_is_charged_once() -> None:
    clock = Clock()
    office, original = Office(clock), Office.outer
    with Ledger(clock) as ledger:
        for name in ("outer", "inner", "broken", "parts"):
            ledger.charge(Office, name, name)
        office.outer()
        clock.now += 100
        assert office.inner(20) == 20
        with pytest.raises(KeyError):
            office.broken()
        assert ledger.turn() == {"outer": 3, "inner": 30, "loop": 100, "broken": 5}
        for n in office.parts():
            clock.now += 0.5 * n
        assert ledger.turn() == {"parts": 21, "loop": 1.5}
    assert Office.outer is original


@pytest.fixture
def rendered(world: Any, tmp_path: Path) -> World:
    """What ``render`` makes."""
    for made in (world.shards, world.autoencoder):
        (tmp_path / made.name).symlink_to(made)
    return World(tmp_path)


def test_what_does_not_train_is_the_loops(rendered: World) -> None:
    before = (lingen.diffusion.batch_losses, TorchEngine.step, TorchEngine.backward)
    found = loop.measure_step(rendered, LoopWords(size="tiny", pixels=64, steps=3))
    assert (lingen.diffusion.batch_losses, TorchEngine.step, TorchEngine.backward) == before
    parts = {name: value for name, value in found.items() if name.endswith("_ms") and not name.startswith("own")}
    wanted = {"metrics", "guard", "position", "saver", "watchdog", "loop", "receiving"}
    assert parts.keys() == {f"{name}_ms" for name in wanted} and min(parts.values()) > 0
    assert 0 < found["own_ms"] <= found["own_ms_most"] < 1e3 * found["step_s"]
    assert found["own_ms"] == pytest.approx(sum(parts.values()) - parts["receiving_ms"], rel=0.5)


def test_a_cut_graph_gives_the_same_gradients(rendered: World) -> None:
    """Else another run than the real one would be measured."""
    losses = {}
    for name, cut in (("whole", lambda _: None), ("cut", loop.cut_graphs)):
        seen: list[float] = []
        with Ledger() as ledger, pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "cut_graphs", cut)
            step = TorchEngine.step

            def noted(*args: Any, seen: list[float] = seen, step: Any = step, **kwargs: Any) -> float:
                seen.append(step(*args, **kwargs))
                return seen[-1]

            ledger.replace(TorchEngine, "step", noted)
            loop.watch(loop.configure(rendered, "tiny", 64, f"name={name}"), ledger, 1)
        losses[name] = seen
    assert len(losses["cut"]) == loop.WARM_UP + 1 and losses["cut"] == losses["whole"]


def test_a_save_holds_training_up(rendered: World) -> None:
    start = Saver.start
    found = loop.measure_stall(rendered, LoopWords(stall_size="tiny", pixels=64, steps=4, saves=1))
    assert Saver.start is start
    assert found["held_up_s"] > 0 and found["held_up_share"] <= found["whole_share"] and found["every_steps"] == 1000


def test_the_written_index_can_be_loaded(tmp_path: Path) -> None:
    found = loop.measure_index(tmp_path / "index", LoopWords(samples=700, rounds=1))
    assert found["samples"] == 700 and found["load_s"] >= 0
    index = load_index(tmp_path / "index")
    assert len(index.shards) == 3 and len(set(index.key)) == 700


def test_a_resume_is_timed_to_its_first_step(rendered: World) -> None:
    found = loop.measure_resume(rendered, LoopWords(rounds=1))
    assert 0 < found["resume_s"] == found["resume_s_most"]


def test_a_run_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.py ended with code 2: error: data.path=.*missing"):
        loop.measure_resume(World(tmp_path), LoopWords(rounds=1))
