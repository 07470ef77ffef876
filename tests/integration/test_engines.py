"""All engines against each other, on one and on two processes, through checkpoints that change hands.

This file is also the program that runs in those processes (see ``work``): three launches serve all tests.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from lingen import checkpoint
from lingen.config import EmaConfig, EngineConfig, OptimConfig
from lingen.dist import Dist, init
from lingen.ema import Ema
from lingen.engine import Engine, make_engine
from lingen.errors import UserError
from lingen.saver import Saver

STEPS, SAVED_AT, BATCH = 20, 10, 8
ARCHITECTURE = {"d": 7}
EngineKey = tuple[str, int]  # (kind, ZeRO level)
ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
DTYPES = ["fp32", "bf16"]
# Who goes on from whose checkpoint, on another number of processes.
HEIRS = [
    (("torch", 0), ("deepspeed", 1)),
    (("deepspeed", 0), ("deepspeed", 3)),
    (("deepspeed", 1), ("deepspeed", 2)),
    (("deepspeed", 2), ("torch", 0)),
    (("deepspeed", 3), ("deepspeed", 3)),
    (("deepspeed", 3), ("deepspeed", 1)),
    (("deepspeed", 1), ("deepspeed", 3)),
    (("deepspeed", 2), ("deepspeed", 0)),
]
COMBINATIONS = [(engine, dtype) for engine in ENGINES for dtype in DTYPES]
CROSSINGS = [(heir, source, dtype) for heir, source in HEIRS for dtype in DTYPES]


def key(engine: EngineKey, dtype: str) -> str:
    return f"{engine[0]}{engine[1]}-{dtype}"


class Tiny(nn.Module):
    """Odd widths, so that partitions cut through parameters; one recomputed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 7))
        self.labels = nn.Embedding(5, 7)
        self.norm = nn.LayerNorm(7)
        self.up = nn.Linear(7, 13)
        self.down = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = x.to(self.up.weight.dtype)  # (B, 7)
        x = self.norm(x + self.labels(label) + self.table[label % 3])  # (B, 7)
        x = recompute(lambda y: torch.tanh(self.up(y)), x, use_reentrant=False)  # (B, 13)
        out: torch.Tensor = self.down(x).float()  # (B, 3)
        return out


Measured = list[tuple[float, float]]  # (loss, gradient norm) of each step


def make(dist: Dist, kind: EngineKey, dtype: str, *, accumulation: int = 2, seed: int = 0) -> tuple[Engine, Ema]:
    torch.manual_seed(seed + 100 * dist.rank)  # rank 0's weights must win
    config = EngineConfig(kind=kind[0], zero_stage=kind[1], dtype=dtype, grad_accumulation=accumulation)  # type: ignore[arg-type]
    engine = make_engine(Tiny(), config, OptimConfig(grad_clip=0.5), dist)
    return engine, Ema(engine.fragments(), EmaConfig(halflife_samples=50))


def train(dist: Dist, engine: Engine, ema: Ema, start: int, end: int, *, accumulation: int = 2) -> Measured:
    measured = []
    for step in range(start, end):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 7, generator=g), torch.randn(BATCH, 3, generator=g)
        label = torch.randint(0, 5, (BATCH,), generator=g)
        total, rows = torch.zeros(()), BATCH // dist.world // accumulation
        for micro in range(accumulation):
            first = (dist.rank * accumulation + micro) * rows
            part = slice(first, first + rows)
            loss = (engine.model(x[part], label[part]) - y[part]).square().mean(1).sum() / BATCH
            engine.backward(loss)
            total += loss.detach()
        norm = engine.step(1e-2)
        ema.update(BATCH * (step + 1), BATCH)
        dist.all_reduce_sum(total)
        measured.append((total.item(), norm))
    return measured


def save(dist: Dist, folder: Path, engine: Engine, ema: Ema, *, step: int) -> None:
    saver = Saver(dist, writers=0, may_publish=lambda: None)
    saver.start(
        folder, step=step, samples=BATCH * step, tokens=0, progress={}, architecture=ARCHITECTURE, final=False,
        regular=True, kept=False, keep_last=99, engine=engine, ema=ema,
    )  # fmt: skip
    saver.finish()


def inherit(dist: Dist, folder: Path, engine: Engine, ema: Ema) -> None:
    """Go on from the newest checkpoint, whoever saved it."""
    found = checkpoint.latest(folder, dist)
    assert found is not None
    checkpoint.load(found, engine, ema, carry=checkpoint.RESUME, architecture=ARCHITECTURE, dist=dist)


