"""What a checkpoint's folder must hold, and whether it does. Pure functions of the folder.

STAGE_DIR/step_00000123/{rank_00000.safetensors, ..., state.json, manifest.json}
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from lingen.errors import UserError
from lingen.files import sha256
from lingen.shardfiles import Damaged, ShardReader

MANIFEST, STATE = "manifest.json", "state.json"
SCHEMA = 3
STEP_FOLDER = re.compile(r"step_\d{8,}")


class FileEntry(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint is; written last, so that its presence means that all the rest is there."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int = SCHEMA
    stage: str
    step: int
    samples: int
    tokens: int
    final: bool  # the stage ended here
    regular: bool  # saved where the schedule says, not because a signal came
    kept: bool  # never pruned: the stage's end, or one that is kept for good
    world_size: int
    zero_stage: int
    adam_steps: int
    architecture: dict[str, Any]
    files: dict[str, FileEntry]
    complete: bool
    digest: str = ""  # of all the above, so that no number here can change unnoticed

    def sealed(self) -> Manifest:
        """The same with its digest."""
        content = self.model_dump_json(exclude={"digest"})
        return self.model_copy(update={"digest": hashlib.sha256(content.encode()).hexdigest()})


def problem_with(folder: Path, rank: int = 0, world: int = 1) -> str | None:
    """Why ``folder`` is not a whole checkpoint, or None; each rank checks its share of the files' sha256.

    Raises:
        UserError: it is of another schema than ours.
    """
    try:
        manifest = read_manifest(folder)
        for number, (name, entry) in enumerate(sorted(manifest.files.items())):
            if number % world == rank and sha256(folder / name) != entry.sha256:
                return f"{name} does not have the sha256 of the manifest"
        if rank == 0:
            ShardReader(shard_paths(folder, manifest)).__exit__(None, None, None)
    except Damaged as damage:
        return str(damage)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest, once all its files are there in their size.

    Raises:
        Damaged: it is missing or not whole.
        UserError: it is of another schema than ours.
    """
    manifest = parse_manifest(folder)
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != entry.size:
            raise Damaged(f"{name} has {path.stat().st_size} bytes, not {entry.size}")
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """What the manifest says, whatever became of its files.

    Raises:
        Damaged: it is missing or not whole.
        UserError: it is of another schema than ours. That is no damage: an older checkpoint must not take its place.
    """
    try:
        text = (folder / MANIFEST).read_text()
        content = json.loads(text)
        if isinstance(content, dict) and content.get("schema_version", SCHEMA) != SCHEMA:
            raise UserError(
                f"{folder / MANIFEST} is of schema {content['schema_version']}, and this version of the code knows "
                f"schema {SCHEMA}; go on with the version that wrote it, or begin a new run"
            )
        manifest = Manifest.model_validate_json(text)
    except FileNotFoundError as error:
        raise Damaged(f"no {MANIFEST}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} cannot be read") from error
    if not manifest.complete:
        raise Damaged(f"{MANIFEST} says complete=False")
    ranks = range(min(manifest.world_size, len(manifest.files)))  # a damaged number may be any
    expected = {STATE} | {f"rank_{rank:05d}.safetensors" for rank in ranks}
    if manifest.files.keys() != expected:
        raise Damaged(f"{MANIFEST} does not list the files of {manifest.world_size} ranks")
    if manifest != manifest.sealed():
        raise Damaged(f"{MANIFEST} was changed")
    if STEP_FOLDER.fullmatch(folder.name) and step_of(folder) != manifest.step:
        raise Damaged(f"{MANIFEST} is of step {manifest.step}")
    return manifest


def manifest_digest(folder: Path) -> str:
    """Names a checkpoint by its content: the manifest holds the sha256 of all its files."""
    return sha256(folder / MANIFEST)


def shard_paths(folder: Path, manifest: Manifest) -> list[Path]:
    """The tensor files of all ranks."""
    return [folder / name for name in sorted(manifest.files) if name.endswith(".safetensors")]


def step_folders(stage_dir: Path) -> list[Path]:
    """The folders that look like checkpoints, oldest first."""
    if not stage_dir.is_dir():
        return []
    found = [p for p in stage_dir.iterdir() if p.is_dir() and STEP_FOLDER.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))
