"""AdaCache in a generation: who decides, by what, and that off, batches and guidance in two passes agree."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lingen.adacache_config import AdaCacheConfig
from lingen.compose import compose
from lingen.errors import UserError
from lingen.models import Backbone, make_model
from lingen.models.backbone import Context as ModelContext
from lingen.models.block import Part
from lingen.models.parallel import ALONE
from lingen.sampling.adacache import reference_schedule
from lingen.sampling.cache.adacache import FixedPolicy, Judge, adacache_policies
from lingen.sampling.cache.distance import change_sums, motion_sums
from lingen.sampling.cache.layout import Layout
from lingen.sampling.cache.policy import Seen, StackPolicy
from lingen.sampling.cache.run import CacheRun
from lingen.sampling.cache.sites import blocks_of, run_block
from lingen.sampling.call import Context
from lingen.sampling.guidance import forward_of, guided
from lingen.sampling.solver import evaluations, solve

SMALL = [
    "name=test", "data.path=none", "autoencoder.path=none", "autoencoder.channels=4", "size.d_model=32",
    "size.head_dim=8", "size.d_state=8", "size.mlp_ratio=2", "size.depth={lingen: 4, dit: 4}",
    "text.encoders.minilm.dim=12",
]  # fmt: skip
MODELS = {"dit": ["model=dit"], "lingen": ["model=lingen", "model.mate.mamba_head_dim=8", "model.mate.window=[2,3,3]"]}
STEPS = 12
# Between the changes of these models, so that samples decide differently.
BOOK = {"codebook": [[0.5, 4], [0.8, 3], [1.2, 2]], "last": 1}
MOTION = {"window": [2, 9], "scale": 0.25, "power": 1.0, "weight": 2.0, "strides": [1, 2]}
ONES = {"codebook": [[0.1, 1], [0.5, 1]], "last": 1}


@cache
def model_of(name: str) -> Backbone:
    """A model whose gates and heads are awake."""
    torch.manual_seed(0)
    model = make_model(compose([*SMALL, *MODELS[name]]))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval().requires_grad_(False)


def text_of(rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    states = torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(row)) for row in rows])
    return {"minilm": states}, torch.ones(len(rows), 5, dtype=torch.bool)


class Generation:
    """One generation of samples that their seeds tell apart, cached as ``config`` says, or not at all."""

    def __init__(
        self,
        model: Backbone,
        config: dict[str, Any] | None,
        seeds: list[int],
        *,
        guidance: Literal["batch", "two_passes"] = "batch",
        solver: str = "euler",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.policies: dict[str, StackPolicy] = {}
        calls, names = evaluations(solver, STEPS), {"batch": ["pair"], "two_passes": ["text", "negative"]}[guidance]
        forward = forward_of(model)
        if config is not None:
            make = adacache_policies(AdaCacheConfig.model_validate(config), model, calls)

            def kept(context: Context) -> StackPolicy:
                self.policies[context] = make(context)
                return self.policies[context]

            run = CacheRun.measuring(kept, model, calls=calls, contexts=names)  # type: ignore[arg-type]
            forward = run.forward
        noise = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        empty = text_of([99] * len(seeds))
        denoise = guided(forward, text_of(seeds), empty, 3.0, device=torch.device("cpu"), dtype=dtype, mode=guidance)
        sigmas = torch.linspace(1, 0, STEPS + 1)
        self.latents = solve(denoise, torch.stack(noise), sigmas, solver, lambda step, sigma, x: x)
        if config is not None:
            self.schedules = {name: context.schedules for name, context in run.summary().contexts.items()}


@pytest.mark.parametrize("mode", ["reference", "fixed"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_codebook_of_all_ones_is_off_bit_for_bit(name: str, mode: str) -> None:
    model = model_of(name)
    off = Generation(model, None, [1, 2]).latents
    for moreg in (None, MOTION):
        ones = Generation(model, {"mode": mode, **ONES, "moreg": moreg}, [1, 2])
        assert torch.equal(ones.latents, off)
        assert ones.schedules["pair"] == [[True] * STEPS] * 2


@pytest.mark.parametrize("moreg", [None, MOTION])
@pytest.mark.parametrize("name", list(MODELS))
def test_reference_decides_as_the_published_code(
    name: str, moreg: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor | None] = [None] * STEPS
    learn = adacache_module().ReferencePolicy.learn

    def noting(self: Any, call: Any, now: Seen) -> None:
        assert now.probe is not None
        seen[call.index] = torch.unflatten(now.probe, 1, (3, -1)).movedim(1, 0).clone()
        learn(self, call, now)

    monkeypatch.setattr(adacache_module().ReferencePolicy, "learn", noting)
    done = Generation(model_of(name), {"mode": "reference", **BOOK, "moreg": moreg}, [1, 2])
    one, other = done.schedules["pair"]
    assert one == other and 4 < sum(one) < STEPS
    assert [probe is not None for probe in seen] == one
    book = (BOOK["codebook"], BOOK["last"])
    assert reference_schedule(seen, STEPS, book, moreg) == one  # type: ignore[arg-type]


def adacache_module() -> Any:
    return sys.modules[FixedPolicy.__module__]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_batch_makes_the_schedules_of_single_runs(name: str, solver: str) -> None:
    config = {**BOOK, "moreg": MOTION}
    together = Generation(model_of(name), config, [1, 2, 3, 4], solver=solver)
    alone = [Generation(model_of(name), config, [seed], solver=solver) for seed in (1, 2, 3, 4)]
    assert together.schedules["pair"] == [one.schedules["pair"][0] for one in alone]
    assert solver == "heun" or len({tuple(schedule) for schedule in together.schedules["pair"]}) > 1
    for latents, one in zip(together.latents, alone, strict=True):
        assert torch.allclose(latents, one.latents[0], atol=1e-4)


@pytest.mark.parametrize("name", list(MODELS))
def test_guidance_in_two_passes_decides_as_in_one_batch(name: str) -> None:
    config = {**BOOK, "moreg": MOTION}
    batch = Generation(model_of(name), config, [1, 2, 3])
    passes = Generation(model_of(name), config, [1, 2, 3], guidance="two_passes")
    assert passes.schedules["text"] == passes.schedules["negative"] == batch.schedules["pair"]
    assert torch.allclose(passes.latents, batch.latents, atol=1e-4)


def test_one_sample_without_motion_is_decided_alike_in_both_modes() -> None:
    for seed in range(4):
        runs = [Generation(model_of("dit"), {"mode": mode, **BOOK}, [seed]) for mode in ("reference", "fixed")]
        assert runs[0].schedules == runs[1].schedules


def test_a_decision_waits_once_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        original: Callable[..., Any] = getattr(Tensor, name)

        def counted(self: Tensor, original: Callable[..., Any] = original, name: str = name) -> Any:
            if name != "tolist" or sys._getframe(1).f_code.co_filename.endswith("adacache.py"):
                waits.append(name)
            return original(self)

        monkeypatch.setattr(Tensor, name, counted)
    for mode in ("fixed", "reference"):
        waits.clear()
        done = Generation(model_of("dit"), {"mode": mode, **BOOK, "moreg": MOTION}, [1, 2, 3])
        assert 0 < len(waits) <= max(map(sum, zip(*done.schedules["pair"], strict=True))) * STEPS / 3
        assert len(waits) < STEPS


def judge(calls: int, **config: Any) -> Judge:
    return Judge(AdaCacheConfig.model_validate(BOOK | config), calls)


def walk(judge: Judge, sums: dict[int, list[float]]) -> list[int]:
    """The calls that are computed where a computed call shows these sums."""
    computed = []
    for call in range(1, max(sums) + 1):
        if judge.computes(call, 1)[0]:
            computed.append(call)
            if judge.wants(call) and call > 1:
                judge.hear([0], torch.tensor(sums[call], dtype=torch.float64)[:, None])
    return computed


def test_the_real_gap_is_used_where_guards_came_sooner() -> None:
    """At the end of the guards the gap is 1, whatever the rate would have been."""
    sums = {call: [0.7, 1.0] for call in range(1, 21)}
    done = judge(20, guards={"first": 5, "last": 2})
    assert walk(done, sums)[:6] == [1, 2, 3, 4, 5, 8]
    assert [(m.call, m.gap, m.rate) for m in done.measured[0]][:2] == [(5, 1, 3), (8, 3, 4)]


def test_motion_has_no_gradient_across_the_edges_of_its_window() -> None:
    moreg = {"window": [4, 8], "scale": 0.5, "power": 2.0, "weight": 10.0}
    sums = {call: [3.0, 1.0, *([0.4, 1.0] if 4 <= call <= 8 else [])] for call in range(1, 13)}
    done = judge(12, moreg=moreg)
    assert walk(done, sums) == list(range(1, 13))
    changes = {m.call: m.change for m in done.measured[0]}
    assert changes[3] == changes[9] == 3.0  # outside
    assert changes[4] == changes[5] == pytest.approx(3.0 * 0.64)  # at its first call and inside, where nothing changes
    motions = {m.call: m.motion for m in done.measured[0]}
    assert motions[3] is None and motions[4] == pytest.approx(0.4)


def test_zeros_take_the_last_rate() -> None:
    done = judge(10)
    assert walk(done, {call: [0.0, 0.0] for call in range(1, 11)}) == list(range(1, 11))


@pytest.mark.parametrize("entries", [0, 1, 9])
def test_codebooks_have_any_length(entries: int) -> None:
    done = judge(30, codebook=[[0.05 * (i + 1), 10 - i] for i in range(entries)], last=2)
    walk(done, {call: [0.07, 1.0] for call in range(1, 31)})
    assert done.measured[0][0].rate == (2 if entries < 2 else 9)


def layout(grid: tuple[int, int, int], rows: int) -> Layout:
    return Layout(rows, rows, grid, ALONE)


def test_sums_hold_in_fp16() -> None:
    grid = (3, 16, 16)
    old = torch.full((2, 768, 64), 300.0, dtype=torch.float16)
    assert old.norm(p=1).isinf()
    sums = change_sums(old, old * 0.5, layout(grid, 2))
    assert torch.equal(sums[0] / sums[1], torch.full((2,), 0.5, dtype=torch.float64))
    moving = (torch.unflatten(old, 1, grid) * torch.tensor([1.0, 2.0, 3.0]).half()[:, None, None, None]).flatten(1, 3)
    far = motion_sums(moving, (1, 2, 3), layout(grid, 2))
    assert (far[0] / far[1]).tolist() == [0.25] * 2 and (far[2] / far[3]).tolist() == [0.5] * 2
    assert far[4:].tolist() == [[0.0, 0.0]] * 2  # there are not so many frames


@pytest.mark.parametrize(("name", "site"), [("dit", "self"), ("lingen", "te")])
def test_the_probe_is_at_mid_depth(name: str, site: str) -> None:
    make = adacache_policies(AdaCacheConfig.model_validate(BOOK), model_of(name), 10)
    assert make("pair").probe == (1, site)
    other = AdaCacheConfig.model_validate(BOOK | {"probe": {"block": 3, "site": "mlp"}})
    assert adacache_policies(other, model_of(name), 10)("pair").probe == (3, "mlp")
    with pytest.raises(UserError, match=r"probe\.block=4: the model's blocks are 0 to 3"):
        adacache_policies(AdaCacheConfig.model_validate(BOOK | {"probe": {"block": 4}}), model_of(name), 10)


def test_what_the_scan_adds_is_probed_in_natural_order_without_review_tokens() -> None:
    """A token's gate and its way past the scan are its own, so where one token of x is another, what the MA-branch adds
    changes most in its place, of nearly all: whatever the order in which the layer scans."""
    model = model_of("lingen")
    grid, tokens = (3, 3, 3), 27
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0)).expand(1 + tokens, -1, -1).clone()
    x[range(1, 1 + tokens), range(tokens)] *= -1.0
    modulation = torch.zeros(1 + tokens, 6, 32)
    states, mask = text_of([0] * len(x))
    for block in blocks_of(model):
        seen: list[Tensor] = []

        def watch(site: str, part: Part, compute: Callable[[], Tensor], seen: list[Tensor] = seen) -> Tensor:
            seen.append(part.residual(compute()))
            return seen[-1]

        context = ModelContext(grid, modulation, model.text(states, x.dtype), mask, modulation[:, 0], x.dtype)
        run_block(block, x, context, ("ma",), watch)
        assert seen[0].shape == x.shape
        changed = (seen[0][1:] - seen[0][:1]).norm(dim=-1)  # (token that is another, where it shows)
        in_place = int((changed.argmax(1) == torch.arange(tokens)).sum())
        assert in_place > 0.7 * tokens  # in another order few would be


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"codebook": [[0.2, 2], [0.1, 3]]}, "ascend"),
        ({"codebook": [[0.2, 0]]}, "codebook"),
        ({"codebook": [[-0.2, 2]]}, "codebook"),
        ({"codebook": [[0.2, 2]], "mode": "reference", "guards": {"first": 2}}, "guards"),
        ({"codebook": [[0.2, 2]], "mode": "reference", "reuse": "taylor"}, "reuse"),
        ({"codebook": [[0.2, 2]], "moreg": {"window": [9, 2]}}, "window"),
        ({"codebook": [[0.2, 2]], "probe": {"site": "attention"}}, "site"),
        ({}, "codebook"),
    ],
)
def test_a_wrong_configuration_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaCacheConfig.model_validate(config)
