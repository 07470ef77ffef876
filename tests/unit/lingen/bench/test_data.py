"""The loader's benchmark measures what it says, on a small world."""

from __future__ import annotations

import pytest

from data.batch import Bucket
from lingen.bench import data
from lingen.errors import UserError
from tests.conftest import World


def test_rates_ratios_and_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LATENTS", Bucket(9, 64, 64))
    words = data.DataWords(data=str(world.shards), height=64, width=64, clips=8, rounds=2, opened=24, workers=1)
    result = data.run(words)
    assert result["workers"] == 1 and result["opened"] == 24 and result["bucket"] == "17x64x64"
    assert result["frames_per_s"] > 0 and result["raw_frames_per_s"] > 0
    by_medians = result["frames_per_s"] / result["raw_frames_per_s"]
    assert 0 < result["ratio"] < 10 and 0.2 < result["ratio"] / by_medians < 5
    assert 0 <= result["rss_growth_bytes"] < 500 << 20
    assert result["latent_bytes_per_s"] > 0 and result["tar_bytes_per_s"] > 0 and result["latent_ratio"] > 0
    assert result["latent_bytes"] > 16 * 2 * 8 * 8 * 2  # with its header


def test_what_cannot_be_measured_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="no clip fills frames=170"):
        data.run(data.DataWords(data=str(world.shards), frames=170))
