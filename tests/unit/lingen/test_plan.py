"""What the plan says about memory, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from data.shards import load_index
from lingen import diffusion
from lingen.compose import compose
from lingen.config import Config
from lingen.errors import UserError
from lingen.plan import Plan, make_plan, print_plan, refuse_impossible, refuse_too_large, samples_of

CPU = torch.device("cpu")


def config_of(world: Any, *words: str) -> Config:
    return compose(["name=planned", *world.words, *words])


@pytest.fixture(scope="module")
def planned(world: Any) -> tuple[Config, Plan]:
    config = config_of(world)
    return config, make_plan(config, load_index(world.shards), world=1, device="cpu")


def test_a_stage_is_planned_at_its_fullest(world: Any, planned: tuple[Config, Plan]) -> None:
    _, plan = planned
    images, video, _ = plan.stages
    assert images.memory is not None and video.memory is not None
    assert str(video.largest.bucket) == "17x64x64"
    assert video.memory.activations > images.memory.activations
    micro = config_of(world, "engine.grad_accumulation=4")
    quarter = make_plan(micro, load_index(world.shards), world=1, device="cpu").stages[1].memory
    assert quarter is not None and quarter.activations < 0.4 * video.memory.activations
    shared = make_plan(config_of(world), load_index(world.shards), world=4, device="cpu").stages[1].memory
    assert shared is not None and shared.activations == quarter.activations and shared.average * 4 == quarter.average


def test_the_plan_prints_the_memory(planned: tuple[Config, Plan], capsys: pytest.CaptureFixture[str]) -> None:
    config, plan = planned
    print_plan(config, plan)
    printed = capsys.readouterr().out
    assert "memory of each rank, 1 in all, device cpu:" in printed
    assert "demo_video: 0.0" in printed and "activations" in printed and "at 17x64x64" in printed


def test_what_does_not_fit_is_refused(planned: tuple[Config, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    config, plan = planned
    largest = max(stage.memory.total for stage in plan.stages if stage.memory)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=largest))
    refuse_too_large(config, plan, CPU)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=largest - 1))
    with pytest.raises(UserError) as refused:
        refuse_too_large(config, plan, CPU)
    for part in ("stages.demo_", "on each rank, and cpu has", "activation_checkpointing=true", "zero2", "grad_accum"):
        assert part in str(refused.value)
    sharded = config.engine.model_copy(update={"zero_stage": 3, "activation_checkpointing": True, "dtype": "bf16"})
    with pytest.raises(UserError) as refused:
        refuse_too_large(config.model_copy(update={"engine": sharded}), plan, CPU)
    assert "zero" not in str(refused.value) and "checkpointing" not in str(refused.value)


def test_memory_that_cannot_be_worked_out_stops_nothing(
    world: Any, planned: tuple[Config, Plan], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise AttributeError("'Autotuner' object has no attribute 'configs'")

    monkeypatch.setattr(diffusion, "predict", fails)
    config = planned[0]
    plan = make_plan(config, load_index(world.shards), world=1, device="cpu")
    refuse_too_large(config, plan, CPU)
    print_plan(config, plan)
    assert "not predicted: AttributeError: 'Autotuner' object" in capsys.readouterr().out
    assert plan == replace(plan, world=1) and all(stage.memory is None for stage in plan.stages)


def test_what_is_in_no_bucket_is_told(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    video = "stage.buckets=[{frames: 17, height: 64, width: 64, batch_size: 8}]"
    config = config_of(world, "stage=demo_video", video)
    plan = make_plan(config, load_index(world.shards), world=1, device="cpu")
    print_plan(config, plan)
    left_out = "in no bucket: 64 images, and no bucket has one frame"
    assert f"demo_video: {left_out}\n" in capsys.readouterr().out
    own = plan.stages[0].buckets[0].count
    assert own.train + own.holdout == 64
    line = f"demo_video: samples of 17x64x64 {own.train} (held out {own.holdout}); {left_out}"
    assert samples_of(plan.stages[0]) == line


def test_a_bucket_that_another_leaves_nothing_is_refused(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    two = "{frames: 17, height: 32, width: 32, batch_size: 4}, {frames: 17, height: 64, width: 64, batch_size: 4}"
    config = config_of(world, "stage=demo_video", f"stage.buckets=[{two}]")
    plan = make_plan(config, load_index(world.shards), world=1, device="cpu")
    why = r"the 64 samples in .* are all nearer to 17x64x64 \(64\); add some of 2.00 s of about 32x32"
    with pytest.raises(UserError, match=f"stages.demo_video.buckets: bucket 17x32x32 is empty: {why}"):
        refuse_impossible(config, plan, 1)
    print_plan(config, plan)
    assert re.search(f"empty bucket: stages.demo_video 17x32x32: {why}", capsys.readouterr().out)


def test_a_budgets_batch_that_the_ranks_do_not_divide_names_the_multiple(world: Any) -> None:
    shapes = "{frames: 17, height: 64, width: 64}, {frames: 1, height: 64, width: 64}"
    words = ["stage=demo_video", f"stage.buckets=[{shapes}]", "stage.token_budget=480"]  # 10 and 30 samples
    config = config_of(world, *words)
    plan = make_plan(config, load_index(world.shards), world=4, device="cpu")
    with pytest.raises(UserError, match=r"17x64x64 has batch_size=10, .* of 4 ranks .*; set .*batch_multiple=4"):
        refuse_impossible(config, plan, 4)
    mended = config_of(world, *words, "stage.batch_multiple=4").stages["demo_video"]
    assert [bucket.batch_size for bucket in mended.buckets] == [8, 28]
