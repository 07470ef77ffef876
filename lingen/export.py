"""Weights for others to use: the EMA of each finished stage, with the configuration that rebuilds the model.

runs/NAME/export/STAGE/{model.safetensors,config.yaml}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lingen import checkpoint
from lingen.config import Config
from lingen.dist import Dist
from lingen.errors import UserError
from lingen.manifest import MANIFEST, read_manifest, step_folders
from lingen.runfolder import export_folder, read_config, stage_folder
from lingen.shardfiles import Damaged

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"


@dataclass(frozen=True)
class Trained:
    """A model's weights (names to whole fp32 tensors) and where they come from; ``config.stages`` holds one stage."""

    config: Config
    weights: dict[str, torch.Tensor]


def export_finished(config: Config, dist: Dist) -> None:
    """Export every finished stage that is not exported yet: also one whose run died between its last save and this."""
    if dist.rank == 0:
        for name in config.stages:
            out = export_folder(config, name)
            folder = _newest(stage_folder(config, name))
            if folder is None or (out / WEIGHTS).exists() or not read_manifest(folder).final:
                continue
            checkpoint.export(folder, out, _of_stage(config, name).model_dump(mode="json"))
    dist.barrier()


def load_trained(path: Path) -> Trained:
    """The EMA weights of an export, of a run folder (its last finished stage), of a checkpoint or a stage's newest one.

    Raises:
        UserError: there is nothing of the kind, or it is incomplete.
    """
    if (path / CONFIG).exists() and (path / "export").is_dir():
        stages = [name for name in read_config(path / CONFIG).stages if (path / "export" / name / WEIGHTS).exists()]
        if not stages:
            raise UserError(f"{path} has no finished stage; name one of its checkpoints/STAGE folders")
        return load_trained(path / "export" / stages[-1])
    if (path / WEIGHTS).exists():
        try:
            return Trained(read_config(path / CONFIG), load_file(path / WEIGHTS))
        except SafetensorError as error:
            raise UserError(f"{path / WEIGHTS} cannot be read, it may be incomplete: {error}") from error
    folder = path if (path / MANIFEST).exists() else _newest(path)
    if folder is None:
        raise UserError(f"{path} is neither an export ({WEIGHTS} and {CONFIG}), nor a run folder, nor a checkpoint")
    stage = folder.resolve().parent
    config = read_config(stage.parent.parent / CONFIG)
    if stage.name not in config.stages:
        raise UserError(f"{folder}: its run's {CONFIG} does not know the stage {stage.name}; sample from an export")
    return Trained(_of_stage(config, stage.name), checkpoint.assemble(folder, "ema"))


def _newest(stage_dir: Path) -> Path | None:
    """A stage's newest whole checkpoint."""
    for folder in reversed(step_folders(stage_dir)):
        try:
            read_manifest(folder)
        except Damaged:
            continue
        return folder
    return None


def _of_stage(config: Config, name: str) -> Config:
    return config.model_copy(update={"stages": {name: config.stages[name]}, "init_from": None})
