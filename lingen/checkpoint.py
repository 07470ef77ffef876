"""Checkpoints that are complete or invisible: save, find the newest whole one, load into any engine, export, prune.

A save writes into a hidden folder, makes every file last, writes the manifest, and appears by one rename. Nothing is
pickled, and nothing depends on the number of ranks or the ZeRO level that wrote it. ``lingen.manifest`` says what a
folder must hold, ``lingen.shardfiles`` how the tensors lie in it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from lingen.config import CarryConfig
from lingen.dist import Dist
from lingen.ema import Ema
from lingen.engine import Engine
from lingen.errors import UserError
from lingen.manifest import (
    MANIFEST,
    STATE,
    FileEntry,
    Manifest,
    problem_with,
    read_manifest,
    shard_paths,
    step_folders,
    step_of,
)
from lingen.shardfiles import Damaged, ShardReader, sha256, sync, write_shard, write_synced

RESUME = CarryConfig(weights="model", ema="carry", optimizer="carry")  # go on exactly where the checkpoint was taken
SAVING, REPLACED, PRUNED = ".saving_", ".replaced_", ".pruned_"  # prefixes of folders that are not checkpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were checked against their sha256 (``latest`` and ``open_checkpoint`` make these)."""

    folder: Path
    manifest: Manifest
    progress: dict[str, Any]  # what the loop gave to ``save``

    @property
    def shards(self) -> list[Path]:
        """The files of all ranks."""
        return shard_paths(self.folder, self.manifest)


def save(
    stage_dir: Path,
    *,
    step: int,
    samples: int,
    tokens: int,
    progress: dict[str, Any],
    architecture: dict[str, Any],
    final: bool,
    engine: Engine,
    ema: Ema,
    dist: Dist,
) -> Path:
    """Write stage_dir/step_XXXXXXXX; it replaces one of the same step. Collective.

    Raises:
        UserError: some rank could not write (on all ranks). Nothing that was there before is touched then.
    """
    folder = stage_dir / f"step_{step:08d}"
    aside = stage_dir / f"{SAVING}{folder.name}"
    shard = aside / f"rank_{dist.rank:05d}.safetensors"

    def prepare() -> None:
        if dist.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def publish() -> None:
        if dist.rank == 0:
            write_synced(aside / STATE, json.dumps(progress, indent=1))
            files = {f"rank_{rank:05d}.safetensors": entry for rank, entry in enumerate(entries)}
            files[STATE] = {"size": (aside / STATE).stat().st_size, "sha256": sha256(aside / STATE)}
            manifest = Manifest(
                stage=stage_dir.name,
                step=step,
                samples=samples,
                tokens=tokens,
                final=final,
                world_size=dist.world,
                zero_stage=engine.zero_stage,
                adam_steps=engine.steps,
                architecture=architecture,
                files={name: FileEntry(**entry) for name, entry in files.items()},
                complete=True,
            )
            write_synced(aside / MANIFEST, manifest.sealed().model_dump_json(indent=1))
            sync(aside)
            _swap_in(aside, folder)

    _together(dist, aside, folder, prepare)
    entries = _together(dist, aside, folder, lambda: write_shard(shard, engine.fragments(), ema))
    _together(dist, aside, folder, publish)
    return folder


def latest(stage_dir: Path, dist: Dist) -> Checkpoint | None:
    """The newest whole checkpoint of a stage, or None where there is none at all. Collective.

    The ranks share the work of checking the files. A damaged checkpoint is skipped with a warning.

    Raises:
        UserError: there are checkpoints, but none is whole: a restart from zero would be silent loss.
    """
    names: list[str] = dist.gather([folder.name for folder in step_folders(stage_dir)])[0]
    problems = []
    for name in reversed(names):
        problem = _check_together(stage_dir / name, dist)
        if problem is None:
            return _read(stage_dir / name)
        problems.append(f"{name}: {problem}")
        if dist.rank == 0:
            log.warning("CHECKPOINT DAMAGED, trying the one before: %s: %s", stage_dir / name, problem)
    if problems:
        raise UserError(
            f"{stage_dir} has checkpoints but none can be loaded ({'; '.join(problems)}); "
            "restore one, or remove the folder to train the stage anew"
        )
    return None


