"""A model of a few weights, some steps of its training, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lingen import checkpoint
from lingen.checkpoint import RESUME
from lingen.config import CarryConfig, EmaConfig, EngineConfig, OptimConfig
from lingen.dist import Dist
from lingen.ema import Ema
from lingen.engine import Engine, make_engine
from lingen.saver import Saver

ONE = Dist(0, 1, 0, torch.device("cpu"))
DIT = {"model": {"name": "dit"}, "size": {"d_model": 8, "patch": (1, 2, 2)}}


def make(seed: int = 0, dtype: str = "fp32", width: int = 5, dist: Dist = ONE) -> tuple[Engine, Ema]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3))
    engine = make_engine(model, EngineConfig(dtype=dtype), OptimConfig(), dist)  # type: ignore[arg-type]
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


def make_saver(dist: Dist = ONE, writers: int = 0) -> Saver:
    return Saver(dist, writers=writers, may_publish=lambda: None)


def begin(saver: Saver, stage: Path, step: int, engine: Engine, ema: Ema, **more: Any) -> None:
    """Start to save ``step``."""
    words: dict[str, Any] = {
        "final": False,
        "regular": True,
        "kept": False,
        "keep_last": 99,
        "progress": {"position": {"step": step}},
    }
    saver.start(
        stage, step=step, samples=8 * step, tokens=80 * step, architecture=DIT, engine=engine, ema=ema, **(words | more)
    )


def save(stage: Path, step: int, engine: Engine, ema: Ema, **more: Any) -> Path:
    """Save ``step``, alone and at once."""
    one = make_saver()
    begin(one, stage, step, engine, ema, **more)
    folder = one.finish()
    assert folder is not None
    return folder


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
