from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lingen import checkpoint, manifest
from lingen.checkpoint import RESUME
from lingen.config import CarryConfig
from lingen.errors import UserError
from lingen.files import sha256
from lingen.shardfiles import Damaged, ShardReader
from scripts import verify_checkpoint
from tests.tiny import DIT, ONE, latest, load, make, save, state, train


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A stage folder with checkpoints at steps 2, 4 and 6."""
    engine, ema = make()
    for step in (2, 4, 6):
        train(engine, ema, step - 2, step)
        save(tmp_path / "stage", step, engine, ema)
    return tmp_path / "stage"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    engine, ema = make(dtype=dtype)
    train(engine, ema, 0, 3)
    save(tmp_path / "stage", 3, engine, ema)
    losses = train(engine, ema, 3, 8)

    other, other_ema = make(seed=1, dtype=dtype)
    found = latest(tmp_path / "stage")
    load(found, other, other_ema)
    assert train(other, other_ema, 3, 8) == losses
    wanted, got = state(engine, ema), state(other, other_ema)
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert found.progress == {"position": {"step": 3}}
    assert (found.manifest.stage, found.manifest.samples, found.manifest.tokens) == ("stage", 24, 240)
    assert found.manifest.adam_steps == 3


def test_nothing_is_not_an_error(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "stage", ONE) is None


def test_the_newest_is_found_by_number(tmp_path: Path) -> None:
    engine, ema = make()
    for step in (99_999_999, 100_000_000, 7):
        save(tmp_path, step, engine, ema)
    assert latest(tmp_path).manifest.step == 100_000_000


@pytest.mark.parametrize(
    ("weights", "ema_kept", "optimizer"),
    [("model", "carry", "fresh"), ("ema", "fresh", "fresh"), ("ema", "carry", "carry"), ("model", "fresh", "carry")],
)
def test_a_transfer_carries_what_the_stage_says(three: Path, weights: Any, ema_kept: Any, optimizer: Any) -> None:
    engine, ema = make()
    load(latest(three), engine, ema)
    source = state(engine, ema)
    train(engine, ema, 6, 8)  # so that nothing is right by chance
    load(latest(three), engine, ema, CarryConfig(weights=weights, ema=ema_kept, optimizer=optimizer))
    names = [f.name for f in engine.fragments()]
    got = state(engine, ema)
    origin = "ema" if weights == "ema" else "master"
    for name in names:
        assert torch.equal(got[f"master/{name}"], source[f"{origin}/{name}"])
        assert torch.equal(got[f"ema/{name}"], source[f"{origin if ema_kept == 'fresh' else 'ema'}/{name}"])
        for kind in ("exp_avg", "exp_avg_sq"):
            wanted = source[f"{kind}/{name}"] if optimizer == "carry" else torch.zeros_like(source[f"{kind}/{name}"])
            assert torch.equal(got[f"{kind}/{name}"], wanted)
    assert engine.steps == (6 if optimizer == "carry" else 0)


def flip(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    change(tree)
    (folder / "manifest.json").write_text(json.dumps(tree))


def put_another_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_00000002"), folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (flip, "sha256"),
    "truncated": (truncate, "bytes, not"),
    "missing shard": (lambda f: (f / "rank_00000.safetensors").unlink(), "rank_00000.safetensors is missing"),
    "missing state": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "edited state": (lambda f: (f / "state.json").write_text('{"position": {"step": 7}}'), "state.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"no manifest\.json"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"stage": '), r"manifest\.json cannot be read"),
    "bottomless": (lambda f: (f / "manifest.json").write_text("[" * 100_000), r"manifest\.json cannot be read"),
    "another": (put_another_in_its_place, r"manifest\.json is of step 2"),
    "incomplete": (lambda f: edit(f, lambda t: t.update(complete=False)), "complete=False"),
    "outside": (lambda f: edit(f, lambda t: t["files"].update({"../x": {"size": 1, "sha256": ""}})), "does not list"),
    "forgotten shard": (lambda f: edit(f, lambda t: t["files"].pop("rank_00000.safetensors")), "does not list"),
    "other numbers": (lambda f: edit(f, lambda t: t.update(adam_steps=60)), "was changed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_skipped_loudly(three: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, reason = DAMAGE[kind]
    damage(three / "step_00000006")
    assert latest(three).manifest.step == 4
    error = capsys.readouterr().err
    assert f"!!! CHECKPOINT DAMAGED: {three}/step_00000006\n" in error and "!!! The one before" in error
    with pytest.raises(UserError, match=reason):
        checkpoint.open_checkpoint(three / "step_00000006", ONE)


def test_all_damaged_is_an_error_and_no_new_start(three: Path) -> None:
    for folder in three.iterdir():
        flip(folder)
    with pytest.raises(UserError, match=r"none can be loaded.*step_00000006.*step_00000002"):
        checkpoint.latest(three, ONE)


@pytest.mark.parametrize("schema", [2, 4])
def test_another_schema_is_no_damage(
    three: Path, schema: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the run would go on from an older one, and in time overwrite this."""
    newest = three / "step_00000006"
    edit(newest, lambda t: t.update(schema_version=schema, something_new=1))
    says = f"{newest}/manifest.json is of schema {schema}, and this version of the code knows schema 3"
    for open_it in (checkpoint.latest, checkpoint.open_checkpoint):
        with pytest.raises(UserError, match=says):
            open_it(three, ONE)
    monkeypatch.setattr("sys.argv", ["verify_checkpoint.py", str(newest)])
    assert verify_checkpoint.main() == 1 and says in capsys.readouterr().out


