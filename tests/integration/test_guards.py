"""Steps that are left out, returns to a checkpoint, a chain's jobs, and signals in a validation. In one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lingen.diffusion
import lingen.loop
import lingen.records
import lingen.run
from lingen.compose import compose
from lingen.errors import UserError
from lingen.export import load_trained
from lingen.loop import train
from lingen.runfolder import stage_folder
from tests.runs import Signal, lines

WORDS = [
    "~stages.demo_video_128", "~stages.demo_video", "validation.every_steps=0", "checkpoint.every_steps=4", "model=dit",
    "stages.demo_image.samples=48", "stages.demo_image.buckets.0.batch_size=4",
]  # fmt: skip
VIDEO = "[{frames: 9, height: 32, width: 32, batch_size: 4}]"
Start = Callable[..., Path]


@pytest.fixture
def start(world: Any, tmp_path: Path) -> Start:
    """Run a command in this process and return the run's folder; ``stop_at`` is a step that a signal comes in."""

    def run(*words: str, name: str = "run", stop_at: int | None = None, base: list[str] = WORDS) -> Path:
        folder = tmp_path / name
        config = compose([f"name={name}", f"runs_dir={tmp_path}", *world.words, "logger.console=false", *base, *words])
        code = train(config, Signal(folder, stop_at))  # type: ignore[arg-type]
        assert code == (75 if stop_at else 0)
        return folder

    return run


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[str]], None]:
    """Let the loss of every batch that has one of these keys be NaN, as a bad sample's would be."""
    keys: set[str] = set()
    real = lingen.diffusion.sample_losses
    step = lingen.loop.train_step
    now = {"bad": False}

    def train_step(networks: Any, batches: Any, **rest: Any) -> Any:
        now["bad"] = any(keys & set(batch.keys) for batch in batches)
        return step(networks, batches, **rest)

    def losses(*args: Any) -> torch.Tensor:
        return real(*args) * (float("nan") if now["bad"] else 1.0)

    monkeypatch.setattr(lingen.diffusion, "sample_losses", losses)
    monkeypatch.setattr(lingen.loop, "train_step", train_step)
    return keys.update


def trained(run: Path) -> list[tuple[int, Any, Any]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in lines(run, "train")]


