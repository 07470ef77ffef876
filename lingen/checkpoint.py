"""Checkpoints on the disk: find the newest whole one, load it into any engine, export it, let old ones go.

``lingen.saver`` writes them: in a hidden folder that appears by one rename. Nothing is pickled, and nothing depends on
the number of ranks or the ZeRO level that wrote it. ``lingen.manifest`` says what a folder must hold,
``lingen.shardfiles`` how the tensors lie in it.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors.torch import save_file

from lingen.config import CarryConfig
from lingen.dist import Dist
from lingen.ema import Ema
from lingen.engine import Engine
from lingen.errors import UserError
from lingen.files import rename, sync_path, write_file
from lingen.manifest import (
    MANIFEST,
    STATE,
    Manifest,
    parse_manifest,
    problem_with,
    read_manifest,
    shard_paths,
    step_folders,
    step_of,
)
from lingen.shardfiles import Damaged, ShardReader

RESUME = CarryConfig(weights="model", ema="carry", optimizer="carry")  # go on exactly where the checkpoint was taken
SAVING, REPLACED, PRUNED = ".saving_", ".replaced_", ".pruned_"  # prefixes of folders that are not checkpoints

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were checked against their sha256 (``latest`` and ``open_checkpoint`` make these)."""

    folder: Path
    manifest: Manifest
    progress: dict[str, Any]  # what the loop gave to ``Saver.start``

    @property
    def shards(self) -> list[Path]:
        """The files of all ranks."""
        return shard_paths(self.folder, self.manifest)


def latest(stage_dir: Path, dist: Dist, *, only: Callable[[Path], bool] = lambda folder: True) -> Checkpoint | None:
    """The newest whole checkpoint of a stage among ``only`` some, or None where there is none at all. Collective.

    The ranks share the work of checking the files. A damaged checkpoint is skipped with a warning.

    Raises:
        UserError: there are checkpoints, but none is whole: a restart from zero would be silent loss; or the newest is
            of another schema: to go on from an older one would in time overwrite it.
    """

    def find() -> list[str]:
        return [folder.name for folder in step_folders(stage_dir) if only(folder)] if dist.rank == 0 else []

    names, problems = dist.gather(dist.together(find))[0], []
    for name in reversed(names):
        problem = _check_together(stage_dir / name, dist)
        if problem is None:
            return _read(stage_dir / name, dist)
        problems.append(f"{name}: {problem}")
        if dist.rank == 0:
            _warn_of_damage(stage_dir / name, problem)
    if problems:
        raise UserError(
            f"{stage_dir} has checkpoints but none can be loaded ({'; '.join(problems)}); "
            "restore one, or remove the folder to train the stage anew"
        )
    return None


def discard_after(stage_dir: Path, step: int, dist: Dist) -> None:
    """Remove the checkpoints of a stage that are further than ``step``. Collective.

    Raises:
        UserError: they cannot be removed.
    """

    def remove() -> None:
        for folder in reversed(step_folders(stage_dir)) if dist.rank == 0 else ():
            if step_of(folder) > step:
                _remove(_hide(folder))

    dist.together(remove)


def may_be_regular(folder: Path) -> bool:
    """Whether a checkpoint was saved where the schedule says; also where nobody can tell, for ``latest`` to say so."""
    try:
        return parse_manifest(folder).regular
    except Damaged:
        return True


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
    return _read(path, dist)


@torch.no_grad()
def load(
    checkpoint: Checkpoint, engine: Engine, ema: Ema, *, carry: CarryConfig, architecture: dict[str, Any], dist: Dist
) -> None:
    """Bring into the engine and the average what ``carry`` says (``RESUME``: everything, exactly). Collective.

    A fresh average starts as the weights; a fresh optimizer at step 0 without momentum.

    Raises:
        UserError: the checkpoint is of another architecture, or was damaged since it was checked.
    """
    refuse_other_architecture(checkpoint, architecture)
    weights = "ema" if carry.weights == "ema" else "master"
    with dist.together(lambda: _whole(checkpoint.folder, lambda: ShardReader(checkpoint.shards))) as reader:
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
    with _whole(folder, lambda: ShardReader(shard_paths(folder, read_manifest(folder)))) as reader:
        return reader.whole(kind)


