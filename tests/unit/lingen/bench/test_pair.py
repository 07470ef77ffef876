"""FLOPs, latency, ablation, block and memory: what they report, on models of a few numbers."""

from __future__ import annotations

from functools import partialmethod
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.bench import ablation, block, device, flops, latency, memory
from lingen.bench.tables import gb, markdown
from lingen.bench.workload import FEWEST_FRAMES, Subject, bench_config, grid_of, ladder, largest_bucket
from lingen.compose import parse
from lingen.curriculum import TRAIN_FLOPS
from lingen.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [
        (34_816, (34, 32, 32)),
        (60_928, (34, 32, 56)),
        (243_712, (136, 32, 56)),
        (1024, (4, 16, 16)),
        (7, (7, 1, 1)),
        (1, (1, 1, 1)),
    ],
)
def test_a_grid_has_the_largest_frames_that_fit(tokens: int, grid: tuple[int, int, int]) -> None:
    assert grid_of(tokens) == grid
    assert prod(grid) == tokens and (grid[0] >= FEWEST_FRAMES or grid[1:] == (1, 1))
    assert grid_of(96, (4, 8)) == (3, 4, 8)
    with pytest.raises(ValueError, match=r"tokens=100 is not a multiple of frame=\[4, 8\], which has 32"):
        grid_of(100, (4, 8))


def test_the_ladder_has_every_published_stage() -> None:
    names = ["t2i_256", "t2v_256", "t2v_512_17s", "t2v_512_34s", "t2v_512_68s", "quality", "t2v_768_17s"]
    stages = {stage.name: stage for stage in ladder("tiny")}
    assert list(stages) == names
    assert str(largest_bucket(stages["t2v_512_34s"])) == "537x512x896"
    assert bench_config("dit", "4b").text.lengths == {"minilm": 512}


def test_flops_of_the_4b_pair() -> None:
    result = flops.run(flops.FlopWords())
    assert abs(result["params"]["lingen"] / result["params"]["dit"] - 1) < 0.01
    assert all(abs(count / 4e9 - 1) < 0.01 for count in result["params"].values())
    for length, published in flops.PUBLISHED.items():
        assert abs(result["forward_ratio"][length] / published - 1) < 0.15
    assert list(result["forward_ratio"]) == ["17s", "34s", "68s"]
    for row in (*result["stages"], *result["square"]):
        assert row["tokens"] == prod(row["grid"])
        assert row["train_flops"]["dit"] == TRAIN_FLOPS * row["forward_flops"]["dit"]
    assert [row["tokens"] for row in result["square"]] == [34_816, 69_632, 139_264]
    assert [row["ratio"] for row in result["square"]] < [row["ratio"] for row in result["stages"][2:5]]


def latency_rows(*words: str) -> list[dict[str, Any]]:
    few = ("size=tiny", "rounds=2", "blocks=1", "text_tokens=8", "device=cpu")
    return latency.run(parse(latency.LatencyWords, [*few, *words]))


def test_latency_has_a_row_for_each_model_and_length(tmp_path: Path) -> None:
    rows = latency_rows("tokens=[32,64,32]", f"plot={tmp_path}/cost.png")
    assert [(row["model"], row["tokens"]) for row in rows] == [
        ("lingen", 32), ("lingen", 64), ("dit", 32), ("dit", 64),
    ]  # fmt: skip
    for row in rows:
        assert row["mode"] == "forward" and row["dtype"] == "fp32" and row["device"] == "cpu" and row["samples"] == 2
        assert row["layers"] == 1 and row["layers_of_size"] == {"lingen": 5, "dit": 7}[row["model"]]
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["median_s"])
        assert row["mfu"] == pytest.approx(row["flops"] / row["median_s"] / row["peak_flops_per_s"], rel=1e-3)
    assert rows[1]["peak_bytes"] > rows[0]["peak_bytes"]
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_a_training_step_trains() -> None:
    (row,) = latency_rows("tokens=[32]", "mode=train", "models=[dit]", "dtype=bf16", "activation_checkpointing=true")
    (forward,) = latency_rows("tokens=[32]", "models=[dit]", "dtype=bf16", "guidance=false")
    assert row["samples"] == forward["samples"] == 1 and row["flops"] == TRAIN_FLOPS * forward["flops"]
    assert row["peak_bytes"] > 18 * sum(p.numel() for p in subject("size.depth.dit=1").model.parameters())
    trained = subject("size.depth.dit=1", train=True)
    before = [p.detach().clone() for p in trained.model.parameters()]
    assert all(p.any() for p in before)  # zeros would be multiplied faster than what a training has
    trained.call((2, 2, 2))()
    assert not any(torch.equal(a, b) for a, b in zip(trained.model.parameters(), before, strict=True))


def subject(*words: str, train: bool = False) -> Subject:
    return Subject(bench_config("dit", "tiny", "text.encoders.minilm.length=8", *words), CPU, train=train)


def test_compiled_blocks_share_the_weights_and_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="aot_eager"))  # sooner done
    here = subject("size.depth.dit=1")
    twin = here.compiled()
    assert twin is here.compiled() and twin is not here.model
    assert all(a is b for a, b in zip(twin.parameters(), here.model.parameters(), strict=True))
    plain, compiled = (here.call((2, 2, 2), compiled=choice)() for choice in (False, True))
    torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokens=[100]", "frame=[4,8]"], "tokens=100 is not a multiple"),
        (["tokens=[]"], "tokens"),
        (["kernels={conv: triton}"], "kernels.conv=triton cannot run here"),
        (["kernels={cony: triton}"], "cony is no kernel"),
        (["size=tin"], "size=tin does not exist in conf/size; did you mean 'tiny'"),
        (["models=[gan]"], "models"),
        (["plot=/proc/nowhere/x.png"], "plot=/proc/nowhere/x.png cannot be written"),
        (["tokens=[99999999999]", "blocks=1", "device=cpu"], r"tokens=99999999999 does not fit the memory of cpu"),
    ],
)
def test_wrong_words_are_named(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match=message):
        latency.run(parse(latency.LatencyWords, words))


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda: torch finds no GPU"):
        device.find_device("cuda")


