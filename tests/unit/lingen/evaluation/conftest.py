"""Run folders as sampling writes them, of rendered clips that are spoilt by noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.synthetic import render_clip
from lingen.evaluation.folder import Asked, RunFile, begin_run, write_video

Make = Callable[..., Path]
FRAMES, SIZE = 9, 32


def clip(number: int) -> tuple[torch.Tensor, str]:
    """(3, 9, 32, 32) uint8 and its caption."""
    pixels, caption = render_clip(5, number, frames=FRAMES, size=SIZE)
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).contiguous(), caption


def spoilt(video: torch.Tensor, noise: float, number: int) -> torch.Tensor:
    """The video with Gaussian noise of so many levels of 255."""
    rng = np.random.default_rng(number)
    off = torch.from_numpy(rng.normal(0, noise, video.shape))
    return (video + off).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Write the run ``name``; what else is given overrides a field of run.json."""

    def make(
        name: str, *, noise: float = 0.0, count: int = 4, flops: int = 10**12, seconds: float = 2.0, **fields: Any
    ) -> Path:
        folder = tmp_path / "runs" / name
        asked = [Asked(prompt=clip(n)[1], seed=n) for n in range(count)]
        usual: dict[str, Any] = {
            "settings": {"steps": 30}, "machine": "test", "frames": FRAMES, "height": SIZE, "width": SIZE, "fps": 8.0,
            "videos": asked,
        }  # fmt: skip
        file = RunFile.model_validate({"name": name} | usual | fields)
        for n in begin_run(folder, file):
            cost = {
                "prompt": file.videos[n].prompt, "seed": file.videos[n].seed, "batch": 1, "denoise_seconds": seconds,
                "seconds": seconds + 0.5, "flops": flops + n * 10**9, "peak_memory": 10**9, "cache": None,
            }  # fmt: skip
            write_video(folder, n, spoilt(clip(n)[0], noise, n), file.fps, cost)
        return folder

    return make
