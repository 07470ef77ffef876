"""A cache that skips nothing is no cache, bit for bit; each sample decides for itself; a run leaves nothing behind."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lingen.sampling.cache import CacheRun
from lingen.sampling.cache.sites import run_block, sites_of
from lingen.sampling.call import Call
from tests.caches import PAIR, STEPS, TWO, generate, model, schedules, start, text_of, uncached

MODELS = ["dit", "lingen"]
SEEDS = [0, 3, 1]
# Policies that look at the samples, with thresholds that part the samples of SEEDS.
MEASURED: dict[str, dict[str, Any]] = {
    "teacache": {"policy": "teacache", "threshold": 0.15},
    "first_block": {"policy": "first_block", "threshold": 0.2},
    "adacache": {"policy": "adacache", "codebook": [[0.3, 3], [0.42, 2]]},
}
KNOWN: dict[str, dict[str, Any]] = {
    "fixed": {"policy": "fixed", "period": 3},
    "taylor": {"policy": "fixed", "period": 2, "reuse": "taylor", "order": 2},
    "delta_dit": {"policy": "delta_dit"},
    "sites": {"policy": "fixed", "sites": {"cross": 2, "mlp": 3}},
    "pab": {"policy": "pab"},
    "tgate": {"policy": "tgate"},
}
# What never skips, though it decides.
EAGER: dict[str, dict[str, Any]] = {
    "never": {"policy": "never"},
    "fixed": {"policy": "fixed", "period": 1},
    "sites": {"policy": "fixed", "sites": {"cross": 1, "mlp": 1}},
    "pab": {"policy": "pab", "spatial": 1, "temporal": 1, "cross": 1},
    "teacache": {"policy": "teacache", "threshold": 1e-9},
    "first_block": {"policy": "first_block", "threshold": 1e-9},
    "adacache, ones": {"policy": "adacache", "codebook": [[0.1, 1], [0.5, 1]], "last": 1},
    "adacache, ones as published": {"policy": "adacache", "codebook": [[0.1, 1], [0.5, 1]], "mode": "reference"},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", EAGER)
def test_what_never_skips_is_no_cache_bit_for_bit(name: str, policy: str) -> None:
    run = start(model(name), EAGER[policy])
    assert torch.equal(generate(run.forward, SEEDS), uncached(model(name), SEEDS))
    summary = run.summary()
    assert summary.executed_flops == summary.full_flops and summary.flops_ratio == 1.0
    assert not any(summary.contexts["pair"].reused.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_block_run_by_its_sites_is_the_block_bit_for_bit(name: str) -> None:
    made = model(name)
    states, mask = text_of([0, 1])
    x, context = made.enter(torch.randn(2, 4, 3, 4, 6), torch.tensor([0.3, 0.9]), states, mask)
    block: Any = made.blocks[1]
    for sites in ([], ["cross"], list(sites_of(made))[1:], [sites_of(made)[0], "mlp"]):
        met: list[str] = []

        def visit(site: str, part: Any, compute: Any, met: list[str] = met) -> Tensor:
            met.append(site)
            out: Tensor = compute()
            return out

        assert torch.equal(run_block(block, x, context, sites, visit), block(x, *context.of_blocks))
        assert met == [site for site in sites_of(made) if site in sites]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", MEASURED)
@pytest.mark.parametrize("mode", ["batch", "two_passes"])
def test_a_batch_makes_the_schedules_of_its_samples_alone(name: str, policy: str, mode: str) -> None:
    made, contexts = model(name), PAIR if mode == "batch" else TWO
    run = start(made, MEASURED[policy], contexts)
    together = generate(run.forward, SEEDS, mode=mode)
    for place, seed in enumerate(SEEDS):
        alone = start(made, MEASURED[policy], contexts)
        found = generate(alone.forward, [seed], mode=mode)
        for context in contexts:
            assert schedules(alone, context)[0] == schedules(run, context)[place]
        torch.testing.assert_close(found[0], together[place], rtol=1e-3, atol=1e-3)
    own = schedules(run, contexts[0])
    assert len({tuple(schedule) for schedule in own}) > 1, own  # else this test would not see a shared decision
    assert run.summary().flops_ratio < 1


@pytest.mark.parametrize("name", MODELS)
def test_each_pass_of_guidance_has_a_context_of_its_own(name: str) -> None:
    run = start(model(name), MEASURED["first_block"], TWO)
    generate(run.forward, SEEDS, mode="two_passes")
    alone = start(model(name), MEASURED["first_block"], TWO[:1])
    generate(alone.forward, SEEDS, scale=1.0)  # another way through the noise, with the texts alone
    assert set(run.summary().contexts) == set(TWO)
    assert all(len(schedule) == STEPS for context in TWO for schedule in schedules(run, context))
    assert run.stored["text"][0] is not run.stored["negative"][0]


def test_two_evaluations_a_step_have_their_places() -> None:
    run = start(model("dit"), KNOWN["fixed"], solver="heun")
    generate(run.forward, SEEDS, solver="heun")
    places = [n % 3 == 0 or n == 2 * STEPS - 2 for n in range(2 * STEPS - 1)]
    assert schedules(run) == [places] * len(SEEDS)
    with pytest.raises(ValueError, match="made for 15 calls, and is asked for one of 8"):
        generate(run.forward, SEEDS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", [*MEASURED, *KNOWN])
def test_executed_flops_are_what_torch_counts_over_the_run(name: str, policy: str) -> None:
    made = model(name)
    run = start(made, (MEASURED | KNOWN)[policy])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generate(run.forward, SEEDS)
    summary = run.summary()
    assert summary.executed_flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert summary.full_flops == 2 * len(SEEDS) * STEPS * made.flops((3, 2, 3), {"minilm": 7})
    assert 0.2 < summary.flops_ratio < 0.98
    assert policy.split(",")[0] in ("taylor", "sites", summary.policy) and f"{summary.flops_ratio:.1%}" in str(summary)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", [*MEASURED, "fixed", "delta_dit", "taylor"])
def test_policies_of_the_whole_stack_store_one_summed_residual(name: str, policy: str) -> None:
    run = start(model(name), (MEASURED | KNOWN)[policy])
    generate(run.forward, SEEDS)
    stored = run.stored["pair"]
    assert [tuple(tensor.shape) for tensor in stored] == [(2 * len(SEEDS), 18, 32)] * (3 if policy == "taylor" else 1)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("policy", "error"),
    [("teacache", Stop), ("first_block", Stop), ("adacache", Stop), ("taylor", Stop), ("pab", KeyboardInterrupt)],
)
def test_an_aborted_generation_leaves_nothing_behind(policy: str, error: type[BaseException]) -> None:
    made = model("lingen")
    before = {name: set(vars(module)) for name, module in made.named_modules()}
    expected = uncached(made, SEEDS)

    def abort(step: int, sigma: float, x: Tensor) -> Tensor:
        if step == 4:
            raise error
        return x

    def attempt() -> list[weakref.ref[Any]]:
        run = start(made, (MEASURED | KNOWN)[policy])
        with pytest.raises(error):
            generate(run.forward, SEEDS, after=abort)
        assert run.stored["pair"]
        return [weakref.ref(run), *(weakref.ref(tensor) for tensor in run.stored["pair"])]

    left = attempt()
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)
    assert not [thing for thing in gc.get_objects() if type(thing) is CacheRun]
    assert {name: set(vars(module)) for name, module in made.named_modules()} == before
    assert torch.equal(uncached(made, SEEDS), expected)


def test_nothing_waits_for_the_device_more_than_once_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would have to finish first: a number, a truth value or an index read from a tensor; or a list that is
    copied to it, be it as an index."""
    waits: Counter[str] = Counter()

    def from_sampling() -> bool:
        return "/lingen/sampling/" in sys._getframe(2).f_code.co_filename

    for method in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(Tensor, method)

        def counted(self: Tensor, *words: Any, original: Any = original, method: str = method) -> Any:
            waits[method] += 1
            return original(self, *words)

        monkeypatch.setattr(Tensor, method, counted)
    for make in ("tensor", "as_tensor"):
        original = getattr(torch, make)

        def made(*words: Any, original: Any = original, make: str = make, **named: Any) -> Any:
            waits[make] += from_sampling() and "device" in named
            return original(*words, **named)

        monkeypatch.setattr(torch, make, made)
    for method in ("__getitem__", "__setitem__"):
        original = getattr(Tensor, method)

        def indexed(self: Tensor, *words: Any, original: Any = original, method: str = method) -> Any:
            waits[method] += from_sampling() and isinstance(words[0], list)
            return original(self, *words)

        monkeypatch.setattr(Tensor, method, indexed)
    for policy, config in (MEASURED | KNOWN).items():
        run = start(model("lingen"), config)
        waits.clear()
        uncached(model("lingen"), SEEDS)
        ours = Counter(waits)
        waits.clear()
        generate(run.forward, SEEDS)
        waits.subtract(ours)
        assert 0 <= waits.total() <= (STEPS if policy in MEASURED else 0), (policy, waits)


def test_a_cache_needs_no_gradients() -> None:
    made, parameter = model("dit"), nn.Parameter(noise := torch.randn(2, 4, 3, 4, 6))
    run = start(made, KNOWN["fixed"], ("text",))
    states, mask = text_of([0, 1])
    for n in range(3):
        velocity = run.forward(parameter, torch.full((2,), 0.5), states, mask, Call(n, STEPS, 0.5, n))
        assert not velocity.requires_grad
    assert torch.equal(parameter.detach(), noise)
