"""Kernels in Triton's interpreter; and what that does not see: whether they compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.kernels import forms

CPU = torch.device("cpu")
PRETEND = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Pretended:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_device_interface = lambda self: torch.cuda

launch = jit.JITFunction.run

def compile_only(self, *arguments, grid, warmup, **options):
    launch(self, *arguments, grid=grid, warmup=True, **options)
    print("compiled", self.__name__)

driver.set_active(Pretended())
jit.JITFunction.run = compile_only
"""


@pytest.fixture
def compiled(python: Callable[..., Any], tmp_path: Path) -> Callable[[str], list[str]]:
    """Run code whose Triton launches are compiled for an H100, down to its machine code, and not run: what they leave
    in their results is arbitrary. Returns the names of the kernels, in the order of their launches.
    """
    pytest.importorskip("triton", reason="Triton is for Linux")

    def run(code: str) -> list[str]:
        done = python("-c", PRETEND + code, env={"TRITON_CACHE_DIR": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("compiled ")]

    return run


@pytest.fixture
def take_triton() -> Iterator[Callable[[str], None]]:
    """Let a seam take Triton, until the test ends; what nobody writes is NaN meanwhile."""
    pytest.importorskip("triton", reason="Triton is for Linux")

    def take(kernel: str) -> None:
        forms.ask({kernel: "triton"}, CPU)
        torch.use_deterministic_algorithms(True)

    yield take
    torch.use_deterministic_algorithms(False)
    forms.ask({}, CPU)
