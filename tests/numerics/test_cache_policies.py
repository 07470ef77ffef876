"""When each policy computes, how what it stored is reused, and what it refuses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lingen.cache_config import read_cache
from lingen.errors import UserError
from lingen.models import Backbone
from lingen.reuse_config import Reusing
from lingen.sampling.cache import CacheRun
from lingen.sampling.cache.magcache import MeasureNorms, fingerprint, mean_ratios, read_ratios, write_ratios
from lingen.sampling.cache.store import Stored
from lingen.sampling.call import Call, Context
from tests.caches import PAIR, STEPS, TWO, generate, model, schedules, start

MODELS = ["dit", "lingen"]


def call(index: int, sigma: float = 0.5, count: int = 10) -> Call:
    return Call(index, count, sigma, index, 0, "pair")


def when(config: dict[str, Any], made: Backbone, steps: int = 10) -> dict[str, list[int]]:
    """At which calls each site is computed, in a generation whose noise levels are 1, (N-1)/N, ..."""
    policy: Any = start(made, config, steps=steps)._lanes["pair"].policy  # type: ignore[attr-defined]
    calls = [call(n, 1 - n / steps, steps) for n in range(steps)]
    return {site: [c.index for c in calls if policy.computes(c, site)] for site in policy.sites}


# ------------------------------------------------------------------------------------ when


def test_pab_has_a_period_for_each_kind_of_attention_inside_its_window() -> None:
    """Noise levels 0.9 to 0.5 lie between 0.45 and 0.93: calls 1 to 5 of 10."""
    config = {"policy": "pab", "spatial": 2, "temporal": 3, "cross": 5}
    outside = [0, 6, 7, 8, 9]
    spatial, temporal, cross = (sorted({*outside, *more}) for more in ([2, 4], [3], [5]))
    assert when(config, model("dit")) == {"self": spatial, "cross": cross}
    assert when(config, model("lingen")) == {"ma": temporal, "te": spatial, "cross": cross}


@pytest.mark.parametrize(("name", "mixer"), [("dit", "self"), ("lingen", "mate")])
def test_tgate_reuses_the_mixer_before_its_gate_and_the_cross_attention_behind_it(name: str, mixer: str) -> None:
    found = when({"policy": "tgate", "gate": 0.4, "period": 2}, model(name))
    assert found == {mixer: [0, 2, 4, 5, 6, 7, 8, 9], "cross": [0, 1, 2, 3]}


def test_sites_have_fixed_intervals_of_their_own() -> None:
    found = when({"policy": "fixed", "sites": {"te": 4, "mlp": 3}, "first": 2, "last": 0}, model("lingen"))
    assert found == {"te": [0, 1, 4, 8], "mlp": [0, 1, 3, 6, 9]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"period": 3}, [0, 3, 6, 7]),
        ({"period": 3, "first": 2, "last": 0}, [0, 1, 4, 7]),
        ({"period": 2, "last": 3}, [0, 2, 4, 5, 6, 7]),
        ({"period": 8, "last": 0}, [0]),
    ],
)
def test_the_whole_stack_has_fixed_intervals(words: dict[str, Any], expected: list[int]) -> None:
    run = start(model("dit"), {"policy": "fixed", **words})
    generate(run.forward, [0, 1])
    assert schedules(run) == [[n in expected for n in range(STEPS)]] * 2


def test_delta_dit_reuses_the_rear_blocks_early_and_the_front_ones_late() -> None:
    """Each block that runs leaves its number; where the range changes, it is computed."""
    made, ran = model("dit"), list[list[int]]()
    hooks = [block.register_forward_hook(lambda *_, i=i: ran[-1].append(i)) for i, block in enumerate(made.blocks)]
    run = start(made, {"policy": "delta_dit", "gate": 0.4, "blocks": 0.5})

    def forward(*words: Any) -> Tensor:
        ran.append([])
        return run.forward(*words)

    try:
        generate(forward, [0])
    finally:
        for hook in hooks:
            hook.remove()
    whole, front, rear = [0, 1, 2, 3], [0, 1], [2, 3]
    assert ran == [whole, front, whole, front, whole, rear, whole, rear]


def test_teacache_sums_the_rescaled_change_until_the_threshold() -> None:
    """Against the published loop over numbers."""
    polynomial = (2.0, -0.5, 0.03)
    seen: list[Tensor] = []
    run = start(model("dit"), {"policy": "teacache", "threshold": 0.02, "coefficients": list(polynomial)})
    policy: Any = run._lanes["pair"].policy  # type: ignore[attr-defined]
    decide = policy.decide

    def watched(now: Call, front: Any) -> list[bool]:
        seen.append(front.modulated())
        found: list[bool] = decide(now, front)
        return found

    policy.decide = watched
    generate(run.forward, [2])
    total, expected = 0.0, [True]
    for before, now in pairwise(seen):
        change = ((now - before).abs().mean() / before.abs().mean()).item()
        total += polynomial[0] * change**2 + polynomial[1] * change + polynomial[2]
        expected.append(total >= 0.02 or len(expected) == STEPS - 1)
        total = 0.0 if expected[-1] else total
    assert schedules(run) == [expected] and 2 < sum(expected) < STEPS


@pytest.mark.parametrize("name", MODELS)
def test_magcache_foresees_the_error_from_calibrated_norms(name: str, tmp_path: Path) -> None:
    made, measured = model(name), list[MeasureNorms]()

    def measure(context: Context) -> MeasureNorms:
        measured.append(MeasureNorms(len(made.blocks)))
        return measured[-1]

    for seeds in ([0, 1], [2, 3]):
        run = CacheRun.measuring(measure, made, calls=STEPS, contexts=PAIR)
        generate(run.forward, seeds)
        assert run.summary().flops_ratio == 1
    ratios = mean_ratios(measured)
    assert len(ratios) == STEPS and ratios[0] == 1 and all(0.5 < ratio < 2 for ratio in ratios)
    path = tmp_path / "ratios.json"
    write_ratios(path, made, STEPS, {"pair": ratios})
    cached = start(made, {"policy": "magcache", "ratios": str(path), "threshold": 0.1, "max_skips": 2})
    generate(cached.forward, [4, 5])
    expected, product, error, skips = [True, True], 1.0, 0.0, 0  # a fifth of 8 calls, rounded
    for ratio in ratios[2:]:
        product, skips = product * ratio, skips + 1
        error += abs(1 - product)
        expected.append(error > 0.1 or skips > 2)
        if expected[-1]:
            product, error, skips = 1.0, 0.0, 0
    assert schedules(cached) == [expected] * 2 and not all(expected)


# ------------------------------------------------------------------------------------ how


@pytest.mark.parametrize(("order", "over"), [(1, "call"), (2, "call"), (2, "sigma")])
def test_taylor_goes_on_as_the_polynomial_through_what_was_computed(order: int, over: str) -> None:
    """Exact at any distances, and each row has its own."""
    stored = Stored(Reusing(reuse="taylor", order=order, over=over))  # type: ignore[arg-type]
    slope = torch.randn(order + 1, 3, 2, 4, dtype=torch.float64)

    def truth(now: Call) -> Tensor:
        t = now.index if over == "call" else now.sigma
        return sum(slope[i] * t**i for i in range(order + 1))  # type: ignore[return-value]

    places = [call(n, 1 / (1 + n)) for n in range(12)]
    for n, rows in ((0, None), (1, None), (3, [0, 2]), (4, [0]), (7, [2, 0]), (8, [1])):
        value = truth(places[n])
        stored.put(places[n], value if rows is None else value[rows], rows)
    assert len(stored.values) == order + 1
    if order == 1:
        assert stored.get(places[10])[1].allclose(truth(places[10])[1])
    else:  # row 1 has been computed at calls 0, 1, 8
        assert stored.get(places[10]).allclose(truth(places[10]))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    some, all_ = x.clone(), x.clone()
    stored.add_to(some, places[11], [0, 2])
    stored.add_to(all_, places[11])
    assert torch.equal(some[1], x[1]) and some[[0, 2]].allclose((x + truth(places[11]))[[0, 2]])
    assert all_[[0, 2]].allclose(some[[0, 2]]) and all_.allclose(x + stored.get(places[11]))


def test_taylor_takes_what_there_is_and_no_distance_of_zero() -> None:
    stored = Stored(Reusing(reuse="taylor", order=2, over="sigma"))
    stored.put(call(0, 1.0), torch.full((1, 1, 1), 2.0))
    assert stored.get(call(1, 0.9)).item() == 2.0
    stored.put(call(1, 0.5), torch.full((1, 1, 1), 9.0))
    stored.put(call(2, 0.5), torch.full((1, 1, 1), 3.0))  # Heun's method comes back to a noise level
    assert stored.get(call(3, 0.0)).item() == pytest.approx(4.0)


def test_a_noise_level_that_only_some_rows_were_computed_at_before_is_no_distance_of_zero() -> None:
    """Row 0 was computed at both of a level's calls, row 1 at the second alone; then each goes on its own line."""
    stored = Stored(Reusing(reuse="taylor", order=1, over="sigma"))
    stored.put(call(0, 1.0), torch.tensor([1.0, 1.0])[:, None, None])
    stored.put(call(1, 0.5), torch.full((1, 1, 1), 9.0), [0])
    stored.put(call(2, 0.5), torch.tensor([3.0, 2.0])[:, None, None])
    assert stored.get(call(3, 0.0)).flatten().tolist() == [5.0, 3.0]


