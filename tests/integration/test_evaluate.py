"""Evaluating a checkpoint from the command line: sampled in several ways, resumed, measured, refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.autoencoders import load_autoencoder
from lingen.compose import compose
from lingen.errors import UserError
from lingen.evaluation.folder import read_run
from lingen.export import Origin
from lingen.models import make_model
from lingen.pipeline import LinGenPipeline
from lingen.text.encoders import load_text_encoders

evaluate = importlib.import_module("scripts.evaluate")
STEPS = 6
VARIANTS = (
    "variants=[{name: uncached, steps: 6}, {name: fixed, steps: 6, cache: {policy: fixed, period: 2}}, "
    "{name: never, steps: 6, cache: never, curve: c}, {name: heun, steps: 4, solver: heun, guidance: two_passes}]"
)


@pytest.fixture(scope="module")
def saved(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LinGen with random weights that do something."""
    folder = tmp_path_factory.mktemp("evaluated") / "model"
    config = compose(["name=lingen", *world.words, "model=lingen", "stage=demo_video"])
    torch.manual_seed(0)
    model = make_model(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    cpu = torch.device("cpu")
    autoencoder, text = load_autoencoder(config.autoencoder, cpu), load_text_encoders(config.text, cpu)
    (stage,) = config.stages.values()
    origin = Origin(
        stage=stage.name, step=1, samples=1, tokens=1, checkpoint_sha256="0" * 64, lineage=[],
        autoencoder_fingerprint=autoencoder.fingerprint, text_fingerprint=text.fingerprints,
    )  # fmt: skip
    LinGenPipeline(config, stage, model, autoencoder, text, cpu, origin).save_pretrained(folder, copy=False)
    return folder


@pytest.fixture
def words(saved: Path, tmp_path: Path) -> list[str]:
    return [
        f"checkpoint={saved}",
        "prompts=synthetic",
        "seeds=2",
        "frames=9",
        "height=32",
        "width=32",
        f"out={tmp_path}/out",
    ]


def test_a_checkpoint_is_sampled_and_measured_and_goes_on(words: list[str], tmp_path: Path, saved: Path) -> None:
    evaluate.main([*words, VARIANTS, "baseline=uncached", "reference=heun", "shown=1"])
    out = tmp_path / "out"
    tree = json.loads((out / "evaluate.json").read_text())
    assert list(tree["runs"]) == ["uncached", "fixed", "never", "heun"]
    base, fixed, never, heun = tree["runs"].values()
    assert never["values"]["psnr"] == [100, 100]  # bit for bit
    assert min(fixed["values"]["psnr"]) < 99
    assert never["values"]["flops"] == base["values"]["flops"]  # hooks and the cache's own count agree
    assert fixed["values"]["flops"] < base["values"]["flops"]
    assert heun["values"]["flops"] == [count * 7 // STEPS for count in base["values"]["flops"]]  # 2 * 4 - 1 evaluations
    pipeline = LinGenPipeline.from_pretrained(saved)
    run = read_run(out / "runs" / "uncached")
    one = run.file.videos[1]
    size = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": STEPS}
    assert torch.equal(pipeline(one.prompt, seeds=one.seed, progress=False, **size).frames[0], run.pixels(1))
    for record in run.records:
        assert 0 < record.denoise_seconds < record.seconds and record.cache is None and record.batch == 1
        assert record.peak_memory is None or record.peak_memory > 10**7
    skipped = read_run(out / "runs" / "fixed").records[0]
    assert skipped.cache is not None and skipped.cache["executed_flops"] == skipped.flops
    schedule = skipped.cache["contexts"]["pair"]["schedules"][0]
    assert len(schedule) == STEPS and 0 < sum(schedule) < STEPS

    # Interrupted: one video is missing, the others are kept as they are.
    lost = out / "runs" / "fixed" / "00001.json"
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.json") if path != lost}
    lost.unlink()
    evaluate.main([*words, VARIANTS, "shown=0"])
    again = json.loads((out / "evaluate.json").read_text())["runs"]
    assert again["fixed"]["values"]["psnr"] == fixed["values"]["psnr"]
    assert {path: path.stat().st_mtime_ns for path in before} == before and lost.exists()


def test_a_batch_makes_the_same_videos(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star moving up\n\na blue circle growing\n")
    words = [word for word in words if not word.startswith("prompts")] + [f"prompts={tmp_path / 'prompts.txt'}"]
    variants = "variants=[{name: a, steps: 3, cache: {policy: fixed, period: 2}}]"
    evaluate.main([*words, variants, "seed=3", "shown=0"])
    evaluate.main([*words, variants, "seed=3", "shown=0", f"out={tmp_path}/other", "batch=3"])
    one, other = (read_run(tmp_path / name / "runs" / "a") for name in ("out", "other"))
    asked = [("a red star moving up", 3), ("a red star moving up", 4), ("a blue circle growing", 3)]
    assert [(each.prompt, each.seed) for each in one.file.videos][:3] == asked
    assert [record.batch for record in other.records] == [3, 3, 3, 1]
    for n in range(4):
        assert (one.pixels(n).int() - other.pixels(n).int()).abs().max() <= 1  # a sum's order may differ with the batch
    assert [record.flops for record in one.records] == [record.flops for record in other.records]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["variants=[{name: a}, {name: a}]"], "two are called a"),
        (["variants=[{name: a, cache: pab_fst}]"], "did you mean 'pab_fast'"),
        (["variants=[{name: a, cache: {policy: fixed, sites: {self: 2}}}]"], "variants, a: .*self"),
        (["variants=[{name: a, step: 3}]"], "did you mean 'steps'"),
        (["variants=[{name: a, steps: 0}]"], "variants.0.steps=0"),
        (["variants=[{name: a, schedule: linear_quadratic, shift: 3}]"], "variants, a: .*shift=3"),
        ([f"variants=[{{name: a, negative_prompt: {'blur ' * 30}}}]"], "negative_prompt=.* has .* tokens"),
        (["variants=[{name: ../a}]"], "variants.0.name=../a"),
        (["variants=[{name: a}]", "baseline=b"], "baseline and reference must be of the variants a"),
        (["variants=[{name: a}]", "prompts=nowhere.txt"], "prompts=nowhere.txt cannot be read"),
        (["variants=[{name: a}]", "prompts=/dev/null"], "prompts=/dev/null holds no prompt"),
        (["variants=[{name: a}]", "frames=10"], "frames=10"),
        (["variants=[{name: a}]", "runs=[x]"], "give runs=.* or checkpoint=DIR"),
        (["variants=[{name: a}]", "labels=[x]"], "labels are of runs"),
        (["variants=[{name: a}]", "lpips=nowhere"], "lpips=nowhere cannot be read"),
        (["variants=[{name: a}]", "vbench={command: /nowhere}"], "vbench.command=/nowhere is no program"),
        ([], "variants is not set"),
    ],
)  # fmt: skip
def test_bad_words_are_said_before_anything_is_sampled(
    words: list[str], changed: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(LinGenPipeline, "__call__", never)
    keys = [word.partition("=")[0] for word in changed]
    with pytest.raises(UserError, match=message):
        evaluate.main([*(word for word in words if word.partition("=")[0] not in keys), *changed])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_one_message_on_the_command_line(python: Any, tmp_path: Path) -> None:
    done = python("scripts/evaluate.py", "runs=[nowhere]", f"out={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: runs: nowhere is no folder of sampled videos")
    assert not list(tmp_path.iterdir())
