"""Where a stage begins: at a checkpoint of its own (resumption), at the final one of another stage (transfer), or at
the initialization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.pipeline import Position, StageLoader
from data.shards import Index, load_index
from lingen import checkpoint
from lingen.autoencoder import Autoencoder, load_autoencoder
from lingen.checkpoint import RESUME, Checkpoint
from lingen.config import Config, StageConfig
from lingen.curriculum import Progress
from lingen.dist import Dist
from lingen.ema import Ema
from lingen.engine import make_engine
from lingen.errors import UserError
from lingen.models import make_model
from lingen.runfolder import architecture, run_folder, stage_folder
from lingen.step import Networks
from lingen.text import TextEncoder, load_text_encoder


@dataclass(frozen=True)
class Start:
    """The checkpoint that a stage begins with, if any, and whether it is the stage's own."""

    checkpoint: Checkpoint | None
    resume: bool

    @property
    def progress(self) -> Progress:
        """The counters that the stage begins with; all but its own run on from the stage before."""
        if self.checkpoint is None:
            return Progress()
        progress = Progress(**self.checkpoint.progress["progress"])
        return progress if self.resume else progress.enter_stage()


@dataclass(frozen=True)
class Inputs:
    """What stands before the model, in every stage: the clips and the two frozen networks that read them."""

    index: Index
    autoencoder: Autoencoder
    text: TextEncoder


@dataclass
class StageState:
    """What the steps of a stage change."""

    networks: Networks
    ema: Ema
    loader: StageLoader
    progress: Progress
    lineage: list[dict[str, Any]]  # one entry a stage: which checkpoint it began with, and after how much


def load_inputs(config: Config, dist: Dist) -> Inputs:
    """Raises:
    UserError: the shards, the autoencoder or the text encoder are not there, or not what the configuration says.
    """
    return Inputs(
        load_index(config.data.path),
        load_autoencoder(config.autoencoder, dist.device),
        load_text_encoder(config.text, dist.device),
    )


def find_start(config: Config, inputs: Inputs, dist: Dist) -> tuple[list[StageConfig], Start]:
    """(the stages still to do, where the first of them begins). Rerunning a command resumes. Collective.

    Raises:
        UserError: ``init_from`` or the newest checkpoint cannot be used, is of another architecture, or was trained
            on what the inputs no longer are.
    """
    remaining = list(config.stages.values())
    start = Start(None, resume=False)
    if config.init_from is not None:
        start = Start(checkpoint.open_checkpoint(Path(config.init_from), dist), resume=False)
    while remaining:
        folder = stage_folder(config, remaining[0].name)
        checkpoint.sweep(folder, dist)
        newest = checkpoint.latest(folder, dist)
        if newest is None:
            break
        start = Start(newest, resume=not newest.manifest.final)
        if start.resume:
            break
        remaining.pop(0)
    if start.checkpoint is not None:
        checkpoint.refuse_other_architecture(start.checkpoint, architecture(config))
        refuse_other_encoders(start.checkpoint, inputs.autoencoder.fingerprint)
        if start.resume:
            refuse_other_data(start.checkpoint, config.data.path, inputs.index)
    return remaining, start


def begin_stage(config: Config, stage: StageConfig, start: Start, inputs: Inputs, dist: Dist) -> StageState:
    """Build the model in its engine, fill both from ``start``, and open the data at the right place. Collective."""
    torch.manual_seed(config.seed)
    there = start.checkpoint
    model = make_model(config, text_dim=inputs.text.dim)
    engine = make_engine(model, config.engine, config.optim, dist)
    ema = Ema(engine.fragments(), config.ema)
    lineage: list[dict[str, Any]] = []
    if there is not None:
        carry = RESUME if start.resume else stage.carry
        checkpoint.load(there, engine, ema, carry=carry, architecture=architecture(config), dist=dist)
        lineage = there.progress["lineage"]
    if not start.resume:
        lineage = [*lineage, lineage_entry(stage, start)]
    loader = StageLoader(
        inputs.index,
        stage,
        config.data,
        seed=config.seed,
        rank=dist.rank,
        world=dist.world,
        grad_accumulation=config.engine.grad_accumulation,
        position=Position.from_dict(there.progress["position"]) if there and start.resume else None,
        bad_log=run_folder(config) / "bad_samples.jsonl",
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.engine.dtype]
    return StageState(
        Networks(engine, model, inputs.autoencoder, inputs.text, dist.device, dtype),
        ema,
        loader,
        start.progress,
        lineage,
    )


def lineage_entry(stage: StageConfig, start: Start) -> dict[str, Any]:
    """What a stage began with."""
    there = start.checkpoint
    return {
        "stage": stage.name,
        "from_checkpoint": str(there.folder) if there else None,
        "from_stage": there.manifest.stage if there else None,
        "samples": start.progress.samples,
        "tokens": start.progress.tokens,
        "carry": stage.carry.model_dump() if there else None,
    }


def refuse_other_data(there: Checkpoint, path: str, index: Index) -> None:
    """In the middle of a stage the position is a place in an order of these very samples.

    Raises:
        UserError: the shards changed since the checkpoint.
    """
    before = there.progress["data_fingerprint"]
    if before != index.fingerprint:
        raise UserError(
            f"data.path={path} does not hold the samples that {there.folder} was trained on (fingerprint "
            f"{index.fingerprint[:12]}, not {before[:12]}); restore them, or begin a new run"
        )


def refuse_other_encoders(there: Checkpoint, fingerprint: str) -> None:
    """Weights are worth nothing in another latent space.

    Raises:
        UserError: the autoencoder is not the one that the checkpoint was trained with.
    """
    before = there.progress["autoencoder_fingerprint"]
    if before != fingerprint:
        raise UserError(
            f"autoencoder.path holds another autoencoder (fingerprint {fingerprint[:12]}) than {there.folder} was "
            f"trained with ({before[:12]}); name that one"
        )
