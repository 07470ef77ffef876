"""What the memory of training is predicted to be, against what torch's allocator says that it was."""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch.autograd.profiler import profile

from lingen.bench.workload import Subject, bench_config
from lingen.config import Config, EngineConfig
from lingen.kernels import forms
from lingen.kernels.index import Grid
from lingen.memory import GATHERED, Live, Memory, Probe, lay_out, planned_forms, predict, probe

T = TypeVar("T")
CPU = torch.device("cpu")


def allocated(call: Callable[[], T]) -> tuple[T, int, int]:
    """What ``call`` returns, the bytes that stay allocated, and the most that were: from the allocator's own events."""
    gc.collect()
    with profile(profile_memory=True, use_kineto=True) as recorded:
        value = call()
        gc.collect()
    assert recorded.kineto_results is not None
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return value, held, most


def measured(config: Config, grid: Grid) -> tuple[int, int]:
    """(bytes at the fullest moment of a training step, at that of building)."""
    subject, resident, building = allocated(lambda: Subject(config, CPU, train=True))
    _, _, step = allocated(subject.call(grid))
    return resident + step, building


def without_average(memory: Memory) -> int:
    """A step of the benchmarks keeps no average of the weights."""
    return memory.step - memory.average


@pytest.mark.parametrize("model", ["lingen", "dit"])
@pytest.mark.parametrize(
    ("size", "grid", "dtype", "checkpointing"),
    [
        ("tiny", (5, 10, 10), "fp32", False),
        ("tiny", (5, 10, 10), "bf16", True),
        ("small", (2, 6, 6), "fp32", True),
        ("small", (2, 6, 6), "bf16", False),
    ],
)
def test_the_prediction_holds(size: str, grid: Grid, model: str, dtype: str, checkpointing: bool) -> None:
    words = (
        f"engine.dtype={dtype}",
        f"engine.activation_checkpointing={checkpointing}",
        "text.encoders.minilm.length=16",
    )
    config = bench_config(model, size, *words)
    memory = predict(config, grid, batch=1, world=1, kernels=planned_forms(config, "cpu"))
    step, building = measured(config, grid)
    assert without_average(memory) == pytest.approx(step, rel=0.05)
    assert memory.building == pytest.approx(building, rel=0.05)


@pytest.mark.parametrize("word", ["ssm=mamba1", "te=false", "ma=false", "review_pool=null", "projections=separate"])
def test_every_mixer_can_be_predicted(word: str) -> None:
    config = bench_config(
        "lingen", "tiny", f"model.mate.{word}", "text.encoders.minilm.length=16", "size.depth.lingen=3"
    )
    memory = predict(config, (4, 12, 12), batch=1, world=1, kernels=planned_forms(config, "cpu"))
    assert without_average(memory) == pytest.approx(measured(config, (4, 12, 12))[0], rel=0.1)


@pytest.fixture
def fused() -> Iterator[dict[str, str]]:
    """Our Triton kernels in the interpreter."""
    asked = {"conv": "triton", "norm": "triton", "window": "triton"}
    forms.ask(asked, CPU)
    yield {"ssd": "torch", "selective_scan": "torch", "attention": "sdpa"} | asked
    forms.ask({}, CPU)


def test_fused_kernels_are_predicted_by_what_they_allocate(fused: dict[str, str]) -> None:
    words = (
        "size.d_model=32",
        "size.head_dim=16",
        "size.d_state=8",
        "size.depth.lingen=2",
        "text.encoders.minilm.length=4",
    )
    mate = ("model.mate.mamba_head_dim=16", "model.mate.chunk_size=16", "model.mate.window=[2,2,2]")
    config = bench_config("lingen", "tiny", *words, *mate)
    grid = (2, 2, 4)
    found = probe(config, grid, batch=1, kernels=fused)
    plain = probe(config, grid, batch=1, kernels=planned_forms(config, "cpu"))
    meter = Live("cpu")
    with meter:
        step = Subject(config, CPU, train=True).call(grid)
        resident = meter.peak = meter.bytes
        step()
    assert found.activations == pytest.approx(meter.peak - resident, rel=0.05)
    assert found.activations < 0.9 * plain.activations
    assert forms.chosen("conv", CPU) == "triton"  # a probe leaves the forms as they were


