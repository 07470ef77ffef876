"""What a stage began with, and which starts would deny it: a checkpoint's past has to be the one on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingen.checkpoint import Checkpoint
from lingen.config import RunConfig, StageConfig
from lingen.curriculum import Progress
from lingen.errors import UserError
from lingen.export import newest_folder
from lingen.manifest import MANIFEST, manifest_digest, read_manifest, step_folders
from lingen.runfolder import run_folder, stage_folder


def lineage_entry(stage: StageConfig, there: Checkpoint | None, progress: Progress) -> dict[str, Any]:
    """What a stage began with."""
    return {
        "stage": stage.name,
        "from_checkpoint": str(there.folder) if there else None,
        "from_sha256": manifest_digest(there.folder) if there else None,
        "from_stage": there.manifest.stage if there else None,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "carry": stage.carry.model_dump() if there else None,
    }


def refuse_other_stage(stage: StageConfig, there: Checkpoint) -> None:
    """Raises:
    UserError: the checkpoint was copied here from another stage, whose counters are not this one's.
    """
    if there.manifest.stage != stage.name:
        raise UserError(
            f"{there.folder} is a checkpoint of stage {there.manifest.stage}, not of {stage.name}; remove it, and name "
            f"it where you want to begin from it: init_from={there.folder}"
        )


def refuse_other_lineage(config: RunConfig, before: list[StageConfig], there: Checkpoint) -> None:
    """A stage goes on only from what it began with. What it began with may be gone, but not be another.

    Raises:
        UserError: the stage before was trained again, or ``init_from`` names another checkpoint than the first time.
    """
    began = there.progress["lineage"][-1]
    sources = possible_sources(config, before)
    if not sources or began["from_sha256"] in [manifest_digest(source) for source in sources]:
        return
    origin = Path(began["from_checkpoint"]) if began["from_checkpoint"] else None
    if origin and not before and not origin.exists() and origin.parent.resolve() == sources[0].parent.resolve():
        return  # pruned since, by a stage that has gone on
    raise UserError(
        f"{there.folder} was not trained from {sources[-1]}; remove {there.folder.parent} to train that stage anew, or "
        "choose another name="
    )


def possible_sources(config: RunConfig, before: list[StageConfig]) -> list[Path]:
    """What a stage may have begun with: the final checkpoint of the stage before, or those that ``init_from`` names."""
    if before:
        newest = newest_folder(stage_folder(config, before[-1].name))
        return [newest] if newest is not None and read_manifest(newest).final else []
    if config.init_from is None:
        return []
    named = Path(config.init_from)
    folders = [named] if (named / MANIFEST).exists() else step_folders(named)
    return [folder for folder in folders if (folder / MANIFEST).exists()]


def refuse_reopening(stage: StageConfig, there: Checkpoint) -> None:
    """Raises:
    UserError: the stage is finished, and now asked to be longer.
    """
    trained = there.progress["progress"]["stage_samples"]
    if there.manifest.final and trained < stage.samples:
        raise UserError(
            f"stages.{stage.name}.samples={stage.samples}, but {there.folder} finished that stage after {trained}; go "
            f"on from it under another name: stage={stage.name} init_from={there.folder}"
        )


def refuse_cutting_off(config: RunConfig, there: Checkpoint | None, step: int) -> None:
    """metrics.jsonl holds one line of steps, and a start, at ``there`` and ``step``, drops those after its own.

    Raises:
        UserError: another stage in the run folder is further than this start.
    """
    own = there.folder.parent if there else None
    for folder in sorted((run_folder(config) / "checkpoints").glob("*")):
        newest = newest_folder(folder)
        further = read_manifest(newest).step if newest else 0
        if further > step and (own is None or folder.resolve() != own.resolve()):
            raise UserError(
                f"name={config.name}: {folder} is at step {further}, further than step {step} where this "
                "would begin, and its records would be lost; choose another name, or remove that folder"
            )
