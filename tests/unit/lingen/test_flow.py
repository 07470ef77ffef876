"""The path, its target, and randomness that depends on the sample and not on the rank."""

from __future__ import annotations

import math

import torch

from lingen.config import FlowConfig
from lingen.flow import bucket_shift, draw, generator, interpolate, sample_losses, shift_sigma

CPU = torch.device("cpu")
SHAPE = (2, 3, 4, 4)


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    x0, noise = torch.randn(2, 5, *SHAPE, generator=generator("cpu", 1)).double()
    sigma, h = torch.full((5,), 0.3, dtype=torch.float64), 1e-6
    slope = (interpolate(x0, noise, sigma + h) - interpolate(x0, noise, sigma - h)) / (2 * h)
    torch.testing.assert_close(slope, noise - x0)
    assert sample_losses(slope, x0, noise).max() < 1e-12
    torch.testing.assert_close(interpolate(x0, noise, sigma * 0), x0)
    torch.testing.assert_close(interpolate(x0, noise, sigma * 0 + 1), noise)


def test_the_shift_keeps_the_ends_and_the_order() -> None:
    sigma = torch.linspace(0, 1, 11)
    for shift in (0.5, 1.0, 3.0):
        moved = shift_sigma(sigma, shift)
        assert moved[0] == 0 and moved[-1] == 1 and bool((moved.diff() > 0).all())
    torch.testing.assert_close(shift_sigma(torch.tensor(0.5), 3.0), torch.tensor(0.75))


def test_the_shift_of_a_bucket_grows_with_the_root_of_its_tokens() -> None:
    flow = FlowConfig()
    assert bucket_shift(flow.base_tokens, flow) == flow.base_shift
    assert math.isclose(bucket_shift(4 * flow.base_tokens, flow), 2 * flow.base_shift)
    assert bucket_shift(10**9, flow) == flow.max_shift


def test_what_is_drawn_does_not_depend_on_the_split_over_ranks() -> None:
    flow = FlowConfig(caption_dropout=0.5)
    whole = draw(range(8), SHAPE, seed=1, samples_seen=64, shift=2.0, flow=flow, device=CPU)
    halves = [
        draw(p, SHAPE, seed=1, samples_seen=64, shift=2.0, flow=flow, device=CPU) for p in ([0, 1, 2, 3], [4, 5, 6, 7])
    ]
    assert torch.equal(whole.noise, torch.cat([h.noise for h in halves]))
    assert torch.equal(whole.sigma, torch.cat([h.sigma for h in halves]))
    assert whole.drop_caption == halves[0].drop_caption + halves[1].drop_caption
    assert 0 < sum(whole.drop_caption) < 8


def test_what_is_drawn_changes_with_seed_step_and_position() -> None:
    flow = FlowConfig()
    first = draw([0, 1], SHAPE, seed=1, samples_seen=0, shift=1.0, flow=flow, device=CPU)
    assert not torch.equal(first.noise[0], first.noise[1])
    for seed, seen in ((2, 0), (1, 2)):
        other = draw([0, 1], SHAPE, seed=seed, samples_seen=seen, shift=1.0, flow=flow, device=CPU)
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.sigma, other.sigma)


def test_timesteps_are_logit_normal_and_captions_drop_at_their_rate() -> None:
    flow = FlowConfig(logit_mean=0.5, logit_std=0.7, caption_dropout=0.1)
    drawn = draw(range(4000), (1, 1, 1, 1), seed=0, samples_seen=0, shift=1.0, flow=flow, device=CPU)
    logits = torch.logit(drawn.sigma.double())
    assert abs(logits.mean().item() - 0.5) < 0.04 and abs(logits.std().item() - 0.7) < 0.03
    assert abs(sum(drawn.drop_caption) / 4000 - 0.1) < 0.02