def test_mamba_ssm_is_predicted_where_it_is_installed() -> None:
    if not importlib.util.find_spec("mamba_ssm"):
        pytest.skip("mamba-ssm is not installed")
    config = bench_config("lingen", "tiny", "engine.dtype=bf16")
    kernels = planned_forms(config, "cuda")
    assert kernels["ssd"] == "mamba-ssm"
    fused, plain = (
        probe(config, (8, 16, 16), batch=1, kernels=kernels | {"ssd": form}) for form in ("mamba-ssm", "torch")
    )
    assert 0.5 * plain.activations < fused.activations < plain.activations


def test_a_long_video_is_predicted_without_running_it() -> None:
    config = bench_config("lingen", "4b", "engine=zero2", "engine.activation_checkpointing=true")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    once, twice = (probe(config, (136, 32, 56), batch=n, kernels=planned_forms(config, "cuda")) for n in (1, 2))
    assert once.parameters == 4_031_341_248
    assert 1.9 < twice.activations / once.activations < 2.0
    assert once.activations > 43 * 2 * 243_712 * 2048  # a bf16 token matrix a layer, at least
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_what_their_level_says() -> None:
    def of(world: int, level: int | None, **engine: Any) -> Memory:
        kind = {"kind": "torch"} if level is None else {"kind": "deepspeed", "zero_stage": level}
        return lay_out(EngineConfig(**({"dtype": "bf16"} | kind | engine)), Probe(8 * 10**9, 1000, 10), world)

    alone, sharded = of(1, 3), of(8, 3)
    assert sharded.optimizer * 8 == alone.optimizer == 12 * 8 * 10**9
    assert sharded.weights == 2 * 10**9 + 2 * GATHERED
    assert of(8, 2).gradients * 8 == 4 * 8 * 10**9
    assert of(8, 2).average * 8 == 4 * 8 * 10**9
    long = Probe(10, 1000, 10)  # activations outweigh all else
    assert lay_out(EngineConfig(kind="deepspeed", sequence_parallel=4), long, 8).activations == 250
    assert of(1, None).activations == 10 and of(1, None).gradients == (4 + 2) * 8 * 10**9  # bf16 ones, at the end
    assert of(1, 0).gradients == (2 + 4) * 8 * 10**9  # the step's fp32 sums beside them
    for level in (None, 0, 1, 2, 3):
        assert of(1, level).total == max(of(1, level).step, of(1, level).building)
        assert of(64, level).total <= of(1, level).total


DEEPSPEED = """
import json, sys, torch
sys.path.insert(0, "tests/unit/lingen")
from test_memory import CPU, allocated, bench_config, planned_forms, predict, without_average
from lingen.bench.workload import Subject
from lingen.dist import init
init("cpu")
for level in (0, 1, 2, 3):
    words = (f"engine=zero{level}", "engine.device=cpu", "engine.dtype=bf16", "text.encoders.minilm.length=16")
    config = bench_config("dit", "tiny", *words)
    memory = predict(config, (4, 16, 16), batch=1, world=1, kernels=planned_forms(config, "cpu"))
    subject, resident, _ = allocated(lambda: Subject(config, CPU, train=True))
    call, most = subject.call((4, 16, 16)), 0
    for _ in range(2):
        _, kept, step = allocated(call)
        most, resident = max(most, resident + step), resident + kept
    print(json.dumps([level, without_average(memory), most]))
    subject.engine.close()
"""


def test_deepspeed_is_predicted(python: Any) -> None:
    done = python("-c", DEEPSPEED)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [line[0] for line in lines] == [0, 1, 2, 3]
    for level, predicted, most in lines:
        assert predicted == pytest.approx(most, rel=0.15), level


def test_live_follows_tensors_to_their_end() -> None:
    known, cached = torch.zeros(100), torch.zeros(50)
    with Live("cpu", besides=[known]) as live:
        doubled = known * 2
        view = doubled[:10]
        assert live.bytes == 400
        del doubled
        assert live.bytes == 400  # the view holds it
        total = (view.sum() + cached.sum()).item()
        del view
        assert live.bytes == 200  # what was read without being known counts from there on
    assert total == 0 and live.peak >= 600