def digest(dist: Dist, engine: Engine, ema: Ema) -> list[str]:
    """Of all state, one a rank."""
    content = hashlib.sha256()
    for f in engine.fragments():
        for part in (f.master, f.exp_avg, f.exp_avg_sq, ema.averages[f.name]):
            content.update(part.numpy().tobytes())
    return dist.gather(content.hexdigest())


def leave_out(dist: Dist, engine: Engine, ema: Ema, poison: float) -> dict[str, Any]:
    """A step that every rank must leave out: by a gradient of one rank times ``poison``, or on request."""
    before, steps = digest(dist, engine, ema), engine.steps
    asked: list[float] = []
    for micro in range(2):
        loss = engine.model(torch.ones(1, 7), torch.zeros(1, dtype=torch.long)).sum()
        engine.backward(loss * poison if dist.rank == dist.world - 1 and micro == 1 else loss)
    norm = engine.step(1e-2, lambda norm: bool(asked.append(norm) or True))
    return {
        "finite": math.isfinite(norm), "asked": asked == [norm] if asked else None,
        "same": digest(dist, engine, ema) == before, "steps": engine.steps - steps,
    }  # fmt: skip


@contextmanager
def full_disk(*, here: bool) -> Iterator[None]:
    """Where ``here``, a write beyond 1,000 bytes fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def meet_troubles(dist: Dist, folder: Path) -> dict[str, Any]:
    """One rank cannot write; then one file is damaged: what every rank hears of it."""
    engine, ema = make(dist, ("torch", 0), "fp32")
    heard: list[str] = []
    left: list[Any] = []
    save(dist, folder, engine, ema, step=1)
    with full_disk(here=dist.rank == 1):
        try:
            save(dist, folder, engine, ema, step=2)
        except UserError as error:
            heard.append(str(error))
    left.append(sorted(p.name for p in folder.iterdir()))
    dist.barrier()
    save(dist, folder, engine, ema, step=3)
    dist.barrier()
    if dist.rank == 0:
        (folder / "step_00000003" / "rank_00001.safetensors").write_bytes(b"")
    dist.barrier()
    found = checkpoint.latest(folder, dist)
    left.append(found.manifest.step if found else None)
    dist.barrier()
    if dist.rank == 0:
        (folder / "step_00000001" / "rank_00001.safetensors").unlink()
    dist.barrier()
    try:
        checkpoint.latest(folder, dist)
    except UserError as error:
        heard.append(str(error))
    return {"heard": dist.gather(heard), "left": dist.gather(left)}


def train_and_resume(dist: Dist, folder: Path, kind: EngineKey, dtype: str) -> dict[str, Any]:
    """All steps with a checkpoint in between, and those after it once more, by a new engine that loads it."""
    engine, ema = make(dist, kind, dtype)
    measured = train(dist, engine, ema, 0, SAVED_AT)
    save(dist, folder, engine, ema, step=SAVED_AT)
    measured += train(dist, engine, ema, SAVED_AT, STEPS)
    ends = digest(dist, engine, ema)
    refused = [leave_out(dist, engine, ema, times) for times in (math.nan, 1e3)]
    after = train(dist, engine, ema, STEPS, STEPS + 1), digest(dist, engine, ema)
    engine.close()
    engine, ema = make(dist, kind, dtype, seed=7)
    inherit(dist, folder, engine, ema)
    resumed = train(dist, engine, ema, SAVED_AT, STEPS)
    result = {
        "measured": measured, "resumed": resumed, "same state": digest(dist, engine, ema) == ends,
        "refused": refused, "level": engine.zero_stage,
        "no trace": after == (train(dist, engine, ema, STEPS, STEPS + 1), digest(dist, engine, ema)),
    }  # fmt: skip
    engine.close()
    return result


def train_on_whole_batches(dist: Dist, kind: EngineKey) -> Measured:
    """All steps without accumulation."""
    engine, ema = make(dist, kind, "fp32", accumulation=1)
    measured = train(dist, engine, ema, 0, STEPS, accumulation=1)
    engine.close()
    return measured


def go_on_from(dist: Dist, folder: Path, heir: EngineKey, dtype: str) -> Measured:
    """The steps after another engine's checkpoint."""
    engine, ema = make(dist, heir, dtype, seed=3)
    inherit(dist, folder, engine, ema)
    measured = train(dist, engine, ema, SAVED_AT, STEPS)
    engine.close()
    return measured


