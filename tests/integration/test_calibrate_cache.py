"""Caches fitted to a model: the share that is wanted is the share that is skipped, and what cannot be had is said."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import lingen.pipeline
import scripts.calibrate_cache
from lingen.adacache_config import AdaCacheConfig, GuardsConfig
from lingen.cache_config import read_cache
from lingen.calibration import codebook, longest_rate, with_codebook
from lingen.errors import UserError
from lingen.pipeline import LinGenPipeline
from tests.integration.test_pipeline import export

STEPS = 12
SIZE = {"num_frames": 9, "height": 32, "width": 48}
GROUND = [f"steps={STEPS}", "frames=9", "height=32", "width=48"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, world: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("calibrated")
    return {name: export(folder / name, name, world) for name in ("lingen", "dit")}


def calibrate(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrate_cache.py", *words])
    scripts.calibrate_cache.main()


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("dit", "adacache_fast"),
        ("lingen", "{policy: adacache, codebook: [], moreg: {window: [3, 9], strides: [1, 2]}, probe: {block: 0}}"),
        ("dit", "{policy: teacache, threshold: 1.0, reuse: taylor}"),
        ("lingen", "first_block"),
        ("dit", "magcache"),
    ],
)
def test_the_share_that_is_wanted_is_skipped(
    name: str, cache: str, exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, prompts = tmp_path / "fitted.yaml", tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    words = [f"checkpoint={exports[name]}", f"out={out}", f"cache={cache}", "skip=0.25", "tolerance=0.08"]
    calibrate(monkeypatch, *words, f"prompts={prompts}", "seeds=2", "batch=3", *GROUND)
    fitted, given = read_cache(str(out)), read_cache(cache)
    fits = {"codebook", "last", "threshold", "coefficients", "ratios"}
    assert fitted.model_dump(exclude=fits) == given.model_dump(exclude=fits)  # all else is kept
    assert fitted != given
    pipeline = LinGenPipeline.from_pretrained(exports[name])
    out = Path(shutil.copytree(tmp_path, tmp_path / "moved")) / out.name  # MagCache's ratios lie beside it
    (tmp_path / "fitted.yaml").unlink()
    for ratios in tmp_path.glob("*.json"):
        ratios.unlink()
    pipeline.enable_cache(str(out))
    seeds = [1_000_000, 1_000_001] * 2
    asked = ["a red circle"] * 2 + ["a blue star"] * 2
    pipeline(asked, num_inference_steps=STEPS, seeds=seeds, output_type="latent", progress=False, **SIZE)  # type: ignore[arg-type]
    assert pipeline.cache_summary is not None
    share = 1 - pipeline.cache_summary.flops_ratio
    assert share == pytest.approx(0.25, abs=0.08)
    assert f"measured with this file: {share:.1%}" in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["skip=1.5"], "skip"),
        (["skip=0.97"], "of the FLOPs of 12 calls at most"),
        (["cache=pab_fast"], "cache=pab has no thresholds to fit"),
        (["cache=adacache_fst"], "did you mean"),
        (["cache={policy: adacache, codebook: [], probe: {site: te}}"], "no site 'te'"),
        (["cache={policy: adacache, codebook: [], probe: {block: 77}}"], "probe.block=77"),
        (["cache=teacache", "steps=3"], "too few"),
        (["steps=3"], "steps=3: nothing was measured"),
        (["out=fitted.txt"], "out"),
        (["prompts=nowhere.txt"], "prompts=nowhere.txt"),
        (["checkpoint=nowhere"], "nowhere"),
        (["seeds=0"], "seeds"),
        (["sed=1"], "seed"),
    ],
)
def test_what_cannot_be_fitted_is_said(
    words: list[str], message: str, exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = [f"checkpoint={exports['dit']}", "out=fitted.yaml", "prompts=prompts.txt", "seeds=1", *GROUND]
    asked = dict(word.split("=", 1) for word in [*given, *words])
    with pytest.raises(UserError, match=re.escape(message)):
        calibrate(monkeypatch, *(f"{key}={value}" for key, value in asked.items()))
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_what_does_not_fit_is_refused_before_it_begins(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lingen.pipeline, "free_memory", lambda device: 10_000)
    with pytest.raises(UserError, match=r"denoising 8 such videos needs .* GB"):
        words = [f"checkpoint={exports['dit']}", f"out={tmp_path / 'mine.yaml'}", "batch=8", "truncate=true"]
        calibrate(monkeypatch, *words, *GROUND)


def test_a_file_that_is_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("policy: never\n")
    with pytest.raises(UserError, match="exists"):
        calibrate(monkeypatch, "checkpoint=nowhere", f"out={tmp_path / 'mine.yaml'}")


def test_a_codebook_is_of_quantiles_and_of_rates_that_fall() -> None:
    thresholds, rates = codebook([i / 100 for i in range(101)], 6)
    assert rates == [6, 5, 4, 3, 2] and thresholds == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert codebook([0.1, 0.2], 30)[1] == [30, 24, 19, 13, 8, 2]
    assert codebook([0.1, 0.1], 2) == ([0.1], [2])
    cache = AdaCacheConfig.model_validate({"codebook": [], "mode": "reference"})
    low, high = (with_codebook(cache, [0.1, 0.1, 0.2], [4, 3, 2], level) for level in (0.2, 0.8))
    assert [rate for _, rate in high.codebook] == [4, 2] and high.mode == "reference"
    assert all(a[0] < b[0] for a, b in zip(low.codebook, high.codebook, strict=True))


@pytest.mark.parametrize(
    ("calls", "skip", "rate"), [(30, 0.5, 5), (30, 0.58, 6), (30, 0.99, 26), (100, 0.78, 10), (6, 0.5, 2)]
)
def test_the_longest_rate_leaves_room_for_shorter_ones(calls: int, skip: float, rate: int) -> None:
    assert longest_rate(calls, GuardsConfig(), skip) == rate