def test_the_peak_is_listed_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "name_of", lambda _: "NVIDIA H100 80GB HBM3")
    assert device.peak_flops(CPU, torch.bfloat16) == (989e12, "data sheet")
    monkeypatch.setattr(device, "name_of", lambda _: "NVIDIA H100 PCIe")
    assert device.peak_flops(CPU, torch.bfloat16) == (756e12, "data sheet")
    monkeypatch.setattr(device, "name_of", lambda _: "some other")
    monkeypatch.setitem(device.MATMUL_SIDE, "cpu", 64)
    peak, source = device.peak_flops(CPU, torch.float32)
    assert peak > 0 and source == "matmul of 64, measured"


def test_the_meter_counts_what_stays_and_what_was() -> None:
    kept, stays, most = device.CpuMeter().run(lambda: torch.zeros(1000) + torch.ones(1000))
    assert kept.sum() == 1000 and stays == 4000 and most == 12_000


def test_a_gpus_meter_and_clock_read_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, _: Any) -> float:
            return 250.0  # milliseconds

    done: list[str] = []
    allocated = iter((100, 130))  # before, after
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 180)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("all"))
    gpu = torch.device("cuda")
    assert device.meter_of(gpu).run(lambda: done.append("call") or "x") == ("x", 30, 80)  # type: ignore[func-returns-value]
    assert device.clock_of(gpu)(lambda: done.append("call")) == 0.25
    assert done == ["reset", "call", "all", "record", "call", "record", "wait"]


def test_ablation_has_the_papers_rows_in_its_order() -> None:
    words = ["tokens=32", "blocks=1", "text_tokens=8", "rounds=1", "device=cpu"]
    result = ablation.run(parse(ablation.AblationWords, words))
    rows = {row["row"]: row for row in result["rows"]}
    assert [row["published_s"] for row in result["rows"]] == [102, 94, 99, 98, 65, 144, 127, None]
    assert rows["LinGen"]["relative"] == 1.0 and result["dtype"] == "fp32"
    for name in ("without TESA", "without MA-branch"):
        assert rows[name]["params"] < rows["LinGen"]["params"] and rows[name]["flops"] < rows["LinGen"]["flops"]
    assert rows["without review tokens"]["flops"] < rows["LinGen"]["flops"] == rows["zigzag scan"]["flops"]
    assert rows["Mamba1"]["params"] != rows["LinGen"]["params"] == rows["Hilbert scan"]["params"]
    assert "without RMS" in ablation.table(result["rows"])


def test_block_reports_its_parts() -> None:
    words = ["tokens=[32,64]", "width=32", "head_dim=16", "d_state=8", "text_tokens=4", "rounds=1", "parts=true"]
    result = block.run(parse(block.BlockWords, words))
    assert list(result["us_per_token"]) == ["block", "MA-branch", "TE-branch", "cross-attention", "MLP"]
    assert all(len(costs) == 2 and min(costs) > 0 for costs in result["us_per_token"].values())
    assert all(growth > 0 for growth in result["growth"].values())


def test_memory_of_every_stage_and_level() -> None:
    result = memory.run(parse(memory.MemoryWords, ["models=[dit]", "world=[1,8]", "sequence_parallel=[8]"]))
    assert len(result["rows"]) == 7 * 4  # one rank cannot be eight
    rows = {(row["stage"], row["zero_stage"]): row for row in result["rows"]}
    assert rows["t2v_512_68s", 3]["total"] < rows["t2v_512_68s", 0]["total"]
    assert rows["t2v_512_68s", 2]["activations"] > rows["t2v_512_34s", 2]["activations"]
    assert [rows["t2v_512_34s", level]["fits"] for level in (0, 3)] == [False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["world=[3]", "sequence_parallel=[2]"], r"world=\[3\] has no multiple of sequence_parallel=\[2\]"),
        (["world=[3]", "sequence_parallel=[3]"], "engine.sequence_parallel=3 must divide the 32 heads"),
        (["measure=true", "tokens=[100]", "frame=[3,3]"], "tokens=100 is not a multiple"),
    ],
)
def test_memory_that_nothing_would_use_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        memory.run(parse(memory.MemoryWords, words))


def test_memory_is_measured_beside_the_prediction() -> None:
    words = ["measure=true", "size=tiny", "blocks=1", "tokens=[64]", "device=cpu", "dtype=fp32"]
    for row in memory.run(parse(memory.MemoryWords, words))["rows"]:
        assert row["ratio"] == pytest.approx(1.0, abs=0.15) and row["measured"] > 16 * 200_000


def test_tables_are_aligned() -> None:
    assert markdown(("name", "n"), [("a", 10), ("bcdef", 2)]).splitlines() == [
        "| name  |  n |",
        "| ----- | -: |",
        "| a     | 10 |",
        "| bcdef |  2 |",
    ]
    assert (gb(1.25e9), gb(3.2e6)) == ("1.2", "0.0032")
