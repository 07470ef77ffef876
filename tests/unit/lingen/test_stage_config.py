"""Batch sizes out of a token budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingen.compose import compose, compose_run
from lingen.errors import UserError
from lingen.runfolder import dump_config, read_config, read_config_as
from lingen.tae_config import TaeRunConfig

BASE = ["name=a", "data.path=x", "autoencoder.path=y"]
SHAPES = "{frames: 17, height: 64, width: 64, share: 3}, {frames: 1, height: 64, width: 64}"  # 48 and 16 tokens
BUDGET = ["stage=demo_video", f"stage.buckets=[{SHAPES}]"]


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (["stage.token_budget=400"], [8, 25]),
        (["stage.token_budget=400", "stage.batch_multiple=4"], [8, 24]),
        (["stage.token_budget=48"], [1, 3]),  # exactly one
        (["stage.token_budget=400", "model=dit"], [8, 25]),
        (["stage.token_budget=400", "size.patch=[1,4,4]"], [33, 100]),  # 12 and 4 tokens
    ],
)
def test_a_budget_becomes_batch_sizes(words: list[str], sizes: list[int], tmp_path: Path) -> None:
    config = compose([*BASE, *BUDGET, *words])
    assert [bucket.batch_size for bucket in config.stages["demo_video"].buckets] == sizes
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert f"batch_size: {sizes[0]}" in dump_config(config)
    assert read_config(tmp_path / "config.yaml") == config  # though it has both


def test_an_autoencoders_tokens_are_its_own(tmp_path: Path) -> None:
    words = ["name=a", "data.path=x", "curriculum=tae_demo", "stage=tae_demo_video", f"stage.buckets=[{SHAPES}]"]
    config = compose_run(TaeRunConfig, "train_autoencoder", [*words, "stage.token_budget=5000"])
    per_frame = (64 // config.tae.space) ** 2
    sizes = [bucket.batch_size for bucket in config.stages["tae_demo_video"].buckets]
    assert sizes == [5000 // (17 * per_frame), 5000 // per_frame]
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert read_config_as(TaeRunConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "bucket 17x64x64 has no batch_size, and stages.demo_video no token_budget; give one of them"),
        (["stage.token_budget=47"], "token_budget=47 is less than one sample of bucket 17x64x64, of 48 tokens each"),
        (
            ["stage.token_budget=100", "stage.batch_multiple=4"],
            "token_budget=100 is less than batch_multiple=4 samples of .* at least 192",
        ),
        (["stage.buckets.0.batch_size=4", "stage.token_budget=400"], "17x64x64 has batch_size=4, and token_budget=400"),
        (["stage.buckets.0.batch_size=4", "stage.buckets.1.batch_size=4", "stage.batch_multiple=2"], "goes with a tok"),
        (["stage.token_budget=0"], "token_budget=0"),
        (["stage.token_budget=400", "stage.batch_multiple=0"], "batch_multiple=0"),
        (["stage.token_budget=400", "engine.grad_accumulation=2"], "1x64x64 has batch_size=25.*batch_multiple=2"),
        (["stage.token_budget=400", "stage.buckets.0.height=65"], "height=65 is not a multiple"),
    ],
)
def test_a_budget_that_gives_no_batch_is_refused(words: list[str], message: str) -> None:
    buckets = [word for word in words if word.startswith("stage.buckets")]
    rest = [word for word in words if word not in buckets]
    with pytest.raises(UserError, match=message):
        compose([*BASE, *BUDGET, *buckets, *rest])
