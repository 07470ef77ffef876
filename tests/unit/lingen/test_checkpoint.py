from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from lingen import checkpoint
from lingen.checkpoint import RESUME
from lingen.config import CarryConfig, EmaConfig, EngineConfig, OptimConfig
from lingen.dist import Dist
from lingen.ema import Ema
from lingen.engine import Engine, make_engine
from lingen.errors import UserError

ROOT = Path(__file__).parents[3]
ONE = Dist(0, 1, 0, torch.device("cpu"))
DIT = {"model": {"name": "dit"}, "size": {"d_model": 8, "patch": (1, 2, 2)}}


def make(seed: int = 0, dtype: str = "fp32", width: int = 5) -> tuple[Engine, Ema]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3))
    engine = make_engine(model, EngineConfig(dtype=dtype), OptimConfig(), ONE)  # type: ignore[arg-type]
    return engine, Ema(engine.fragments(), EmaConfig(halflife_samples=64))


def train(engine: Engine, ema: Ema, start: int, end: int) -> list[float]:
    losses = []
    for step in range(start, end):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)
        dtype = next(engine.model.parameters()).dtype
        loss = (engine.model(x.to(dtype)).float() - y).square().mean()
        engine.backward(loss)
        engine.step(1e-2)
        ema.update(8 * (step + 1), 8)
        losses.append(loss.item())
    return losses


def save(stage: Path, step: int, engine: Engine, ema: Ema, final: bool = False) -> Path:
    return checkpoint.save(
        stage,
        step=step,
        samples=8 * step,
        tokens=80 * step,
        progress={"position": {"step": step}},
        architecture=DIT,
        final=final,
        engine=engine,
        ema=ema,
        dist=ONE,
    )


def latest(stage: Path) -> checkpoint.Checkpoint:
    found = checkpoint.latest(stage, ONE)
    assert found is not None
    return found


def load(found: checkpoint.Checkpoint, engine: Engine, ema: Ema, carry: CarryConfig = RESUME) -> None:
    checkpoint.load(found, engine, ema, carry=carry, architecture=DIT, dist=ONE)