def test_only_the_newest_is_read_whole(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path.parent.name) or sha256(path))
    latest(three)
    assert read == ["step_00000006"] * 2  # its shard and its state


def test_a_stage_folder_stands_for_its_newest(three: Path) -> None:
    assert checkpoint.open_checkpoint(three, ONE).manifest.step == 6
    with pytest.raises(UserError, match="nowhere is not a whole checkpoint"):
        checkpoint.open_checkpoint(three / "nowhere", ONE)


def test_one_that_another_run_removes_meanwhile_is_named(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = latest(three)
    engine, ema = make()
    before = state(engine, ema)
    found.shards[0].unlink()
    with pytest.raises(
        UserError, match=r"step_00000006 is not a whole checkpoint: rank_00000\.safetensors cannot be read"
    ):
        load(found, engine, ema)
    assert all(torch.equal(before[k], v) for k, v in state(engine, ema).items())
    monkeypatch.setattr(checkpoint, "problem_with", lambda folder, rank, world: None)
    with pytest.raises(UserError, match=r"step_00000006 is not a whole checkpoint: rank_00000\.safetensors is missing"):
        latest(three)


def test_a_stage_folder_that_cannot_be_listed_is_an_error_of_all_ranks(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def list_nothing(folder: Path) -> list[Path]:
        raise PermissionError(f"no look into {folder}")

    monkeypatch.setattr(checkpoint, "step_folders", list_nothing)
    with pytest.raises(UserError, match="no look into"):
        checkpoint.latest(three, ONE)


@pytest.mark.parametrize("layout", ["[]", '{"x": 1}', '{"x": {"shape": ["a"], "start": 0}}', '{"x": {"start": 0}}'])
def test_a_layout_that_is_none_is_damage(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.safetensors"
    tensors = {f"{kind}/x": torch.zeros(1) for kind in ("master", "ema", "exp_avg", "exp_avg_sq")}
    save_file(tensors, path, metadata={"layout": layout})
    with pytest.raises(Damaged, match=r"rank_00000\.safetensors cannot be read"):
        ShardReader([path])


def test_another_architecture_is_named(three: Path) -> None:
    engine, ema = make()
    before = state(engine, ema)
    other = {"model": {"name": "lingen", "mate": {"expand": 2}}, "size": DIT["size"]}
    with pytest.raises(UserError, match=r"model\.mate\.expand=None there, 2 here; model\.name=dit there, lingen here"):
        checkpoint.load(latest(three), engine, ema, carry=RESUME, architecture=other, dist=ONE)
    wide, wide_ema = make(width=6)
    with pytest.raises(UserError, match="does not fit"):
        load(latest(three), wide, wide_ema)
    assert all(torch.equal(before[k], v) for k, v in state(engine, ema).items())


def test_the_export_holds_the_averaged_weights(three: Path, tmp_path: Path) -> None:
    engine, ema = make()
    load(latest(three), engine, ema)
    checkpoint.export(three / "step_00000006", tmp_path / "export", {"model": {"name": "dit"}})
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert weights.keys() == engine.model.state_dict().keys()
    for name, value in checkpoint.assemble(three / "step_00000006", "master").items():
        assert torch.equal(value, engine.model.state_dict()[name])
        assert torch.equal(weights[name].flatten(), ema.averages[name])
        assert not torch.equal(weights[name], value)
    assert yaml.safe_load((tmp_path / "export" / "config.yaml").read_text()) == {"model": {"name": "dit"}}
    assert len(list((tmp_path / "export").iterdir())) == 2
    (three / "step_00000006" / "rank_00000.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        checkpoint.assemble(three / "step_00000006", "ema")


def test_the_script_tells_whole_from_damaged(
    three: Path, python: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["verify_checkpoint.py", str(three / "step_00000006")])
    assert verify_checkpoint.main() == 0 and capsys.readouterr().out == f"{three}/step_00000006: whole\n"
    flip(three / "step_00000004")
    damaged = python("scripts/verify_checkpoint.py", three / "step_00000004")
    assert damaged.returncode == 1 and "does not have the sha256" in damaged.stdout
    monkeypatch.setattr("sys.argv", ["verify_checkpoint.py"])
    with pytest.raises(UserError, match="give the folder of one checkpoint"):
        verify_checkpoint.main()
