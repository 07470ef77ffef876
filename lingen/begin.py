"""Where a stage begins: at a checkpoint of its own (resumption), at the final one of another stage (transfer), or at
the initialization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.pipeline import Position, StageLoader
from data.shards import Index
from lingen import checkpoint
from lingen.autoencoder import load_autoencoder
from lingen.config import CarryConfig, Config, StageConfig
from lingen.curriculum import Progress
from lingen.dist import Dist
from lingen.ema import Ema
from lingen.engine import make_engine
from lingen.errors import UserError
from lingen.models import make_model
from lingen.runfolder import architecture, run_folder, stage_folder
from lingen.step import Networks
from lingen.text import load_text_encoder

RESUME = CarryConfig(weights="model", ema="carry", optimizer="carry")


@dataclass(frozen=True)
class Start:
    """The checkpoint that a stage begins with, if any, and whether it is the stage's own."""

    folder: Path | None
    resume: bool


@dataclass
class StageState:
    """What the steps of a stage change."""

    networks: Networks
    ema: Ema
    loader: StageLoader
    progress: Progress
    lineage: list[dict[str, Any]]  # one entry a stage: which checkpoint it began with, and after how much


def find_start(config: Config) -> tuple[list[StageConfig], Start]:
    """(the stages still to do, where the first of them begins). Rerunning a command resumes.

    Raises:
        UserError: ``init_from`` or the newest checkpoint cannot be used, or is of another architecture.
    """
    remaining = list(config.stages.values())
    start = Start(checkpoint.resolve(config.init_from) if config.init_from else None, resume=False)
    while remaining:
        folder = checkpoint.latest(stage_folder(config, remaining[0].name))
        if folder is None:
            break
        final = checkpoint.read_manifest(folder).final
        start = Start(folder, resume=not final)
        if start.resume:
            break
        remaining.pop(0)
    if start.folder is not None:
        checkpoint.refuse_other_architecture(start.folder, architecture(config))
    return remaining, start


def read_progress(start: Start) -> Progress:
    """The counters that a stage begins with; all but its own run on from the stage before."""
    if start.folder is None:
        return Progress()
    progress = Progress(**checkpoint.read_state(start.folder)["progress"])
    return progress if start.resume else progress.enter_stage()


def begin_stage(config: Config, stage: StageConfig, start: Start, index: Index, dist: Dist) -> StageState:
    """Build the model in its engine, fill both from ``start``, and open the data at the right place."""
    torch.manual_seed(config.seed)
    text = load_text_encoder(config.text, dist.device)
    autoencoder = load_autoencoder(config.autoencoder, dist.device)
    model = make_model(config, text_dim=text.dim)
    engine = make_engine(model, config.engine, config.optim, dist)
    ema = Ema(engine.fragments(), config.ema)
    progress = read_progress(start)
    position, lineage = Position(), []
    if start.folder is not None:
        there = checkpoint.read_state(start.folder)
        refuse_other_encoders(start.folder, there, autoencoder.fingerprint)
        checkpoint.load(start.folder, engine, ema, carry=RESUME if start.resume else stage.carry, dist=dist)
        lineage = there["lineage"]
        if start.resume:
            refuse_other_data(start.folder, there, config.data.path, index)
            position = Position.from_dict(there["position"])
    if not start.resume:
        lineage = [*lineage, lineage_entry(stage, start, progress)]
    loader = StageLoader(
        index,
        stage,
        config.data,
        seed=config.seed,
        rank=dist.rank,
        world=dist.world,
        grad_accumulation=config.engine.grad_accumulation,
        position=position,
        bad_log=run_folder(config) / "bad_samples.jsonl",
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.engine.dtype]
    return StageState(Networks(engine, model, autoencoder, text, dist.device, dtype), ema, loader, progress, lineage)


def lineage_entry(stage: StageConfig, start: Start, progress: Progress) -> dict[str, Any]:
    """What a stage began with."""
    return {
        "stage": stage.name,
        "from_checkpoint": str(start.folder) if start.folder else None,
        "from_stage": checkpoint.read_manifest(start.folder).stage if start.folder else None,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "carry": stage.carry.model_dump() if start.folder else None,
    }


def refuse_other_data(folder: Path, there: dict[str, Any], path: str, index: Index) -> None:
    """In the middle of a stage the position is a place in an order of these very samples.

    Raises:
        UserError: the shards changed since the checkpoint.
    """
    if there["data_fingerprint"] != index.fingerprint:
        raise UserError(
            f"data.path={path} does not hold the samples that {folder} was trained on (fingerprint "
            f"{index.fingerprint[:12]}, not {there['data_fingerprint'][:12]}); restore them, or begin a new run"
        )


def refuse_other_encoders(folder: Path, there: dict[str, Any], fingerprint: str) -> None:
    """Weights are worth nothing in another latent space.

    Raises:
        UserError: the autoencoder is not the one that the checkpoint was trained with.
    """
    if there["autoencoder_fingerprint"] != fingerprint:
        raise UserError(
            f"autoencoder.path holds another autoencoder (fingerprint {fingerprint[:12]}) than {folder} was trained "
            f"with ({there['autoencoder_fingerprint'][:12]}); name that one"
        )
