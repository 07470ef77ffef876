"""The loader's benchmark measures what it says, on a small world."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data.batch import Bucket
from data.shards import load_index
from data.workers import Job
from lingen.bench import data
from lingen.config import DataConfig
from lingen.errors import UserError
from scripts import bench
from tests.conftest import World


def test_the_last_line_has_rates_ratios_and_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "LATENTS", Bucket(9, 64, 64))
    monkeypatch.setattr(data, "STORED", 32)
    words = ["height=64", "width=64", "clips=16", "rounds=2", "opened=24", "workers=1", "passes=2"]
    monkeypatch.setattr("sys.argv", ["bench.py", "data", f"data={world.shards}", *words])
    bench.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["workers"] == 1 and result["opened"] == 24 and result["bucket"] == "17x64x64"
    assert 0 <= result["rss_growth_bytes"] < 500 << 20
    assert result["latent_bytes"] > 16 * 2 * 8 * 8 * 2  # with its header
    for rate, bare, prefix in (
        ("frames_per_s", "raw_frames_per_s", ""),
        ("latent_bytes_per_s", "tar_bytes_per_s", "latent_"),
        ("latent_memory_bytes_per_s", "tar_memory_bytes_per_s", "latent_memory_"),
    ):
        assert result[rate] > 0 and result[bare] > 0 and result[prefix + "cpu_ratio"] > 0
        by_medians = result[rate] / result[bare]
        assert 0.2 < result[prefix + "ratio"] / by_medians < 5


def test_the_rendered_world_is_measured_unscaled_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LATENTS", Bucket(9, 64, 64))
    monkeypatch.setattr(data, "STORED", 16)
    monkeypatch.setattr(data, "_render", lambda folder: world.shards)
    words = data.DataWords(height=32, width=32, clips=8, rounds=1, opened=8, workers=1, passes=1)
    result = data.run(words)
    assert result["bucket"] == "17x32x32" and result["unscaled"]["bucket"] == "17x64x64"
    assert result["unscaled"]["ratio"] > 0


def test_holes_are_not_timed(world: World) -> None:
    job = Job(Bucket(170, 8, 8), 8.0, np.zeros(1, dtype=np.int64), np.zeros(1), np.arange(1))
    with pytest.raises(RuntimeError, match="too short"):
        data._load(load_index(world.shards), DataConfig(path=str(world.shards), workers=1), [job, job])


def test_what_cannot_be_measured_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="no clip fills frames=170"):
        data.run(data.DataWords(data=str(world.shards), frames=170))