def export(folder: Path, out_dir: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint's EMA weights as out_dir/model.safetensors beside the config.yaml that rebuilds the model."""
    out_dir.mkdir(parents=True, exist_ok=True)
    write_file(out_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    aside = out_dir / ".model.safetensors.tmp"
    save_file(assemble(folder, "ema"), aside)
    sync_path(aside)
    rename(aside, out_dir / "model.safetensors")


def prune(saved: Path, keep_last: int) -> None:
    """Keep the ``keep_last`` newest whole checkpoints up to ``saved``, as many regular ones, and those ``kept``.

    What is further than ``saved`` was passed over as damaged, and stays as evidence, as does what cannot be read. A
    checkpoint that cannot be removed costs room and a warning, not the run. For rank 0 alone.
    """
    stage_dir, whole, regular = saved.parent, 0, 0
    with _costing_room():
        for folder in reversed(step_folders(stage_dir)):
            if step_of(folder) > step_of(saved):
                continue
            with _costing_room(), suppress(Damaged, UserError):  # for a person to look at
                manifest = parse_manifest(folder)
                if whole < keep_last or (manifest.regular and regular < keep_last):
                    read_manifest(folder)
                    whole, regular = whole + 1, regular + manifest.regular
                elif not manifest.kept:  # without a look at the files of all that are kept for good
                    _hide(folder)
        for path in stage_dir.glob(f"{PRUNED}*"):  # also what an earlier call could not remove
            with _costing_room():
                _remove(path)


@contextmanager
def _costing_room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.warning("a checkpoint that is not kept could not be removed, and takes room: %s", error)


def _hide(folder: Path) -> Path:
    """Take a checkpoint out of sight, at once, so that a crash leaves no half of it. Returns where it is now."""
    hidden = folder.with_name(f"{PRUNED}{folder.name}")
    folder.rename(hidden)
    return hidden


def _remove(folder: Path) -> None:
    """With all that is in it; where somebody linked to it, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def sweep(stage_dir: Path, dist: Dist) -> None:
    """Clear away what a killed process left behind, before ``latest`` looks. Collective, at the start of a run.

    Raises:
        UserError: it cannot be removed (on all ranks).
    """

    def clear() -> None:
        for path in sorted(stage_dir.glob(f"{REPLACED}*")) if dist.rank == 0 else ():
            original = stage_dir / path.name.removeprefix(REPLACED)
            if not original.exists():
                path.rename(original)  # killed between the two renames of a replacement
        for prefix in (SAVING, REPLACED, PRUNED) if dist.rank == 0 else ():
            for path in stage_dir.glob(f"{prefix}*"):
                _remove(path)

    dist.together(clear)


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


def _read(folder: Path, dist: Dist) -> Checkpoint:
    def read() -> Checkpoint:
        return Checkpoint(folder, read_manifest(folder), json.loads((folder / STATE).read_text()))

    return dist.together(lambda: _whole(folder, read))


def _whole(folder: Path, action: Callable[[], T]) -> T:
    """What ``action`` reads from a checkpoint, which another run may be removing. Raises a UserError where it is."""
    try:
        return action()
    except Damaged as damage:
        raise UserError(f"{folder} is not a whole checkpoint: {damage}") from damage


def _warn_of_damage(folder: Path, problem: str) -> None:
    """On stderr whatever logs say, and wide enough to be seen among them."""
    text = f"""
{"!" * 100}
!!! CHECKPOINT DAMAGED: {folder}
!!! {problem}
!!! The one before it is tried. What was trained after that is trained again.
{"!" * 100}"""
    print(text, file=sys.stderr, flush=True)


def _check_together(folder: Path, dist: Dist) -> str | None:
    problem = dist.together(lambda: problem_with(folder, dist.rank, dist.world))
    return next((p for p in dist.gather(problem) if p), None)


def swap_in(aside: Path, folder: Path) -> None:
    """Make ``aside`` appear as ``folder``, in place of what may be there; ``sweep`` mends a half-done replacement."""
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    try:
        rename(aside, folder)
    except OSError:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
