"""What the benchmarks compute from their timings; the timings themselves are not tested."""

from __future__ import annotations

import importlib.util
import time

import pytest

from lingen.bench.imports import ImportWords
from lingen.bench.imports import run as run_imports
from lingen.bench.scan import ScanWords, crossover
from lingen.bench.scan import run as run_scan
from lingen.bench.timing import Case, interleave, median, ratio
from lingen.compose import parse
from lingen.errors import UserError


def test_interleave_takes_turns_and_warms_up_first() -> None:
    calls: list[str] = []
    seconds = interleave({"a": Case(lambda: calls.append("a"), 2), "b": Case(lambda: calls.append("b"))}, rounds=2)
    assert calls == ["a", "b", *["a", "a", "b"] * 2]
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_interleave_measures_cpu_time_of_one_call() -> None:
    def spin() -> None:
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass

    seconds = interleave({"spin": Case(spin, 3), "sleep": Case(lambda: time.sleep(0.02))}, rounds=3)
    assert 0.01 <= median(seconds, "spin") < 0.02
    assert median(seconds, "sleep") < 0.005


def test_ratio_pairs_the_rounds() -> None:
    seconds = {"a": [2.0, 20.0, 3.0], "b": [1.0, 10.0, 1.0]}
    assert ratio(seconds, "a", "b") == 2.0
    assert median(seconds, "a") == 3.0


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({1024: 0.5, 2048: 1.1, 4096: 2.0}, 2048),
        ({1024: 1.2, 2048: 0.9, 4096: 2.0}, 4096),
        ({1024: 1.2, 2048: 1.5}, 1024),
        ({1024: 2.0, 2048: 0.9}, None),
    ],
)
def test_crossover_holds_for_every_longer_length(speedups: dict[int, float], expected: int | None) -> None:
    assert crossover(speedups) == expected


def test_scan_reports_every_length_once() -> None:
    small = {"width": 32, "head_dim": 16, "d_state": 4, "rounds": 1}
    result = run_scan(ScanWords(tokens=[128, 64], attention_tokens=[64], rival_tokens=[128, 64], **small))
    assert result["tokens"] == [64, 128] and result["attention_tokens"] == [64]
    for kind, count in {"ssd_fwd": 2, "ssd_fwdbwd": 2, "sdpa_fwd": 1, "sdpa_fwdbwd": 1}.items():
        costs = result[f"{kind}_us_per_token"]
        assert len(costs) == count and min(costs) > 0
    assert (
        result["ratio_fwd_64k_4k"] is None and result["ratio_fwdbwd_64k_4k"] is None
    )  # lengths that were not asked for
    assert result["crossover_tokens"] in (64, None)
    rivals = ["transformers", *(["mamba_ssm"] if importlib.util.find_spec("mamba_ssm") else [])]
    for rival in rivals:
        assert len(result[f"{rival}_over_ssd_fwd"]) == len(result[f"{rival}_over_ssd_fwdbwd"]) == 2
        assert result[f"{rival}_difference"] < 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["width=100"], "width=100 must be a multiple of head_dim=64"),
        (["attention_tokens=[512]"], r"attention_tokens=\[512\] must be among tokens="),
        (["rival_tokens=[100]"], r"rival_tokens=\[100\] must be multiples of chunk_size=64"),
        (["tokens=[]"], "tokens"),
        (["round=3"], "unknown key 'round'; did you mean 'rounds'?"),
        (["rounds=0"], "rounds=0"),
    ],
)
def test_bad_words_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(ScanWords, words)


def test_import_times_a_module_and_names_one_that_is_not_there() -> None:
    result = run_imports(ImportWords(modules=["json"], rounds=1))
    assert 0 <= result["seconds"]["json"] < 5
    with pytest.raises(UserError, match=r"modules=lingen\.nowhere cannot be imported: ModuleNotFoundError"):
        run_imports(ImportWords(modules=["lingen.nowhere"], rounds=1))
