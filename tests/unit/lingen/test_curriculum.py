"""Counters and learning rates of the stages."""

from __future__ import annotations

import pytest

from lingen.config import BucketConfig, StageConfig
from lingen.curriculum import Progress, bucket_shares, is_complete, learning_rate, planned_steps


def stage(**changes: object) -> StageConfig:
    buckets = [
        BucketConfig(frames=17, height=64, width=64, batch_size=8, share=3),
        BucketConfig(frames=1, height=64, width=64, batch_size=16, share=1),
    ]
    return StageConfig.model_validate({"name": "s", "buckets": buckets, "samples": 1000, "lr": 0.1} | changes)


def test_counters_run_on_across_stages() -> None:
    progress = Progress().after(samples=8, tokens=80, flops=1e3, hours=0.5).enter_stage()
    progress = progress.after(samples=16, tokens=16, flops=1.0, hours=0.25)
    assert progress == Progress(2, 24, 96, 1001.0, 0.75, 1, 16)
    assert Progress(**progress.as_dict()) == progress


def test_warm_up_rises_from_above_zero_to_the_rate() -> None:
    rates = [learning_rate(stage(warmup_samples=100), n) for n in range(0, 101, 10)]
    assert rates[0] > 0 and rates == sorted(rates) and rates[-1] == pytest.approx(0.1)
    assert learning_rate(stage(warmup_samples=0), 0) == 0.1


def test_a_cosine_ends_at_its_share() -> None:
    cosine = stage(lr_schedule="cosine", final_lr_share=0.2, warmup_samples=200)
    assert learning_rate(cosine, 200) == pytest.approx(0.1)
    assert learning_rate(cosine, 600) == pytest.approx(0.06)
    assert learning_rate(cosine, 1000) == pytest.approx(0.02)


def test_a_stage_ends_with_the_step_that_reaches_its_samples() -> None:
    assert not is_complete(stage(), Progress(stage_samples=999))
    assert is_complete(stage(), Progress(stage_samples=1000))


def test_planned_steps_follow_the_shares() -> None:
    assert bucket_shares(stage()) == [0.75, 0.25]
    total, each = planned_steps(stage())
    assert total == 100 and each == [75, 25]