def open_checkpoint(path: Path, dist: Dist) -> Checkpoint:
    """The checkpoint at ``path``: a step's folder, or a stage's, of which it takes the newest. Collective.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if step_folders(path) and not (path / MANIFEST).exists():
        found = latest(path, dist)
        assert found is not None
        return found
    problem = _check_together(path, dist)
    if problem is not None:
        raise UserError(f"{path} is not a whole checkpoint: {problem}")
    return _read(path)


@torch.no_grad()
def load(
    checkpoint: Checkpoint, engine: Engine, ema: Ema, *, carry: CarryConfig, architecture: dict[str, Any], dist: Dist
) -> None:
    """Bring into the engine and the average what ``carry`` says (``RESUME``: everything, exactly). Collective.

    A fresh average starts as the weights; a fresh optimizer at step 0 without momentum.

    Raises:
        UserError: the checkpoint is of another architecture.
    """
    refuse_other_architecture(checkpoint, architecture)
    weights = "ema" if carry.weights == "ema" else "master"
    with ShardReader(checkpoint.shards) as reader:
        here = {f.name: f.shape for f in engine.fragments()}
        wrong = sorted(name for name, shape in here.items() if reader.shapes.get(name) != shape)
        if dist.any(bool(wrong)):  # together, so that no rank waits for another in refresh
            raise UserError(f"{checkpoint.folder} does not fit the model: {wrong[:3] or 'see the other ranks'}")
        for f in engine.fragments():
            where = (f.name, f.start, f.master.numel())
            f.master.copy_(reader.read(weights, *where))
            for kind, moment in (("exp_avg", f.exp_avg), ("exp_avg_sq", f.exp_avg_sq)):
                if carry.optimizer == "carry":
                    moment.copy_(reader.read(kind, *where))
                else:
                    moment.zero_()
            if carry.ema == "carry":
                ema.averages[f.name].copy_(reader.read("ema", *where))
    if carry.ema == "fresh":
        ema.restart()
    engine.steps = checkpoint.manifest.adam_steps if carry.optimizer == "carry" else 0
    engine.refresh()


def assemble(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """All parameters of a checkpoint, whole, fp32, on the CPU; ``kind`` is 'master' or 'ema'.

    Raises:
        UserError: it is not a whole checkpoint.
    """
    try:
        with ShardReader(shard_paths(folder, read_manifest(folder))) as reader:
            return reader.whole(kind)
    except Damaged as damage:
        raise UserError(f"{folder} is not a whole checkpoint: {damage}") from damage


def export(folder: Path, out_dir: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint's EMA weights as out_dir/model.safetensors beside the config.yaml that rebuilds the model."""
    out_dir.mkdir(parents=True, exist_ok=True)
    config_aside, weights_aside = out_dir / ".config.yaml.tmp", out_dir / ".model.safetensors.tmp"
    write_synced(config_aside, yaml.safe_dump(config, sort_keys=False))
    save_file(assemble(folder, "ema"), weights_aside)
    sync(weights_aside)
    config_aside.replace(out_dir / "config.yaml")
    weights_aside.replace(out_dir / "model.safetensors")
    sync(out_dir)


def prune(saved: Path, keep_last: int) -> None:
    """Remove all but ``saved``, the ``keep_last`` - 1 whole checkpoints before it, and the stage's final one.

    What is further than ``saved`` was passed over as damaged, and stays as evidence. For rank 0 alone.
    """
    stage_dir, whole = saved.parent, []
    for folder in step_folders(stage_dir):
        if step_of(folder) > step_of(saved):
            continue
        try:
            whole.append((folder, read_manifest(folder).final))
        except Damaged:
            continue  # evidence for a person; it does not count as kept
    for folder, final in whole[: max(0, len(whole) - keep_last)]:
        if not final:
            doomed = stage_dir / f"{PRUNED}{folder.name}"
            folder.rename(doomed)  # gone at once, so that a crash leaves no half of it
            shutil.rmtree(doomed)


def sweep(stage_dir: Path, dist: Dist) -> None:
    """Clear away what a killed process left behind, before ``latest`` looks. Collective, at the start of a run."""
    if dist.rank == 0:
        for path in sorted(stage_dir.glob(f"{REPLACED}*")):
            original = stage_dir / path.name.removeprefix(REPLACED)
            if not original.exists():
                path.rename(original)  # killed between the two renames of a replacement
        for prefix in (SAVING, REPLACED, PRUNED):
            for path in stage_dir.glob(f"{prefix}*"):
                shutil.rmtree(path)
    dist.barrier()


def refuse_other_architecture(checkpoint: Checkpoint, architecture: dict[str, Any]) -> None:
    """Raises a UserError that names the keys in which the checkpoint's architecture differs."""
    there, here = _flat(checkpoint.manifest.architecture), _flat(json.loads(json.dumps(architecture)))
    keys = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    if keys:
        found = "; ".join(f"{k}={there.get(k)} there, {here.get(k)} here" for k in keys)
        raise UserError(f"{checkpoint.folder} holds another architecture: {found}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read(folder: Path) -> Checkpoint:
    return Checkpoint(folder, read_manifest(folder), json.loads((folder / STATE).read_text()))


def _check_together(folder: Path, dist: Dist) -> str | None:
    return next((p for p in dist.gather(problem_with(folder, dist.rank, dist.world)) if p), None)


def _together(dist: Dist, aside: Path, folder: Path, action: Callable[[], Any]) -> list[Any]:
    """What ``action`` returned on every rank, once all are done; where one failed, all fail and the rest is removed."""
    value, error = None, None
    try:
        value = action()
    except (OSError, SafetensorError) as failure:
        error = f"rank {dist.rank}: {failure}"
    outcomes = dist.gather([value, error])
    errors = [e for _, e in outcomes if e]
    if errors:
        if dist.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        raise UserError(f"{folder} could not be written ({'; '.join(errors)}); earlier checkpoints are untouched")
    return [v for v, _ in outcomes]


def _swap_in(aside: Path, folder: Path) -> None:
    """Make ``aside`` appear as ``folder``; ``sweep`` undoes a half-done replacement."""
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    aside.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
