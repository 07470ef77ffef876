"""The way from noise to data: schedules, orders of convergence, and the calls that are made on it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lingen.compose import validate
from lingen.config import SamplerConfig
from lingen.errors import UserError
from lingen.sampling.call import Call
from lingen.sampling.schedule import linear_quadratic, schedule, shifted
from lingen.sampling.solver import SOLVERS, evaluations, solve


def unchanged(step: int, sigma: float, x: torch.Tensor) -> torch.Tensor:
    return x


def field(x: torch.Tensor, sigma: torch.Tensor, call: Call) -> torch.Tensor:
    """dx/dsigma = x cos(3 sigma), whose solution is exp(sin(3 sigma) / 3)."""
    return x * torch.cos(3 * sigma.double()).view(-1, 1, 1, 1, 1)


def error(solver: str, sigmas: torch.Tensor) -> float:
    begin = torch.full((2, 1, 1, 1, 1), math.exp(math.sin(3.0) / 3), dtype=torch.float64)
    return float((solve(field, begin, sigmas.double(), solver, unchanged) - 1.0).abs().max())


@pytest.mark.parametrize("make", [lambda n: shifted(n, 1.0), lambda n: shifted(n, 3.0)], ids=["even", "shifted"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_halving_the_steps_shows_the_order(solver: str, order: int, make: Callable[[int], torch.Tensor]) -> None:
    coarse, fine = error(solver, make(160)), error(solver, make(320))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_path_takes_one_step(solver: str) -> None:
    data, noise = torch.randn(2, 2, 1, 1, 1, 1)
    for steps in (1, 5):
        found = solve(lambda x, sigma, call: noise - data, noise, shifted(steps, 2.0), solver, unchanged)
        assert torch.allclose(found, data, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_calls_count_evaluations_and_steps(solver: str) -> None:
    calls: list[Call] = []
    reached: list[tuple[int, float]] = []

    def denoise(x: torch.Tensor, sigma: torch.Tensor, call: Call) -> torch.Tensor:
        assert sigma.tolist() == pytest.approx([call.sigma] * 2)
        calls.append(call)
        return x

    def after(step: int, sigma: float, x: torch.Tensor) -> torch.Tensor:
        reached.append((step, sigma))
        return x

    sigmas = shifted(3, 2.0)
    solve(denoise, torch.zeros(2, 1, 1, 1, 1), sigmas, solver, after)
    assert [call.index for call in calls] == list(range(evaluations(solver, 3)))
    assert {call.count for call in calls} == {len(calls)}
    assert reached == list(enumerate(sigmas[1:].tolist()))
    stages = [(call.step, call.stage, call.sigma) for call in calls]
    levels = sigmas.tolist()
    second = [(n, 1, levels[n + 1]) for n in range(2)] if solver == "heun" else []
    assert stages == sorted([*((n, 0, levels[n]) for n in range(3)), *second])


def test_what_is_changed_after_a_step_goes_on() -> None:
    def after(step: int, sigma: float, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) if step == 1 else x

    noise = torch.ones(1, 1, 1, 1, 1)
    assert solve(lambda x, sigma, call: x, noise, shifted(4, 1.0), "euler", after).item() == 0.0


def test_euler_is_diffusers_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.tanh(x) * (1 + sigma)

    for sigmas in (shifted(7, 3.0), linear_quadratic(8, 100)):
        theirs = FlowMatchEulerDiscreteScheduler()  # its own shift is 1: explicit sigmas stay as they are
        theirs.set_timesteps(sigmas=sigmas[:-1].tolist())
        assert torch.equal(theirs.sigmas, sigmas)
        x = noise = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        for time, sigma in zip(theirs.timesteps, sigmas.tolist(), strict=False):
            x = theirs.step(velocity(x, sigma), time, x).prev_sample
        ours = solve(lambda x, sigma, call: velocity(x, call.sigma), noise, sigmas, "euler", unchanged)
        assert torch.allclose(ours, x, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 1000])
def test_schedules_run_from_one_down_to_zero(steps: int) -> None:
    for sigmas in (shifted(steps, 1.0), shifted(steps, 7.3), linear_quadratic(steps, 1000)):
        assert sigmas.dtype == torch.float32 and len(sigmas) == steps + 1
        assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
        assert (sigmas.diff() < 0).all()


def test_movie_gens_schedule_is_that_of_diffusers() -> None:
    """The numbers are those of its pipeline for Mochi, which is told how far the even steps go: so far as ours."""
    of_8 = [1.0, 0.99, 0.98, 0.97, 0.96, 0.8925, 0.71, 0.4125, 0.0]
    of_5 = [1.0, 0.95, 0.9, 0.766667, 0.466667, 0.0]
    assert linear_quadratic(8, 100).tolist() == pytest.approx(of_8, abs=1e-6)
    assert linear_quadratic(5, 20).tolist() == pytest.approx(of_5, abs=1e-6)
    assert linear_quadratic(50, 1000)[[30, 40, 49]].tolist() == pytest.approx([0.932, 0.618, 0.07548], abs=1e-6)
    even = 1 - torch.arange(26) / 1000
    assert torch.allclose(linear_quadratic(50, 1000)[:26], even, atol=1e-6)


def test_the_configuration_chooses_the_schedule() -> None:
    plain = SamplerConfig(steps=4)
    assert torch.equal(schedule(plain, 3.0), shifted(4, 3.0))
    assert torch.equal(schedule(plain.model_copy(update={"shift": 2.0}), 3.0), shifted(4, 2.0))
    movie_gen = SamplerConfig(steps=4, schedule="linear_quadratic", emulated_steps=20)
    assert torch.equal(schedule(movie_gen, 3.0), linear_quadratic(4, 20))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"guidance_scale": 0.9}, "guidance_scale=0.9"),
        ({"shift": 0.0}, "shift=0.0"),
        ({"solver": "dpm"}, "solver=dpm: .*'euler', 'heun' or 'ab2'"),
        ({"schedule": "linear_quadratic", "steps": 50, "emulated_steps": 49}, "emulated_steps=49.*give 50 or more"),
        ({"schedule": "linear_quadratic", "shift": 2.0}, "shift=2.0 is of schedule=shifted"),
    ],
)
def test_numbers_out_of_range_are_named(words: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(SamplerConfig, words)
