"""What the benchmark of caches reports, at a small size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lingen.bench import cache
from lingen.bench.cache import CacheWords, never_skips
from lingen.cache_config import read_cache
from lingen.errors import UserError

SMALL: dict[str, Any] = {"tokens": 64, "steps": 6, "rounds": 1, "text_tokens": 8}


@pytest.mark.parametrize(("model", "policy", "batch"), [("dit", "fixed", 1), ("lingen", "pab_slow", 3)])
def test_a_cache_is_measured_beside_none(
    model: str, policy: str, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    row = cache.run(CacheWords(model=model, policy=policy, batch=batch, **SMALL))  # type: ignore[arg-type]
    assert json.loads(json.dumps(row, allow_nan=False)) == json.loads(json.dumps(row))
    assert (row["model"], row["policy"], row["tokens"]) == (model, policy, 64)
    assert 0.3 < row["executed_flops_ratio"] < 1 and 0.2 < row["wall_ratio"] < 1.2
    assert row["speed_up_kept"] == row["executed_flops_ratio"] / row["wall_ratio"]
    assert 10 < row["psnr"] < 120 and row["psnr_of"] == "latents"
    assert row["never_skips_is_no_cache"] and -0.5 < row["never_skip_overhead"] < 1
    assert f"| {model}" in capsys.readouterr().out


def test_what_skips_nothing_has_no_psnr() -> None:
    row = cache.run(CacheWords(policy="never", **SMALL))
    assert row["psnr"] is None and row["executed_flops_ratio"] == 1


@pytest.mark.parametrize(
    "given",
    [
        "{policy: fixed, sites: {cross: 4}}",
        "{policy: adacache, codebook: [[0.1, 5]], last: 2}",
        *(path.stem for path in (Path(__file__).parents[4] / "conf" / "cache").glob("*.yaml")),
    ],
)
def test_the_lane_that_never_skips_has_every_other_setting_of_the_cache(given: str) -> None:
    config = read_cache(given)
    eager = never_skips(config)
    assert read_cache(eager) == eager and type(eager) is type(config)  # a valid one
    assert (eager == config) == (config.policy == "never")


def test_a_wrong_policy_is_named_before_a_model_is_made() -> None:
    with pytest.raises(UserError, match="did you mean 'fixed'"):
        cache.run(CacheWords(policy="fixd", size="no such size"))
