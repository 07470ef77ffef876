"""A training in the latents of a VAE of diffusers, in tiles, and a video from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.compose import compose
from lingen.errors import UserError
from lingen.loop import train
from lingen.pipeline import LinGenPipeline
from tests.runs import Signal, lines
from tests.vaes import load, save

NAME = "AutoencoderKLWan"


def test_a_run_trains_resumes_and_samples_in_its_latents(world: Any, tmp_path: Path) -> None:
    vae, run = save(tmp_path, NAME), tmp_path / "run"

    def start(path: Path, tile: str, stop_at: int | None = None) -> None:
        words = [
            "name=run", f"runs_dir={tmp_path}", *world.words[:2], "logger.console=false", "model=lingen",
            "autoencoder=diffusers", f"autoencoder.path={path}", "autoencoder.channels=4", "autoencoder.time=4",
            "autoencoder.space=8", f"autoencoder.tile={tile}", "stage=demo_video", "stage.samples=16",
            "stage.buckets=[{frames: 13, height: 48, width: 64, batch_size: 4}]",
            "validation.every_steps=2", "checkpoint.every_steps=2",
        ]  # fmt: skip
        train(compose(words), Signal(run, stop_at))  # type: ignore[arg-type]

    start(vae, "{frames: null, height: 32, width: 32, overlap: 0.5}", stop_at=2)
    other = save(tmp_path / "other", NAME, latents_std=[1.0] * 4)
    with pytest.raises(UserError, match=r"autoencoder.path holds another autoencoder .* than .* was trained with"):
        start(other, "null")
    moved = vae.rename(tmp_path / "moved")
    start(moved, "null")  # where it lies and its tiles may change
    losses = [record["loss"] for record in lines(run, "train")]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    with pytest.raises(UserError, match="there is no such folder"):
        LinGenPipeline.from_pretrained(run, autoencoder=str(vae))
    pipeline = LinGenPipeline.from_pretrained(run)
    assert pipeline.autoencoder.fingerprint == load(moved, NAME).fingerprint
    video = pipeline(["a red ball"], num_inference_steps=2, progress=False).frames
    assert video.shape == (1, 3, 13, 48, 64) and video.dtype == torch.uint8
    pipeline.save_pretrained(tmp_path / "saved")
    moved.rename(tmp_path / "gone")
    assert (
        LinGenPipeline.from_pretrained(tmp_path / "saved").autoencoder.fingerprint == pipeline.autoencoder.fingerprint
    )
