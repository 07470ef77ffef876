"""mamba-ssm's own Triton kernels, in Triton's interpreter and through our seam, against ``ssd_ref``.

The interpreter is slow: a program at a time, in numpy. So the sequences are short, two chunks or so, and ragged.

Shapes: B batch, L tokens, H heads, P channels a head, G groups, N state channels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lingen.kernels import forms
from lingen.kernels.mamba_package import bare_mamba_package
from lingen.kernels.ssd import ssd, ssd_ref
from lingen.kernels.ssd_mamba import largest_offsets, piece, scan_in_pieces

CPU = torch.device("cpu")
Inputs = dict[str, Any]  # tensors by argument
Launches = dict[str, int]  # by kernel: the largest offset of any tensor that it was given


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """mamba-ssm's form on a CPU: what it asks of CUDA besides Triton is answered here; yields what it launches."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is for Linux")
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=1))
    launches: Launches = defaultdict(int)
    run = interpreter.GridExecutor.__call__

    def recorded(self: Any, *args: Any, **options: Any) -> None:
        tensors = [t for t in (*args, *options.values()) if isinstance(t, Tensor)]
        reach = max(sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)
        launches[self.fn.__name__] = max(launches[self.fn.__name__], reach)
        run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    forms.ask({"ssd": "mamba-ssm"}, CPU)
    yield launches
    forms.ask({}, CPU)


def make(length: int, *, batch: int = 1, heads: int = 4, skip: tuple[int, ...] = (4,)) -> Inputs:
    """P = N = 16 and G = 2; x, B and C are views of one tensor, as behind the MA-branch's convolution."""
    generator = torch.Generator().manual_seed(length)
    xbc = torch.randn(batch, length, heads * 16 + 4 * 16, generator=generator)
    x, groups = xbc.split((heads * 16, 4 * 16), dim=-1)
    B, C = groups.unflatten(-1, (2, 2, 16)).unbind(3)
    return {
        "x": x.unflatten(-1, (heads, 16)),
        "dt": F.softplus(torch.randn(batch, length, heads, generator=generator) - 1),
        "A": -torch.exp(torch.randn(heads, generator=generator)),
        "B": B,
        "C": C,
        "D": torch.randn(skip, generator=generator),
        "initial_states": torch.randn(batch, heads, 16, 16, generator=generator),
    }


def gradients(
    scan: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, **options: object
) -> tuple[Inputs, Tensor, Tensor]:
    """The gradients of a fixed random functional of y and of the final states; y; the states."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y, states = scan(**leaves, **options)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y, states)]
    values = torch.autograd.grad((y, states), list(leaves.values()), weights)
    return dict(zip(leaves, values, strict=True)), y.detach(), states.detach()


def assert_equal(got: tuple[Inputs, Tensor, Tensor], want: tuple[Inputs, Tensor, Tensor]) -> None:
    named = [("y", got[1], want[1]), ("states", got[2], want[2])]
    for name, value, expected in (*named, *((n, got[0][n], want[0][n]) for n in want[0])):
        error = (value - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"{name} is off by {error:.1e} of its largest value"


def without(inputs: Inputs, *names: str) -> Inputs:
    return {name: t for name, t in inputs.items() if name not in names}


@pytest.mark.parametrize(
    ("inputs", "processors"),
    [
        (make(20), 1),
        (without(make(17, skip=(4, 16)), "initial_states"), 1000),
        (without(make(3, batch=2), "D"), 1),
    ],
    ids=["two chunks", "one token past a chunk, a skip per channel, heads apart", "less than a chunk, two samples"],
)
def test_equals_ssd_ref_forward_and_backward(
    inputs: Inputs, processors: int, interpreted: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    got = gradients(ssd, inputs, chunk_size=16, return_final_states=True)
    assert_equal(got, gradients(ssd_ref, inputs, chunk_size=16, return_final_states=True))
    # What the pieces are worked out from covers every tensor of every kernel.
    x, dt, B, C = (inputs[name] for name in ("x", "dt", "B", "C"))
    said = largest_offsets(x, dt, B, C, 16, *x.shape[:2])
    assert said.keys() == interpreted.keys()
    assert all(interpreted[kernel] <= said[kernel] for kernel in said)


def test_pieces_carry_the_state(interpreted: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(36, batch=2, heads=2, skip=(2,))
    x, dt, B, C = (inputs[name] for name in ("x", "dt", "B", "C"))
    limit = max(largest_offsets(x, dt, B, C, 16, 1, 32).values())
    assert piece(x, dt, B, C, 16, limit) == (1, 32)
    monkeypatch.setattr("lingen.kernels.ssd_mamba.MAX_OFFSET", limit)
    got = gradients(ssd, inputs, chunk_size=16, return_final_states=True)
    assert max(interpreted.values()) <= limit
    assert_equal(got, gradients(ssd_ref, inputs, chunk_size=16, return_final_states=True))


@pytest.mark.usefixtures("interpreted")
def test_nan_in_gives_nan_out() -> None:
    inputs = without(make(20), "initial_states")
    inputs["x"] = inputs["x"].clone()
    inputs["x"][0, 17, 1, 2] = torch.nan
    y = ssd(**inputs, chunk_size=16)
    assert y[0, 17:, 1, 2].isnan().all() and y[0, :16].isfinite().all()


def test_the_package_is_imported_without_its_init(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    with bare_mamba_package():
        importlib.import_module("mamba_ssm.ops.triton.softplus")
    assert "mamba_ssm.ops.triton.softplus" in sys.modules and "mamba_ssm.modules" not in sys.modules
    assert "mamba_ssm" not in sys.modules


@pytest.mark.usefixtures("interpreted")
def test_a_compiled_model_is_interrupted_once() -> None:
    """Not by the package's import as well, which a compiler would try to follow at every layer."""
    inputs = make(20)
    x = inputs.pop("x")
    explained = torch._dynamo.explain(lambda: 2 * ssd(x + 1, **inputs, chunk_size=16))()
    assert len(explained.break_reasons) == 1


@pytest.mark.usefixtures("interpreted")
def test_fp64_is_refused_where_mamba_ssm_was_asked_for() -> None:
    inputs = {name: t.double() for name, t in make(20).items()}
    with pytest.raises(ValueError, match=r"kernels\.ssd=mamba-ssm cannot run here: it does not compute in fp64"):
        ssd(**inputs, chunk_size=16)


def test_fp64_takes_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    forms._choose.cache_clear()
    for kernel in ("ssd", "selective_scan"):
        forms_taken = [forms.chosen(kernel, torch.device("cuda"), dtype) for dtype in (torch.bfloat16, torch.float64)]
        assert forms_taken == ["mamba-ssm", "torch"]
    forms._choose.cache_clear()


def test_the_gradient_of_a_view_too_wide_is_copied() -> None:
    """Against a stand-in for the kernel that looks at what its backward is given."""
    inputs, reached = make(8, batch=2), []

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            reached.append(sum((n - 1) * s for n, s in zip(dy.shape, dy.stride(), strict=True)))
            return dy

    def kernel(x: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
        return Kernel.apply(x), x.new_zeros(x.shape[0], 4, 16, 16)

    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    x.requires_grad_()
    wide = torch.ones(2, 8, 4, 160)[..., :16]
    limit = max(largest_offsets(x, dt, B, C, 16, 2, 8).values())
    assert limit < sum((n - 1) * s for n, s in zip(wide.shape, wide.stride(), strict=True))
    y, _ = scan_in_pieces(kernel, x, dt, A, B, C, None, None, 16, limit)
    y.backward(wide)
    assert reached == [2 * 8 * 4 * 16 - 1]
