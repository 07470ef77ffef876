"""A run with several text encoders: trained, stopped, moved, resumed, sampled from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.compose import compose
from lingen.errors import UserError
from lingen.loop import train
from lingen.pipeline import LinGenPipeline
from tests.runs import Signal, lines
from tests.text_models import save_byt5, save_t5

VIDEO = "[{frames: 9, height: 32, width: 32, batch_size: 4}]"


def words(name: str, encoders: Path, runs: Path) -> list[str]:
    t5, byt5 = "text.encoders.t5", "text.encoders.byt5"
    return [
        f"name={name}", f"runs_dir={runs}", "model=dit", "logger.console=false", "validation.every_steps=4",
        "stage=demo_video", "stage.samples=16", f"stage.buckets={VIDEO}", "~text.encoders.minilm",
        f"{t5}.path={encoders}/t5", f"{t5}.length=9", f"{t5}.dim=8", f"{t5}.dropout=0.5",
        f"{byt5}.path={encoders}/byt5", f"{byt5}.length=5", f"{byt5}.dim=8", f"{byt5}.quoted_only=true",
        f"{byt5}.projection=linear", f"{byt5}.dtype=bf16",
    ]  # fmt: skip


def run(world: Any, given: list[str], stop_at: int | None = None) -> Path:
    config = compose([*world.words, *given])
    folder = Path(config.runs_dir) / config.name
    code = train(config, Signal(folder, stop_at))  # type: ignore[arg-type]
    assert code == (75 if stop_at else 0)
    return folder


def test_a_run_knows_its_encoders_by_their_content(world: Any, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    save_t5(here / "t5")
    save_byt5(here / "byt5")
    reference = run(world, words("reference", here, tmp_path))
    stopped = run(world, words("stopped", here, tmp_path), stop_at=2)
    state = json.loads((stopped / "checkpoints/demo_video/step_00000002/state.json").read_text())
    assert list(state["text_fingerprint"]) == ["t5", "byt5"]
    here.rename(there)
    save_t5(here / "t5", seed=1)  # other weights of the same shape, where the run found its own
    shutil.copytree(there / "byt5", here / "byt5")
    with pytest.raises(UserError, match=r"text\.encoders\.t5: its weights.* what .*stopped/.* was trained with"):
        run(world, words("stopped", here, tmp_path))
    run(world, words("stopped", there, tmp_path))
    losses = [[record["loss"] for record in lines(folder, "train")] for folder in (stopped, reference)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    whole = run(world, [*words("whole", there, tmp_path), "text.encoders.t5.dropout=0"])
    assert [record["loss"] for record in lines(whole, "train")] != losses[1]  # tokens were really left out
    transfer = lines(reference, "transfer")[0]
    assert transfer["text_fingerprint"] == state["text_fingerprint"]

    with pytest.raises(UserError, match=r"text\.encoders\.t5: its weights"):
        LinGenPipeline.from_pretrained(reference)
    with pytest.raises(UserError, match=r"encoders\.t6: this model has no such text encoder; known: byt5, t5"):
        LinGenPipeline.from_pretrained(reference, encoders={"t6": str(there / "t5")})
    pipeline = LinGenPipeline.from_pretrained(reference, encoders={"t5": str(there / "t5")})
    wake(pipeline)
    shape = {"num_inference_steps": 2, "progress": False}
    plain, sign = (
        pipeline([text], seeds=[1], **shape).frames  # type: ignore[arg-type]
        for text in ("a red circle", 'a red circle "OK"')
    )
    both = pipeline(["a red circle", 'a red circle "OK"'], seeds=[1, 1], **shape).frames  # type: ignore[arg-type]
    assert (both.int() - torch.cat([plain, sign]).int()).abs().max() <= 1  # one with tokens of the ByT5, one without
    assert not torch.equal(plain, sign)

    pipeline.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    for path in (there / "t5", there / "byt5"):
        shutil.move(path, tmp_path / f"{path.name}.gone")
    moved = LinGenPipeline.from_pretrained(tmp_path / "moved")
    assert moved.text.fingerprints == pipeline.text.fingerprints
    assert torch.equal(moved('a red circle "OK"', seeds=1, **shape).frames, sign)  # type: ignore[arg-type]


def wake(pipeline: LinGenPipeline) -> None:
    """Let every part of a hardly trained model matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in pipeline.model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
