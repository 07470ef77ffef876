"""The choice of a kernel's form: the fastest that there is, what was asked for, or an error."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lingen.kernels import forms
from lingen.kernels.norm import modulate
from lingen.model_config import KernelsConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    forms.ask({}, CPU)


def installed(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if these packages, and no other of those that a form needs, were there; and no interpreter."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forms._choose.cache_clear()


def test_the_schema_offers_each_kernel_and_form() -> None:
    offered = {
        name: list(field.annotation.__args__)  # type: ignore[union-attr]
        for name, field in KernelsConfig.model_fields.items()
    }
    assert offered == {kernel: ["auto", *names] for kernel, names in forms.FORMS.items()}


def test_the_page_on_the_models_names_each_kernel_and_form() -> None:
    page = (Path(__file__).parents[4] / "docs" / "models.md").read_text().splitlines()
    rows = {line.split("`")[1]: line for line in page if line.startswith("| `kernels.")}
    assert list(rows) == [f"kernels.{kernel}" for kernel in forms.FORMS]
    for kernel, names in forms.FORMS.items():
        assert re.findall(r"`([a-z-]+)`", rows[f"kernels.{kernel}"]) == list(names)


def test_a_cpu_takes_torch() -> None:
    assert {kernel: forms.chosen(kernel, CPU) for kernel in forms.FORMS} == {
        kernel: "sdpa" if kernel == "attention" else "torch" for kernel in forms.FORMS
    }
    assert "ssd torch" in forms.describe(CPU) and "attention sdpa" in forms.describe(CPU)


def test_a_gpu_takes_the_fastest_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "triton", "mamba_ssm")
    assert forms.chosen("conv", GPU) == "triton" and forms.chosen("ssd", GPU) == "mamba-ssm"
    installed(monkeypatch)
    assert forms.chosen("conv", GPU) == "torch" and forms.chosen("ssd", GPU) == "torch"


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "triton")
    forms.ask({"conv": "torch", "norm": "auto"}, GPU)
    assert forms.chosen("conv", GPU) == "torch" and forms.chosen("norm", GPU) == "triton"
    forms.ask({}, GPU)
    assert forms.chosen("conv", GPU) == "triton"


@pytest.mark.parametrize(
    ("kernel", "form", "device", "words"),
    [
        ("conv", "triton", GPU, "kernels.conv=triton cannot run here: the package triton is not installed"),
        ("window", "cuda", GPU, "kernels.window=cuda is no form of it; there are auto, triton, torch"),
        ("convolution", "torch", GPU, "convolution is no kernel"),
    ],
)
def test_what_is_missing_is_an_error_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, kernel: str, form: str, device: torch.device, words: str
) -> None:
    installed(monkeypatch)
    forms.ask({"norm": "torch"}, device)
    with pytest.raises(ValueError, match=words):
        forms.ask({kernel: form}, device)
    assert forms.chosen("norm", device) == "torch"


def test_a_gpu_form_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "triton")
    with pytest.raises(ValueError, match=r"it needs a GPU, and the device is cpu; set kernels\.conv=auto"):
        forms.ask({"conv": "triton"}, CPU)


@pytest.mark.filterwarnings("error")
def test_to_a_compiler_the_choice_is_a_constant() -> None:
    x, shift = torch.randn(2, 5, 8), torch.randn(2, 1, 8)
    compiled = torch.compile(functools.partial(modulate, eps=1e-6), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, shift, shift), modulate(x, shift, shift, eps=1e-6))


def test_a_run_that_asks_for_a_missing_form_ends_before_it_begins(world, python, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = python("train.py", *world.words, "name=x", f"runs_dir={tmp_path}", "kernels.window=triton")
    assert done.returncode == 2 and "kernels.window=triton cannot run here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
