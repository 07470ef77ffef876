"""Weights for others to use: the EMA of each finished stage, with the configuration that rebuilds the model.

runs/NAME/export/STAGE/{model.safetensors,config.yaml,export.json}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from lingen import checkpoint
from lingen.config import Config, RunConfig, StageConfig
from lingen.dist import Dist
from lingen.errors import UserError
from lingen.manifest import MANIFEST, STATE, manifest_digest, problem_with, read_manifest, step_folders
from lingen.models import Backbone, make_model
from lingen.runfolder import export_folder, read_config, stage_folder, write_aside
from lingen.shardfiles import Damaged

WEIGHTS, CONFIG, ORIGIN = "model.safetensors", "config.yaml", "export.json"
Write = Callable[[Path, Path, StageConfig, torch.device], None]  # checkpoint, where to, of which stage


class Origin(BaseModel):
    """Where exported weights come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stage: str
    step: int
    samples: int
    tokens: int
    checkpoint_sha256: str  # of the checkpoint's manifest
    autoencoder_fingerprint: str = ""  # "" and {}: of an autoencoder, which has neither before it
    text_fingerprint: dict[str, str] = {}  # by encoder
    lineage: list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """A model's weights (names to whole fp32 tensors) and where they come from; ``config.stages`` holds one stage."""

    folder: Path  # of the export or the checkpoint
    config: Config
    weights: dict[str, torch.Tensor]
    origin: Origin


def export_finished(config: RunConfig, dist: Dist, write: Write) -> None:
    """Export every finished stage whose export is not there or is of other weights. Collective.

    ``write`` puts the weights of the checkpoint in a folder, and the config.yaml, into another.

    So a run that died between its last save and this is mended by the next start.

    Raises:
        UserError: it cannot be written.
    """

    def export_all() -> None:
        for name in config.stages if dist.rank == 0 else ():
            _export(config, config.stages[name], write, dist.device)

    dist.together(export_all)


def _export(config: RunConfig, stage: StageConfig, write: Write, device: torch.device) -> None:
    name = stage.name
    out, folder = export_folder(config, name), newest_folder(stage_folder(config, name))
    if folder is None or not read_manifest(folder).final:
        return
    digest = manifest_digest(folder)
    there = _read_origin(out)
    is_there = all((out / part).exists() for part in (WEIGHTS, CONFIG))
    if is_there and there is not None and there.checkpoint_sha256 == digest:
        return
    if problem := problem_with(folder):  # where this is the run's last stage, the start goes on from the one before
        print(f"warning: {name} is not exported: {folder}: {problem}", file=sys.stderr, flush=True)
        return
    origin = _origin(folder, name)
    (out / ORIGIN).unlink(missing_ok=True)
    write(folder, out, stage, device)
    write_aside(out / ORIGIN, origin.model_dump_json(indent=1))  # last: without it the export is made again


def _origin(folder: Path, stage: str) -> Origin:
    """That of a checkpoint of a stage."""
    manifest, state = read_manifest(folder), json.loads((folder / STATE).read_text())
    return Origin(
        stage=stage,
        step=manifest.step,
        samples=manifest.samples,
        tokens=manifest.tokens,
        checkpoint_sha256=manifest_digest(folder),
        lineage=state["lineage"],
        **{key: state[key] for key in ("autoencoder_fingerprint", "text_fingerprint") if key in state},
    )


def _read_origin(export: Path) -> Origin | None:
    try:
        return Origin.model_validate_json((export / ORIGIN).read_bytes())
    except (OSError, ValidationError):
        return None  # not there, or not whole: the export is not finished


def load_trained(path: Path) -> Trained:
    """The EMA weights of an export, of a run folder (its last finished stage), of a checkpoint or a stage's newest one.

    Raises:
        UserError: there is nothing of the kind, or it is incomplete.
    """
    folder, config = find_trained(path)
    if folder == _export_in(folder):
        origin = _read_origin(folder)
        assert origin is not None  # find_trained has seen it
        try:
            return Trained(folder, config, load_file(folder / WEIGHTS), origin)
        except SafetensorError as error:
            raise UserError(f"{folder / WEIGHTS} cannot be read, it may be incomplete: {error}") from error
    if problem := problem_with(folder):
        raise UserError(f"{folder} is not a whole checkpoint: {problem}")
    origin = _origin(folder, folder.resolve().parent.name)
    return Trained(folder, config, checkpoint.assemble(folder, "ema"), origin)


def trained_model(trained: Trained) -> Backbone:
    """The model with those weights.

    Raises:
        UserError: they are another architecture's.
    """
    config = trained.config
    with torch.device("meta"):
        model = make_model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in trained.weights.items()}
    wrong = sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name))
    if wrong:
        has, wants = (shapes.get(wrong[0], "missing") for shapes in (there, expected))
        raise UserError(
            f"{trained.folder}: its weights are of another architecture than its configuration, which is "
            f"{config.model.name} of {config.depth} layers; {len(wrong)} tensors differ, such as {wrong[0]}: {has}, "
            f"not {wants}"
        )
    model.load_state_dict(trained.weights, assign=True)
    return model


def find_trained(path: Path) -> tuple[Path, Config]:
    """The folder of the export or of the checkpoint that ``path`` stands for, and its configuration with one stage; the
    weights are not looked at.

    Raises:
        UserError: there is nothing of the kind, or it is incomplete.
    """
    if (export := _export_in(path)) is not None:
        if _read_origin(export) is None:
            raise UserError(f"{export / ORIGIN} is missing or damaged; the export is incomplete, copy it again")
        config = read_config(export / CONFIG)
        if len(config.stages) != 1:
            raise UserError(f"{export / CONFIG} has {len(config.stages)} stages, and an export is of one")
        return export, config
    if (path / CONFIG).exists():
        raise UserError(f"{path} has no finished stage; name one of its checkpoints/STAGE folders")
    folder = path if (path / MANIFEST).exists() else newest_folder(path)
    if folder is None:
        raise UserError(f"{path} is neither an export ({WEIGHTS} and {CONFIG}), nor a run folder, nor a checkpoint")
    stage = folder.resolve().parent
    config = read_config(stage.parent.parent / CONFIG)
    if stage.name not in config.stages:
        raise UserError(f"{folder}: its run's {CONFIG} does not know the stage {stage.name}; sample from an export")
    return folder, of_stage(config, stage.name)


def _export_in(path: Path) -> Path | None:
    """``path`` where it is an export, or that of the last finished stage of a run; None where there is none.

    Raises:
        UserError: it is one, and one of its files is missing.
    """
    missing = [name for name in (WEIGHTS, CONFIG, ORIGIN) if not (path / name).exists()]
    if not missing:
        return path
    if missing != [WEIGHTS, ORIGIN] and len(missing) < 3:
        raise UserError(f"{path / missing[0]} is missing or damaged; the export is incomplete, copy it again")
    if CONFIG in missing:
        return None
    stages = [name for name in read_config(path / CONFIG).stages if (path / "export" / name / WEIGHTS).exists()]
    return _export_in(path / "export" / stages[-1]) if stages else None


def newest_folder(stage_dir: Path) -> Path | None:
    """A stage's newest whole checkpoint."""
    for folder in reversed(step_folders(stage_dir)):
        try:
            read_manifest(folder)
        except Damaged:
            continue
        return folder
    return None


def of_stage(config: Config, name: str) -> Config:
    """``config`` with that stage alone, which needs nothing before it."""
    return config.model_copy(update={"stages": {name: config.stages[name]}, "init_from": None})