def work(out: Path, tasks: list[str]) -> None:
    """Run ``tasks`` ('train', 'inherit') in this process and its siblings; rank 0 writes what came out."""
    torch.set_num_threads(1)
    dist = init("cpu")
    results: dict[str, Any] = {}
    if dist.world > 1:
        results["troubles"] = meet_troubles(dist, out / "troubles")
    for kind, dtype in COMBINATIONS if "train" in tasks else ():
        name = key(kind, dtype)
        results[name] = train_and_resume(dist, out / f"world{dist.world}" / name, kind, dtype)
        if dtype == "fp32":
            results[name]["whole batch"] = train_on_whole_batches(dist, kind)
    for heir, source, dtype in CROSSINGS if "inherit" in tasks else ():
        folder = out / f"world{3 - dist.world}" / key(source, dtype)
        results[f"{key(heir, dtype)} from {key(source, dtype)}"] = go_on_from(dist, folder, heir, dtype)
    if dist.rank == 0:
        (out / f"{'-'.join(tasks)}{dist.world}.json").write_text(json.dumps(results))
    dist.close()


def launch(out: Path, processes: int, *tasks: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID")}
    run = subprocess.run(
        [sys.executable, *torchrun, __file__, str(out), *tasks],
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("engines")
    launch(out, 1, "train")
    launch(out, 2, "train", "inherit")
    launch(out, 1, "inherit")
    one, two, back = (json.loads((out / f"{n}.json").read_text()) for n in ("train1", "train-inherit2", "inherit1"))
    return {"one": one, "two": two, "back": back}


def differ(a: Measured, b: Measured) -> float:
    """The greatest relative difference, over losses and gradient norms."""
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    return float(((x - y).abs() / y.abs()).max())


@pytest.mark.parametrize("world", ["one", "two"])
@pytest.mark.parametrize(("engine", "dtype"), COMBINATIONS)
def test_resuming_is_exact_to_the_bit(results: dict[str, Any], world: str, engine: EngineKey, dtype: str) -> None:
    result = results[world][key(engine, dtype)]
    assert result["resumed"] == result["measured"][SAVED_AT:]
    assert result["same state"]
    assert result["level"] == engine[1]


@pytest.mark.parametrize("world", ["one", "two"])
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_level_trains_as_plain_torch_does(results: dict[str, Any], world: str, engine: EngineKey) -> None:
    assert differ(results[world][key(engine, "fp32")]["measured"], results[world]["torch0-fp32"]["measured"]) < 1e-5
    # Level 0 adds its gradients up in bf16, the others in fp32.
    limit = 2e-2 if engine[1] == 0 else 1e-5
    assert differ(results[world][key(engine, "bf16")]["measured"], results[world]["torch0-bf16"]["measured"]) < limit


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_does(results: dict[str, Any], engine: EngineKey) -> None:
    name = key(engine, "fp32")
    assert differ(results["two"][name]["measured"], results["one"][name]["measured"]) < 1e-5
    assert differ(results["two"][name]["whole batch"], results["one"][name]["measured"]) < 1e-5
    assert differ(results["one"][name]["whole batch"], results["one"][name]["measured"]) < 1e-5


@pytest.mark.parametrize("world", ["one", "two"])
@pytest.mark.parametrize(("engine", "dtype"), COMBINATIONS)
def test_a_refused_step_leaves_no_trace_on_any_rank(
    results: dict[str, Any], world: str, engine: EngineKey, dtype: str
) -> None:
    result = results[world][key(engine, dtype)]
    assert result["refused"] == [
        {"finite": False, "asked": None, "same": True, "steps": 0},
        {"finite": True, "asked": True, "same": True, "steps": 0},
    ]
    assert result["no trace"]  # of either: the next step is that of an engine which knew of none


@pytest.mark.parametrize(("world", "source_world"), [("two", "one"), ("back", "two")])
@pytest.mark.parametrize(("heir", "source", "dtype"), CROSSINGS)
def test_another_engine_on_other_processes_goes_on(
    results: dict[str, Any], world: str, source_world: str, heir: EngineKey, source: EngineKey, dtype: str
) -> None:
    went_on = results[world][f"{key(heir, dtype)} from {key(source, dtype)}"]
    uninterrupted = results[source_world][key(source, dtype)]["measured"][SAVED_AT:]
    assert differ(went_on, uninterrupted) < (1e-5 if dtype == "fp32" else 2e-2)


def test_all_ranks_hear_of_the_trouble_of_one(results: dict[str, Any]) -> None:
    troubles = results["two"]["troubles"]
    (unwritten, unreadable), other = troubles["heard"]
    assert other == [unwritten, unreadable]
    assert "step_00000002 could not be written (rank 1: " in unwritten
    assert "none can be loaded" in unreadable and "rank_00001.safetensors is missing" in unreadable
    assert troubles["left"] == [[["step_00000001"], 1]] * 2


def test_the_training_does_something(results: dict[str, Any]) -> None:
    """Else all the above would agree on nothing."""
    measured = results["one"]["torch0-fp32"]["measured"]
    assert len({loss for loss, _ in measured}) == STEPS and max(norm for _, norm in measured) > 0.5


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