@pytest.fixture
def order(start: Start, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The keys of each of the stage's batches."""
    seen: list[list[str]] = []
    step = lingen.loop.train_step

    def watch(networks: Any, batches: Any, **rest: Any) -> Any:
        seen.append([key for batch in batches for key in batch.keys])
        return step(networks, batches, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(lingen.loop, "train_step", watch)
        start(name="order")
    assert len(seen) == 12 and len({key for keys in seen for key in keys}) > 40
    return seen


def test_a_step_that_is_not_finite_is_left_out_and_named(start: Start, order: Any, poison: Any) -> None:
    poison({order[5][0]})
    run = start()
    assert [step for step, *_ in trained(run)] == list(range(1, 13))
    (refused,) = lines(run, "refused")
    assert refused["step"] == 6 and refused["keys"] == order[5] and "not finite" in refused["reason"]
    before = trained(start(name="order"))
    assert trained(run)[:5] == before[:5] and trained(run)[5][1] is None
    assert trained(run)[6][1] != before[6][1]  # a step's worth behind
    assert all(weight.isfinite().all() for weight in load_trained(run).weights.values())


def test_three_in_a_row_go_back_to_the_checkpoint_and_past_the_data(start: Start, order: Any, poison: Any) -> None:
    poison({order[n][0] for n in (5, 6, 7)})
    run = start()
    assert [step for step, *_ in trained(run)] == list(range(1, 13))
    assert all(loss is not None for _, loss, _ in trained(run)) and not lines(run, "refused")
    (back,) = lines(run, "rollback")
    assert back["step"] == 4 and back["skipped"] == 16 and "not finite" in back["reason"]
    state = json.loads((run / "checkpoints" / "demo_image" / "step_00000012" / "state.json").read_text())
    assert state["position"]["skipped"] == 16 and sum(state["position"]["consumed"].values()) == 48 + 16


@pytest.mark.parametrize("stop_at", [3, 5, 7, 8, 9])
def test_a_run_that_went_back_resumes_as_if_undisturbed(start: Start, order: Any, poison: Any, stop_at: int) -> None:
    poison({order[n][0] for n in (5, 6, 7)})
    whole = start(name="whole")
    start(stop_at=stop_at)
    run = start()
    assert trained(run) == trained(whole)
    assert lines(run, "rollback")[0]["skipped"] == lines(whole, "rollback")[0]["skipped"]
    weights = load_trained(run).weights
    assert all(weight.equal(weights[name]) for name, weight in load_trained(whole).weights.items())


def test_without_a_checkpoint_the_stage_begins_again_past_the_data(start: Start, order: Any, poison: Any) -> None:
    poison({order[n][0] for n in (0, 1, 2)})
    run = start("validation.every_steps=8")
    (back,) = lines(run, "rollback")
    assert back["step"] == 0 and back["skipped"] == 12
    assert [(r["step"], r["at"]) for r in lines(run, "validation")] == [(0, "start"), (8, "interval"), (12, "end")]
    assert [step for step, *_ in trained(run)] == list(range(1, 13)) and len(lines(run, "transfer")) == 1


def test_a_return_to_the_beginning_does_not_depend_on_signals(start: Start, order: Any, poison: Any) -> None:
    poison({order[n][0] for n in (1, 2, 3)})
    words = "checkpoint.every_steps=5"
    whole = start(words, name="whole")
    for stop_at in (1, 3):
        start(words, stop_at=stop_at)
    run = start(words)
    assert trained(run) == trained(whole) and lines(run, "rollback")[0]["step"] == 0
    weights = load_trained(run).weights
    assert all(weight.equal(weights[name]) for name, weight in load_trained(whole).weights.items())


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("part", ["*.safetensors", "manifest.json"])
def test_a_return_does_not_pass_over_a_damaged_checkpoint_silently(
    start: Start,
    order: Any,
    poison: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    part: str,
    keep_last: int,
) -> None:
    poison({order[n][0] for n in (6, 7, 8)})
    back_at = lingen.loop.back_at

    def damaged(config: Any, stage: Any, *rest: Any) -> Any:
        (path,) = stage_folder(config, stage.name).glob(f"step_00000006/{part}")
        path.write_bytes(path.read_bytes()[:-9])
        return back_at(config, stage, *rest)

    monkeypatch.setattr(lingen.loop, "back_at", damaged)
    words = ["checkpoint.every_steps=3", f"checkpoint.keep_last={keep_last}"]
    if keep_last == 1:
        with pytest.raises(UserError, match=r"has checkpoints but none can be loaded \(step_00000006"):
            start(*words)
    else:
        assert lines(start(*words), "rollback")[0]["step"] == 3
    assert "CHECKPOINT DAMAGED" in capfd.readouterr().err


def test_going_back_ends_where_it_does_not_help(start: Start, order: Any, poison: Any) -> None:
    poison({key for keys in order for key in keys})
    with pytest.raises(
        UserError, match=r"went back to step 0 guard\.rollbacks=2 times .*3 steps refused in a row.*lr="
    ):
        start("guard.rollbacks=2")


def test_a_checkpoint_amid_refused_steps_is_no_progress(start: Start, order: Any, poison: Any, tmp_path: Path) -> None:
    poison({f"image-{n:05d}" for n in range(64)}.difference(*order[:3]))
    with pytest.raises(UserError, match=r"went back to step 10 guard\.rollbacks=3 times"):
        start("checkpoint.every_steps=2")  # fewer than guard.in_a_row
    assert [r["step"] for r in lines(tmp_path / "run", "rollback")] == [4, 6, 8]


def test_a_spike_is_left_out_where_the_configuration_says_so(start: Start) -> None:
    run = start("guard.window=10", "guard.grad_deviations=0.01", "guard.in_a_row=5", "guard.rollbacks=1")
    refused = lines(run, "refused")
    assert refused and all("deviations above the mean" in record["reason"] for record in refused)
    assert not lines(start(name="plain"), "refused")


def test_each_long_part_of_a_run_begins_with_a_sign_of_life(
    start: Start, order: Any, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison({order[n][0] for n in (5, 6, 7)})
    events = ["beat"]  # the watchdog's start is one
    watchdog = SimpleNamespace(beat=lambda doing: events.append("beat"), stop=lambda: None)
    monkeypatch.setattr(lingen.loop, "Watchdog", lambda *args: watchdog)

    def told(module: Any, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **rest: (events.append(name), real(*args, **rest))[1])

    told(lingen.loop.Lease, "take")
    for name in ("prepare", "find_start", "begin_stage", "take_step", "back_at"):
        told(lingen.loop, name)
    told(lingen.loop.checkpoint, "open_checkpoint")
    for module in (lingen.loop, lingen.run):
        told(module, "export_finished")
    start("stages.demo_image.samples=32", base=[*WORDS[:1], *WORDS[2:], f"stages.demo_video.buckets={VIDEO}"])
    parts = [event for event in events if event != "beat"]
    assert {"prepare", "take", "find_start", "export_finished", "begin_stage", "back_at"} < set(parts)
    assert not [pair for pair in pairwise(events) if "beat" not in pair]


CHAIN = [
    "~stages.demo_video_128", "validation.every_steps=2", "checkpoint.every_steps=2", "model=dit",
    "stages.demo_image.samples=16", "stages.demo_image.buckets.0.batch_size=4", "stages.demo_video.samples=16",
    f"stages.demo_video.buckets={VIDEO}",
]  # fmt: skip


def test_a_chain_of_commands_equals_one(start: Start) -> None:
    whole = start(name="whole", base=CHAIN)
    first = start("until=demo_image", base=CHAIN)
    assert not (first / "checkpoints" / "demo_video").exists()
    start("until=demo_image", base=CHAIN)  # nothing is left to do
    assert [step for step, *_ in trained(first)] == [1, 2, 3, 4]
    run = start("until=demo_video", base=CHAIN)
    assert trained(run) == trained(whole)
    assert [r["loss"] for r in lines(run, "validation")] == [r["loss"] for r in lines(whole, "validation")]
    with pytest.raises(UserError, match=r"until=demo_vide is none of the stages demo_image, demo_video"):
        start("until=demo_vide", base=CHAIN)


def test_a_finished_stage_is_not_held_to_the_settings_of_the_next(start: Start) -> None:
    start("until=demo_image", base=CHAIN)
    start("engine.grad_accumulation=2", "stages.demo_image.buckets.0.batch_size=2", base=CHAIN)


@pytest.mark.parametrize("which", range(6))  # start, interval and end of both stages
def test_a_signal_in_a_validation_does_not_wait_for_its_end(
    start: Start, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    whole = start(name="whole", base=CHAIN)
    real, stop, calls = lingen.records.validate, SimpleNamespace(asked=False), []

    def validate(*args: Any) -> Any:
        calls.append(which)
        if len(calls) == which + 1:
            stop.asked = True
            assert real(*args) is None
            return None
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lingen.records, "validate", validate)
        words = ["name=run", f"runs_dir={tmp_path}", *world.words, "logger.console=false", *CHAIN]
        assert train(compose(words), stop) == 75
    assert len(lines(tmp_path / "run", "validation")) == which
    run = start(base=CHAIN)
    assert trained(run) == trained(whole)
    moments = [[(r["step"], r["stage"], r["at"], r["loss"]) for r in lines(r_, "validation")] for r_ in (run, whole)]
    assert moments[0] == moments[1]
