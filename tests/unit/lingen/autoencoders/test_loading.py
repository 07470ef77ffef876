"""What is said where a VAE of diffusers cannot be loaded, and that nothing else than safetensors is read."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lingen.compose import CONF_DIR, compose
from lingen.errors import UserError
from tests.vaes import load

NAME = "AutoencoderKLWan"
WEIGHTS = "diffusion_pytorch_model.safetensors"
Saved = Callable[[str], Path]


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved(NAME), tmp_path / "vae"))


def refused(folder: Path | str, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(Path(folder), NAME, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_not_here_are_named_with_the_command_that_fetches_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert refused("some-owner/some-model", subfolder="vae") == (
        "autoencoder.path=some-owner/some-model is neither a folder nor fetched; fetch it with: "
        "hf download some-owner/some-model --include 'vae/*'"
    )
    assert refused("some-owner/some-model").endswith("hf download some-owner/some-model")
    assert "there is no such folder" in refused(tmp_path / "nowhere")
    assert "autoencoder.subfolder=vae" in refused(folder.parent)
    assert "has no config.json" in refused(folder, subfolder="vae")
    assert load(folder.parent, NAME, subfolder="vae").channels == 4


def test_a_hub_id_that_was_fetched_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "0" * 40
    model = tmp_path / "cache" / "models--some-owner--some-model"
    shutil.copytree(folder, model / "snapshots" / commit / "vae")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    there = load(Path("some-owner/some-model"), NAME, subfolder="vae")
    assert there.fingerprint == load(folder, NAME).fingerprint
    assert "was fetched without other; fetch it with: hf" in refused("some-owner/some-model", subfolder="other")


def test_other_ratios_are_refused_with_the_right_ones(folder: Path) -> None:
    for key, there in (("channels", 4), ("time", 4), ("space", 8)):
        assert refused(folder, **{key: 2}).endswith(f"has {there}; set autoencoder.{key}={there}")


def test_a_damaged_folder_is_refused(folder: Path) -> None:
    weights, settings = (folder / WEIGHTS).read_bytes(), json.loads((folder / "config.json").read_text())
    tensors = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}  # the file is mapped
    some = sorted(tensors)[0]
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    assert "cannot be loaded" in refused(folder)
    save_file({key: value for key, value in tensors.items() if key != some}, folder / WEIGHTS, {"format": "pt"})
    assert f"1 missing keys, such as {some}" in refused(folder)
    save_file({**tensors, "more": torch.zeros(1)}, folder / WEIGHTS, {"format": "pt"})
    assert "1 unexpected keys, such as more" in refused(folder)
    save_file({**tensors, some: torch.zeros(9)}, folder / WEIGHTS, {"format": "pt"})
    assert "cannot be loaded" in refused(folder)
    (folder / WEIGHTS).write_bytes(weights)
    for written, part in (
        ("not json", "cannot be read"),
        ("[]", "is not a diffusers config"),
        (json.dumps({**settings, "_class_name": "UNet2DModel"}), "holds a UNet2DModel; give a VAE of one of"),
        (json.dumps({**settings, "latents_mean": None}), "that cannot be used"),
        (json.dumps({**settings, "latents_mean": [0.0, 0.0]}), "are 2 means and 4 deviations for 4 channels"),
        (json.dumps({**settings, "latents_std": [1.0, 1.0, 1.0, 0.0]}), "4 deviations for 4 channels"),
    ):
        (folder / "config.json").write_text(written)
        assert part in refused(folder)


class Bomb:
    """Its unpickling leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_no_pickle_is_read(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    assert "must hold the config.json and the safetensors" in refused(folder)
    assert not (tmp_path / "mark").exists()


def test_without_diffusers_the_command_that_installs_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install '.[diffusers]'" in refused(folder)


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKL"])
def test_tiles_in_time_are_refused_where_the_class_needs_none(saved: Saved, name: str) -> None:
    with pytest.raises(UserError, match=rf"autoencoder.tile.frames=5: {name} .*; set it to null"):
        load(saved(name), name, tile={"frames": 5})


def test_every_choice_composes() -> None:
    choices = {path.stem for path in (CONF_DIR / "autoencoder").glob("*.yaml")}
    assert {"pca", "diffusers", "wan", "hunyuan_video", "cogvideox", "ltx", "mochi", "cosmos"} <= choices
    for choice in sorted(choices - {"pca", "tae"}):
        words = ["name=a", "data.path=x", f"autoencoder={choice}", "stages.demo_image.buckets.0.frames=1"]
        words += ["~stages.demo_video", "~stages.demo_video_128"]
        words += ["stages.demo_image.buckets.0.height=512", "stages.demo_image.buckets.0.width=512"]
        if choice == "diffusers":
            words += ["autoencoder.path=y", "autoencoder.channels=4", "autoencoder.time=4", "autoencoder.space=8"]
        assert compose(words).autoencoder.kind == "diffusers"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["autoencoder.dtype=bf16"], "takes neither subfolder nor dtype"),
        (["autoencoder.subfolder=vae"], "takes neither subfolder nor dtype"),
        (["autoencoder.tile={frames: 16}"], "autoencoder.tile.frames=16 is not 8*k + 1, such as 17"),
        (["autoencoder.tile={frames: 1}"], "greater than 1"),
        (["autoencoder.tile={width: 20}"], "autoencoder.tile.width=20 is not a multiple of autoencoder.space=8"),
        (["autoencoder.tile={overlap: 0.6}"], "less than or equal to 0.5"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(["name=a", "data.path=x", "autoencoder.path=y", *words])
    assert part in str(caught.value)
