"""scripts/gpu_check.py and its parts, small, on this machine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lingen.bench import gpu_parts, gpu_report, numerics
from lingen.bench.gpu_parts import PARTS, Part
from lingen.kernels import forms

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_form_of_every_kernel_is_checked() -> None:
    rows = list(numerics.run(CPU, torch.float32, grid=(2, 3, 4), heads=2, channels=16))
    assert all(row["ok"] for row in rows if row["form"] != "mamba-ssm"), rows
    checked = {(row["kernel"], row["form"]) for row in rows}
    assert {kernel for kernel, _ in checked} == set(forms.FORMS)
    assert {("conv", "triton"), ("norm", "triton"), ("window", "triton"), ("attention", "sdpa")} <= checked
    gradients = next(row for row in rows if row["check"] == "ssd" and row["form"] == "torch")["errors"]
    assert {f"gradient of {name}" for name in ("x", "dt", "A", "B", "C", "D")} < set(gradients)


def test_a_kernel_that_is_wrong_or_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = next(check for check in numerics.checks((2, 3, 4), 2, 16) if check.name == "modulate")

    def rows(seam: Any) -> list[dict[str, Any]]:
        wrong = numerics.Check("norm", "wrong", seam, right.ref, right.inputs, fixed=right.fixed)
        monkeypatch.setattr(numerics, "checks", lambda *_: [wrong])
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        return list(numerics.run(CPU, torch.float32, grid=(2, 3, 4), heads=2, channels=16))

    def broken(**_: Any) -> Any:
        raise RuntimeError("does not compile")

    (off,) = rows(lambda **given: 1.01 * right.seam(**given))
    assert not off["ok"] and off["errors"]["result 0"] == pytest.approx(0.01, rel=0.01)
    (nan,) = rows(lambda **given: right.seam(**given) * float("nan"))
    assert not nan["ok"] and "not finite" in nan["error"]
    (failed,) = rows(broken)
    assert not failed["ok"] and failed["error"] == "RuntimeError: does not compile"


MEASURED = ("LinGen, one forward", "profile of a LinGen block", "memory, and training steps", "ablation, Mamba1")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    scale = gpu_parts.small()
    parts: list[dict[str, Any]] = [
        {"name": part.name, "status": "done", "seconds": 1.0, "note": "", "findings": list(part.run(scale))}
        for part in PARTS
        if part.name in MEASURED
    ]
    failed = {"case": "lingen", "error": "OutOfMemoryError: CUDA\nout of memory"}
    parts.append({"name": "x", "status": "failed", "seconds": 0.0, "note": "1 findings", "findings": [failed]})
    return {"date": "d", "command": "c", "environment": gpu_parts.environment(scale), "parts": parts}


def test_the_parts_find_what_they_are_for(result: dict[str, Any]) -> None:
    found = {part["name"]: part["findings"] for part in result["parts"]}
    assert tuple(found) == (*MEASURED, "x")
    assert not any("error" in finding for name in MEASURED for finding in found[name])
    assert [row["tokens"] for row in found["LinGen, one forward"]] == [84, 168, 336]
    assert {row["samples"] for row in found["LinGen, one forward"]} == {1}
    assert [row["row"] for row in found["ablation, Mamba1"]] == ["LinGen", "Mamba1"]
    steps = [row for row in found["memory, and training steps"] if "predicted" in row]
    assert [row["activation_checkpointing"] for row in steps] == [False, True] * 2
    assert all(row["ratio"] == pytest.approx(1.0, abs=0.15) for row in steps)
    profiled = found["profile of a LinGen block"]
    assert {row["pass"] for row in profiled} == {"forward", "both"} and 0 < sum(row["share"] for row in profiled) <= 2


def test_the_page_shows_every_kind_of_finding(result: dict[str, Any]) -> None:
    page = gpu_report.render(json.loads(json.dumps(result)))
    for title in ("Latency", "Ablation", "Memory of a training step", "One LinGen block", "What failed"):
        assert f"## {title}\n" in page
    assert "- lingen: OutOfMemoryError: CUDA out of memory" in page and " 3x4x7 |" in page
    assert "## Numerics" not in page  # of which there are none here


def test_the_published_grids_are_those_of_the_stages() -> None:
    scale = gpu_parts.full()
    assert scale.size == "4b" and scale.text_tokens == 512 and scale.dtype == "bf16"
    assert scale.grids["17s 512x896"] == (34, 32, 56) and scale.grids["68s 512x512"] == (136, 32, 32)
    assert list(scale.of("34s")) == ["34s 512x896", "34s 512x512"]


def test_a_part_is_a_process(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    numerics_part = next(part for part in PARTS if part.name == "numerics")
    done = script.run_part(numerics_part, time.monotonic() + 100, "small")
    assert done["status"] == "done", done
    assert done["environment"]["torch"] == torch.__version__ and len(done["findings"]) > 10


def test_parts_that_fail_take_too_long_or_find_no_time_are_said(script: ModuleType) -> None:
    soon = time.monotonic() + 100
    unknown, slow = (Part(name, limit, lambda _: iter(())) for name, limit in (("nothing", 60), ("numerics", 0)))
    failed = script.run_part(unknown, soon, "small")
    assert failed["status"] == "failed" and "StopIteration" in failed["note"]
    assert script.run_part(slow, soon, "small")["status"] == "cut off"
    assert script.run_part(unknown, time.monotonic() + 1, "small")["status"] == "skipped"


def test_findings_that_were_written_whole_are_kept(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "f").write_text('{"a": 1}\n{"b": 2}\n{"c"')
    assert script.read_lines(tmp_path / "f") == [{"a": 1}, {"b": 2}]
    assert script.read_lines(tmp_path / "none") == []


BLOCKED = """
import sys
for name in {blocked}:
    sys.modules[name] = None
sys.argv = ["gpu_check.py", *{words}]
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""
NOT_THERE = [
    "deepspeed",
    "transformers",
    "webdataset",
    "av",
    "decord",
    "einops",
    "wandb",
    "safetensors",
    "jinja2",
    "PIL",
]


def run_without(blocked: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(blocked=blocked, words=list(words), script=str(SCRIPT))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_it_begins_without_what_training_needs() -> None:
    done = run_without(NOT_THERE, "minutes=0.001", "small=true", "out=/proc/nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: out=/proc/nowhere cannot be written"), done.stderr


def test_it_ends_in_one_line_without_a_gpu_or_a_package() -> None:
    if not torch.cuda.is_available():
        done = run_without([])
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "torch finds no GPU here" in done.stderr
    done = run_without(["hydra", "psutil"])
    assert done.returncode == 2 and "lacks hydra-core, psutil; take another with CHECK_PYTHON" in done.stderr