def test_a_held_residual_is_added_as_it_was() -> None:
    stored, value, x = Stored(Reusing()), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    stored.put(call(0), value)
    assert stored.get(call(5)) is value
    expected = x + value
    stored.add_to(x, call(5))
    assert torch.equal(x, expected)


def test_taylor_stays_nearer_to_the_whole_computation_than_holding() -> None:
    """On noise levels close to each other, where a residual is smooth."""
    made = model("dit")
    states = {"minilm": torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(1))}
    mask, noise = torch.ones(1, 7, dtype=torch.bool), torch.randn(1, 4, 3, 4, 6)
    errors = {}
    for reuse in ("hold", "taylor"):
        run = start(made, {"policy": "fixed", "period": 8, "first": 2, "last": 0, "reuse": reuse}, ("text",))
        errors[reuse] = 0.0
        for n in range(STEPS):
            sigma, x = torch.tensor([0.5]), noise * (1 + 0.01 * n)
            found = run.forward(x, sigma, states, mask, Call(n, STEPS, 0.5, n))
            errors[reuse] += (found - made(x, sigma, states, mask)).norm().item()
    assert 0 < errors["taylor"] < 0.2 * errors["hold"]


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "depth", "config", "part"),
    [
        ("dit", 4, {"policy": "fixed", "sites": {"te": 2}}, "has no site 'te'; known: cross, mlp, self"),
        ("lingen", 4, {"policy": "fixed", "sites": {"self": 2}}, "has no site 'self'; known: cross, ma, mate, mlp, te"),
        ("lingen", 4, {"policy": "fixed", "sites": {"mate": 2, "te": 3}}, "'mate' is both of its branches"),
        ("dit", 4, {"policy": "fixed", "period": 9}, "period=9: this generation has 8 calls"),
        ("dit", 4, {"policy": "fixed", "sites": {"mlp": 9}}, "sites.mlp=9: this generation has 8 calls"),
        ("dit", 1, {"policy": "first_block"}, "needs a model of two blocks"),
        ("dit", 4, {"policy": "magcache", "ratios": "nowhere.json"}, "ratios=nowhere.json cannot be read"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_anything_runs(
    name: str, depth: int, config: dict[str, Any], part: str
) -> None:
    with pytest.raises(UserError) as caught:
        start(model(name, depth), config)
    assert part in str(caught.value)


def test_a_site_that_an_ablation_leaves_out_is_refused() -> None:
    without = model("lingen", 2, "model.mate.ma=false")
    with pytest.raises(UserError, match="has no site 'ma'"):
        start(without, {"policy": "fixed", "sites": {"ma": 2}})
    assert set(when({"policy": "pab"}, without)) == {"te", "cross"}


def test_a_calibration_is_of_one_model_one_length_and_one_guidance(tmp_path: Path) -> None:
    path, made = tmp_path / "ratios.json", model("dit")
    config = {"policy": "magcache", "ratios": str(path)}
    write_ratios(path, made, STEPS, {"pair": [1.0] * STEPS})
    start(made, config)
    for other, words, part in (
        (model("lingen"), {}, "calibrated for another model"),
        (made, {"steps": STEPS + 2}, f"calibrated for {STEPS} calls, this generation has {STEPS + 2}"),
        (made, {"solver": "heun"}, f"calibrated for {STEPS} calls, this generation has {2 * STEPS - 1}"),
        (made, {"contexts": TWO}, "is for 'pair', this generation has 'text'"),
    ):
        with pytest.raises(UserError, match=part):
            start(other, config, **words)
    path.write_text(json.dumps({"model": fingerprint(made), "calls": STEPS, "ratios": {"pair": [1.0, "x"]}}))
    with pytest.raises(UserError, match="is no calibration of MagCache"):
        read_ratios(path, made, STEPS)


def test_the_fingerprint_knows_the_weights_and_not_their_precision() -> None:
    made = model("dit", 2)
    half = model("dit", 3)
    assert fingerprint(made) != fingerprint(half)
    copy = make_like(made)
    assert fingerprint(copy.to(torch.bfloat16)) == fingerprint(made)
    with torch.no_grad():
        copy.get_parameter("blocks.1.table")[2, 3] += 1.0
    assert fingerprint(copy) != fingerprint(made)


def make_like(made: Backbone) -> Backbone:
    import copy

    return copy.deepcopy(made)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("pab_slwo", "cache=pab_slwo does not exist in conf/cache; did you mean 'pab_slow'?"),
        ("{policy: tecache}", "policy=tecache does not exist; did you mean 'teacache'?"),
        ({"period": 2}, "policy is not set; give policy=NAME"),
        ("{policy: fixed}", "needs either period, of the whole stack, or sites with a period each, not both"),
        ("{policy: fixed, period: 2, sites: {mlp: 2}}", "not both"),
        ("{policy: fixed, period: 0}", "period=0: Input should be greater than or equal to 1"),
        ("{policy: fixed, period: 2, order: 2}", "order is of reuse=taylor"),
        ("{policy: fixed, period: 2, reuse: taylor, order: 3}", "order=3: Input should be 1 or 2"),
        ("{policy: teacache, threshold: 0}", "threshold=0: Input should be greater than 0"),
        ("{policy: teacache, thresold: 1}", "unknown key 'thresold'; did you mean 'threshold'?"),
        ("{policy: pab, window: [0.9, 0.2]}", "the first noise level must be below the second"),
        ("{policy: tgate, gate: 1.5}", "gate=1.5: Input should be less than or equal to 1"),
        ("{policy: delta_dit, blocks: 0}", "blocks=0: Input should be greater than 0"),
        ("nowhere.yaml", "cache=nowhere.yaml cannot be read"),
        ("{policy: [", "cannot be read"),
    ],
)
def test_a_wrong_cache_is_named(given: Any, part: str) -> None:
    with pytest.raises(UserError) as caught:
        read_cache(given)
    assert part in str(caught.value)


def test_a_cache_is_named_by_a_file_its_keys_or_itself(tmp_path: Path) -> None:
    named = read_cache("pab_slow")
    assert read_cache(named) == named == read_cache(named.model_dump())
    path = tmp_path / "mine.yaml"
    path.write_text("policy: fixed\nperiod: 4\n")
    assert read_cache(path) == read_cache(str(path)) == read_cache("{policy: fixed, period: 4}")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"mine\.yaml is no text"):
        read_cache(path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "conf" / "cache").glob("*.yaml")), ids=str)
def test_every_named_cache_is_one(path: Path) -> None:
    assert read_cache(path.stem).policy == yaml.safe_load(path.read_text())["policy"]