def state(engine: Engine, ema: Ema) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for f in engine.fragments():
        parts = {"master": f.master, "exp_avg": f.exp_avg, "exp_avg_sq": f.exp_avg_sq, "ema": ema.averages[f.name]}
        out |= {f"{kind}/{f.name}": part.clone() for kind, part in parts.items()}
    return out


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


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (flip, "sha256"),
    "truncated": (truncate, "bytes, not"),
    "missing shard": (lambda f: (f / "rank_00000.safetensors").unlink(), "rank_00000.safetensors is missing"),
    "missing state": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "edited state": (lambda f: (f / "state.json").write_text('{"position": {"step": 7}}'), "state.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"no manifest\.json"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"stage": '), r"manifest\.json cannot be read"),
    "incomplete": (lambda f: edit(f, lambda t: t.update(complete=False)), "complete=False"),
    "outside": (lambda f: edit(f, lambda t: t["files"].update({"../x": {"size": 1, "sha256": ""}})), "does not list"),
    "forgotten shard": (lambda f: edit(f, lambda t: t["files"].pop("rank_00000.safetensors")), "does not list"),
    "other numbers": (lambda f: edit(f, lambda t: t.update(adam_steps=60)), "was changed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_skipped_loudly(three: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    damage, reason = DAMAGE[kind]
    damage(three / "step_00000006")
    assert latest(three).manifest.step == 4
    assert "step_00000006" in caplog.text
    with pytest.raises(UserError, match=reason):
        checkpoint.open_checkpoint(three / "step_00000006", ONE)


def test_all_damaged_is_an_error_and_no_new_start(three: Path) -> None:
    for folder in three.iterdir():
        flip(folder)
    with pytest.raises(UserError, match=r"none can be loaded.*step_00000006.*step_00000002"):
        checkpoint.latest(three, ONE)


def test_a_stage_folder_stands_for_its_newest(three: Path) -> None:
    assert checkpoint.open_checkpoint(three, ONE).manifest.step == 6
    with pytest.raises(UserError, match="nowhere is not a whole checkpoint"):
        checkpoint.open_checkpoint(three / "nowhere", ONE)


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


def test_a_full_disk_leaves_the_older_ones_whole(three: Path) -> None:
    engine, ema = make()
    before = sorted(p.name for p in three.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(UserError, match=r"step_00000008 could not be written \(rank 0: .*earlier checkpoints"):
            save(three, 8, engine, ema)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in three.iterdir()) == before
    assert latest(three).manifest.step == 6


def test_saving_a_step_again_replaces_it(three: Path) -> None:
    engine, ema = make(seed=5)
    flip(three / "step_00000006")
    save(three, 6, engine, ema, final=True)
    assert latest(three).manifest.final
    assert sorted(p.name for p in three.iterdir()) == ["step_00000002", "step_00000004", "step_00000006"]


def test_pruning_keeps_the_newest_and_the_final_one(tmp_path: Path) -> None:
    engine, ema = make()
    for step in (1, 2, 3, 4):
        save(tmp_path, step, engine, ema, final=step == 1)
    truncate(tmp_path / "step_00000004")
    checkpoint.prune(tmp_path / "step_00000003", 1)
    # The damaged one is no checkpoint: it neither counts as kept nor is it removed.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003", "step_00000004"]


def test_sweeping_removes_leftovers_and_mends_a_half_done_replacement(three: Path) -> None:
    (three / ".saving_step_00000008").mkdir()
    (three / ".pruned_step_00000001").mkdir()
    (three / "step_00000006").rename(three / ".replaced_step_00000006")
    (three / "step_00000004").rename(three / ".replaced_step_00000004")
    engine, ema = make()
    save(three / "elsewhere", 4, engine, ema)
    (three / "elsewhere" / "step_00000004").rename(three / "step_00000004")
    (three / "elsewhere").rmdir()
    checkpoint.sweep(three, ONE)
    assert sorted(p.name for p in three.iterdir()) == ["step_00000002", "step_00000004", "step_00000006"]
    assert latest(three).manifest.step == 6
    checkpoint.sweep(three / "nowhere", ONE)


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


def test_the_script_tells_whole_from_damaged(three: Path) -> None:
    flip(three / "step_00000004")
    runs = [
        subprocess.run(
            [sys.executable, ROOT / "scripts" / "verify_checkpoint.py", *words], capture_output=True, text=True
        )
        for words in ([three / "step_00000006"], [three / "step_00000004"], [])
    ]
    assert [run.returncode for run in runs] == [0, 1, 2]
    assert "sha256" in runs[1].stdout
    assert "Traceback" not in runs[2].stderr


# Kills itself before the n-th time that something is made to last, or renamed, or removed, for every n.
KILLED = """
import os, pathlib, shutil, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_checkpoint as t
from lingen import checkpoint, shardfiles
stage = pathlib.Path({stage!r})
engine, ema = t.make()
t.train(engine, ema, 0, 1)
t.save(stage, 1, engine, ema)
t.train(engine, ema, 1, 2)
before = t.save(stage, 2, engine, ema)
t.train(engine, ema, 2, 3)
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
        moments = {{shardfiles: "sync sha256", checkpoint: "sync sha256", shutil: "rmtree"}}
        moments[pathlib.Path] = "rename write_text mkdir"
        for module, names in moments.items():
            for name in names.split():
                setattr(module, name, dying(getattr(module, name), left))
        t.save(stage, {step}, engine, ema)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    checkpoint.sweep(stage, t.ONE)
    found = t.latest(stage)
    print(n, os.WIFSIGNALED(status), found.manifest.step, found.manifest.adam_steps, sorted(os.listdir(stage)))
    if status == 0:
        break
"""


@pytest.mark.parametrize("step", [3, 2])
def test_killed_at_any_moment_of_a_save(tmp_path: Path, step: int) -> None:
    """Saving a new step, and replacing one: what is found is the old one or the new one, and nothing is left over."""
    code = KILLED.format(tests=str(Path(__file__).parent), stage=str(tmp_path / "stage"), step=step)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) >= 10 and " False " in lines[-1]
    seen = {tuple(line.split()[2:4]) for line in lines}
    assert seen == {("2", "2"), (str(step), "3")}
    for line in lines:
        folders = line[line.index("[") :]
        assert "step_00000002" in folders and "." not in folders
