"""The trial of caches from end to end, in miniature: sampled, controlled, resumed, reported, refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from lingen.errors import UserError
from lingen.evaluation.folder import read_run
from lingen.trial.run import schedules_of
from tests.integration.test_pipeline import export

cache_trial = importlib.import_module("scripts.cache_trial")
SMALL = [
    "seeds=4", "batch=4", "steps=10", "reference_steps=12", "skips=[0.25,0.35]", "calibration_seeds=2",
    "rounds=4", "gate_seeds=2", "frames=9", "height=32", "width=32", "shown=1", "truncate=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, world: Any) -> Path:
    return export(tmp_path_factory.mktemp("trial") / "dit", "dit", world)


def test_the_trial_runs_goes_on_and_reports(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, docs = tmp_path / "trial", tmp_path / "cache.md"
    docs.write_text(f"# Caches\n\n{cache_trial.BEGIN}\nold\n{cache_trial.END}\nbehind\n")
    words = [*SMALL, "models=[dit]", f"out={out}", f"checkpoints={{dit: {model}}}", f"docs={docs}"]
    with pytest.raises(UserError, match=r"dit: .*attributes not clearly above chance on 2 videos"):
        cache_trial.main(words)
    words.append("need_trained=false")
    cache_trial.main([*words, "dry_run=true"])
    said = capfd.readouterr().out
    assert "estimate: " in said and "adacache-25" in said and not (out / "dit" / "runs").exists()

    cache_trial.main(words)
    runs = {path.name: read_run(path) for path in (out / "dit" / "runs").iterdir()}
    base = runs["uncached"].records
    for name in ("fixed-5", "taylor-5", "steps-6"):
        share = sum(one.flops for one in runs[name].records) / sum(one.flops for one in base)
        assert 0.4 < share < 0.9, name
    own, other = (schedules_of(out / "dit" / "runs" / name) for name in ("adacache-25", "shuffled-25"))
    assert sorted(own) == sorted(other)  # equal cost, and nobody has its own
    for record in runs["shuffled-25"].records:  # each video's FLOPs are those of its own schedule
        assert record.cache is not None and record.flops == record.cache["contexts"]["pair"]["flops"][0]
    report = (out / "report" / "README.md").read_text()
    for expected in (
        "### dit",
        "27 dB",
        "adacache-25 against others' schedules",
        "AdaCache-slow | 79.66",
        "rank corr",
        "adacache-35 could not be fitted: skip=0.35",
    ):
        assert expected in report
    assert (out / "report" / "dit.png").stat().st_size > 20_000
    assert {"dit.png", "dit_motion.png"} == {path.name for path in (tmp_path / "cache").iterdir()}
    page = docs.read_text()
    assert "old" not in page and page.endswith("behind\n") and "](cache/dit.png)" in page
    tree = json.loads((out / "dit" / "evaluate.json").read_text())
    assert len(tree["runs"]) == len(runs) and all(run["settings"]["weights"] for run in tree["runs"].values())

    monkeypatch.setattr("lingen.pipeline.LinGenPipeline.denoise", None)  # nothing is sampled again
    (out / "report" / "README.md").unlink()
    cache_trial.main(words)
    assert (out / "report" / "README.md").read_text() == report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reference_steps=8", "steps=8"], "takes more than steps=8"),
        (["models=[dit,dit]"], "each once"),
        (["models=[dit]", "checkpoints={lingen: x}"], "lingen is none of models"),
        (["seed=999999"], "seeds end below 1000000"),
        (["docs=README.md"], "has no lines"),
    ],
)
def test_wrong_words_are_said(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cache_trial.main(words)


def test_a_checkpoint_of_the_other_model_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoints.lingen=.* is a dit"):
        cache_trial.main([*SMALL, "models=[lingen]", f"checkpoints={{lingen: {model}}}", f"out={tmp_path}/trial"])
