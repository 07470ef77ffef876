from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lingen.compose import compose
from lingen.errors import UserError
from lingen.export import load_trained, newest_folder
from lingen.manifest import FileEntry, Manifest, step_of
from lingen.runfolder import dump_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with nothing but its config.yaml."""
    config = compose(["name=a", "data.path=x", "autoencoder.path=y"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    return tmp_path


def write_checkpoint(folder: Path) -> Path:
    """Empty files, and a manifest that fits them."""
    folder.mkdir(parents=True)
    names = ["rank_00000.safetensors", "state.json"]
    for name in names:
        (folder / name).touch()
    manifest = Manifest(
        stage=folder.parent.name, step=step_of(folder), samples=0, tokens=0, final=False, regular=True, kept=False,
        world_size=1, zero_stage=0, adam_steps=0, architecture={}, complete=True,
        files={name: FileEntry(size=0, sha256="") for name in names},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.sealed().model_dump_json())
    return folder


def test_a_run_without_a_finished_stage_says_what_to_name(run: Path) -> None:
    with pytest.raises(UserError, match="has no finished stage; name one of its checkpoints/STAGE folders"):
        load_trained(run)


def test_an_export_that_was_not_finished_is_refused(run: Path) -> None:
    save_file({"weight": torch.zeros(1)}, run / "model.safetensors")
    with pytest.raises(UserError, match=r"export\.json is missing or damaged; the export is incomplete"):
        load_trained(run)
    (run / "export.json").write_text('{"stage": "demo_image"}')
    with pytest.raises(UserError, match=r"export\.json is missing or damaged"):
        load_trained(run)


def test_a_checkpoint_of_a_stage_that_the_run_forgot_is_refused(run: Path) -> None:
    folder = write_checkpoint(run / "checkpoints" / "gone" / "step_00000001")
    for path in (folder, folder.parent):
        with pytest.raises(UserError, match=r"config\.yaml does not know the stage gone; sample from an export"):
            load_trained(path)


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest_folder(tmp_path / "nowhere") is None
    old, new, newest = (write_checkpoint(tmp_path / "stage" / f"step_{n:08d}") for n in (9, 10, 100_000_000))
    assert newest_folder(tmp_path / "stage") == newest
    (newest / "state.json").unlink()
    assert newest_folder(tmp_path / "stage") == new
    (new / "manifest.json").write_text("{")
    assert newest_folder(tmp_path / "stage") == old
