"""The norms' seam: ``_ref`` against formulas written out in fp64, and Triton, in its interpreter, against ``_ref``.

Shapes: B batch, N tokens, R reviews, M = R + N, h heads of P channels, E = h*P, d gates, D d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lingen.kernels import forms, norm
from lingen.kernels.index import Grid, ScanIndex, gather_rows

CPU = torch.device("cpu")
EPS = 1e-6
BATCH = 2
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0))
Tensors = dict[str, Tensor]


@pytest.fixture
def triton_form(take_triton: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam takes Triton; its backwards take several rows a program."""
    take_triton("norm")
    from lingen.kernels import norm_launch

    monkeypatch.setattr(norm_launch, "PROGRAMS", 5)


@dataclass(frozen=True)
class Case:
    """One way to call one kernel: what it is given, and how."""

    kernel: str
    tensors: Tensors  # fp64
    call: Callable[[Callable[..., Any], Tensors], Any]

    def run(self, form: str, tensors: Tensors) -> tuple[Tensor, ...]:
        out = self.call(getattr(norm, self.kernel + form), tensors)
        return out if isinstance(out, tuple) else (out,)

    def cast(self, dtype: torch.dtype) -> Tensors:
        return {name: t.to(dtype) for name, t in self.tensors.items()}

    def gradients(self, form: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensors]:
        """The outputs, and the gradients of a fixed random functional of them."""
        leaves = {name: t.detach().requires_grad_() for name, t in self.cast(dtype).items()}
        outputs = self.run(form, leaves)
        loss = sum((out * normal(*out.shape, seed=i).to(dtype)).sum() for i, out in enumerate(outputs))
        return outputs, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def index_of(source: Tensor, reviews: int) -> ScanIndex:
    return ScanIndex(source.int(), source.argsort().int(), reviews)


def scan_index(grid: Grid, review_grid: Grid | None, axes: tuple[int, ...]) -> ScanIndex:
    """A layer's order: the grid's axes from the slowest to the fastest."""
    parts, rows = [], 0
    for box in (review_grid, grid):
        if box is not None:
            count = math.prod(box)
            parts.append(rows + torch.arange(count).view(box).permute(axes).flatten())
            rows += count
    return index_of(torch.cat(parts), rows - math.prod(grid))


def gated(index: ScanIndex, d: int, heads: int, channels: int) -> Case:
    """z is a slice of a wider projection."""
    width = d * heads * channels
    tensors = {
        "y": normal(BATCH, index.reviews + index.tokens, 2 * heads, channels, seed=1),
        "projection": normal(BATCH, index.tokens, width + 5, seed=2),
        "weight": normal(width, seed=3),
    }
    return Case("gated_norm", tensors, lambda f, t: f(t["y"], t["projection"][..., 2:-3], t["weight"], index, eps=EPS))


def unscanned(kernel: str, index: ScanIndex, heads: int, channels: int) -> Case:
    """y is a slice of the batch and of the positions of a wider tensor."""
    length = index.reviews + index.tokens
    tensors = {"y": normal(2 * BATCH, length + 3, 2 * heads, channels, seed=4)}
    return Case(kernel, tensors, lambda f, t: f(t["y"][::2, 1 : 1 + length], index))


def modulated(tokens: int, width: int) -> Case:
    """Shift and scale are two of a block's six; x is a slice of a wider tensor."""
    tensors = {"x": 3 * normal(BATCH, tokens, width + 3, seed=5) + 1, "six": normal(BATCH, 6, width, seed=6)}
    return Case("modulate", tensors, lambda f, t: f(t["x"][..., :width], t["six"][:, 1:2], t["six"][:, 4:5], eps=EPS))


def rotation(tokens: int, channels: int, dtype: torch.dtype) -> norm.Rotation:
    cosines, sines = (w(normal(tokens, 1, 1, channels // 2, seed=7)).to(dtype) for w in (torch.cos, torch.sin))
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


def rotated(tokens: int, heads: int, channels: int) -> Case:
    """qkv is a slice of the batch; the queries are used as attention uses them, heads before tokens."""
    tensors = {
        "qkv": normal(2 * BATCH, tokens, 3, heads, channels, seed=8),
        "scale": normal(2, 1, channels, seed=9),
    }

    def call(f: Callable[..., Any], t: Tensors) -> tuple[Tensor, ...]:
        q, k, v = f(t["qkv"][::2], t["scale"], rotation(tokens, channels, t["qkv"].dtype), eps=EPS)
        return q.transpose(1, 2).contiguous(), k, v

    return Case("norm_rotate", tensors, call)


INDICES = {
    "row-major": scan_index((2, 3, 4), (1, 2, 2), ORDERS[0]),
    "column-major, no reviews": scan_index((3, 2, 3), None, ORDERS[1]),
    "time first, one frame": scan_index((1, 3, 5), (1, 2, 3), ORDERS[2]),
    "time first, odd": scan_index((3, 3, 3), (2, 1, 2), ORDERS[3]),
    "any": index_of(torch.cat((torch.tensor([2, 0, 1]), 3 + normal(19, seed=10).argsort())), 3),
    "one token": index_of(torch.arange(1), 0),
}
CASES = {
    **{f"gated d={d} {name}": gated(index, d, 3, 6) for d in (1, 2) for name, index in INDICES.items()},
    "gated d=1 a power of two": gated(INDICES["any"], 1, 2, 16),
    **{
        f"{kernel} {name}": unscanned(f"{kernel}_directions", INDICES[name], 3, 6)
        for kernel in ("merge", "split")
        for name in ("time first, odd", "column-major, no reviews")
    },
    "modulate": modulated(17, 21),
    "modulate a power of two": modulated(12, 32),
    "modulate one token": modulated(1, 5),
    "rotate": rotated(17, 3, 12),
    "rotate a power of two": rotated(12, 2, 16),
    "rotate one token": rotated(1, 1, 2),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
KERNELS = pytest.mark.parametrize(
    "case",
    [CASES["gated d=1 any"], CASES["gated d=2 any"], CASES["merge time first, odd"], CASES["split time first, odd"],
     CASES["modulate"], CASES["rotate"]],
    ids=lambda case: case.kernel,
)  # fmt: skip


# ------------------------------------------------------------------------------------ formulas


def natural(y: Tensor, index: ScanIndex) -> tuple[Tensor, Tensor]:
    """Both directions, position by position, as ``ScanIndex`` says what each reads: (B, N, h, P) each."""
    reviews, length, heads = index.reviews, y.shape[1], y.shape[2] // 2
    forward, backward = (y.new_zeros(y.shape[0], index.tokens, heads, y.shape[3]) for _ in range(2))
    for m in range(reviews, length):
        forward[:, index.source[m] - reviews] = y[:, m, :heads]
        backward[:, index.source[length - 1 - (m - reviews)] - reviews] = y[:, m, heads:]
    return forward, backward


def gated_norm_formula(y: Tensor, z: Tensor, weight: Tensor, index: ScanIndex, *, eps: float) -> Tensor:
    forward, backward = (direction.flatten(2) for direction in natural(y, index))
    gate = z / (1 + torch.exp(-z))
    values = [forward + backward] if z.shape[-1] == forward.shape[-1] else [forward, backward]
    gated = [value * g for value, g in zip(values, gate.chunk(len(values), dim=-1), strict=True)]
    return torch.cat([g / torch.sqrt((g**2).mean(-1, keepdim=True) + eps) for g in gated], dim=-1) * weight


def merge_directions_formula(y: Tensor, index: ScanIndex) -> Tensor:
    return sum(natural(y, index), torch.zeros(()))


def split_directions_formula(y: Tensor, index: ScanIndex) -> Tensor:
    return torch.stack(natural(y, index), dim=2)


def modulate_formula(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * (1 + scale) + shift


def norm_rotate_formula(qkv: Tensor, scale: Tensor, table: norm.Rotation, *, eps: float) -> tuple[Tensor, ...]:
    """A channel pair is a complex number, and turns by multiplication."""
    pairs = qkv.shape[-1] // 2
    turn = torch.complex(table[0][..., :pairs], table[1][..., pairs:])[:, 0]  # (N, 1, P/2)
    outputs = []
    for x, s in zip(qkv.unbind(2)[:2], scale, strict=True):
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * s
        turned = torch.complex(x[..., :pairs], x[..., pairs:]) * turn
        outputs.append(torch.cat((turned.real, turned.imag), dim=-1))
    return *outputs, qkv[:, :, 2]


@EVERY
def test_ref_is_the_formula(case: Case) -> None:
    expected = case.call(globals()[f"{case.kernel}_formula"], case.tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for out, formula in zip(case.run("_ref", case.tensors), expected, strict=True):
        torch.testing.assert_close(out, formula, rtol=1e-12, atol=1e-12)


@KERNELS
def test_refs_gradients(case: Case) -> None:
    leaves = [t.clone().requires_grad_() for t in case.tensors.values()]
    assert torch.autograd.gradcheck(
        lambda *values: case.run("_ref", dict(zip(case.tensors, values, strict=True))), leaves, fast_mode=True
    )


def test_gather_rows_gathers_back() -> None:
    order = normal(9, seed=11).argsort()
    x = normal(2, 9, 3, seed=12).requires_grad_()
    assert torch.equal(gather_rows(x, order.int(), order.argsort().int()), x[:, order])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, order, order.argsort()), x)


# ------------------------------------------------------------------------------------ Triton


def largest_difference(out: Tensor, expected: Tensor) -> float:
    """Relative to the largest number that there should be; NaN where either is NaN."""
    assert out.shape == expected.shape and out.dtype == expected.dtype
    return float((out - expected).detach().abs().max() / expected.detach().abs().max())


@EVERY
def test_triton_is_ref(case: Case, triton_form: None) -> None:
    outputs, gradients = case.gradients("", torch.float32)
    expected, expected_gradients = case.gradients("_ref", torch.float32)
    for out, truth in zip(outputs, expected, strict=True):
        assert largest_difference(out, truth) <= 1e-5
    for name, truth in expected_gradients.items():
        assert largest_difference(gradients[name], truth) <= 1e-5, name


@KERNELS
def test_triton_computes_fp64_in_fp64(case: Case, triton_form: None) -> None:
    outputs, gradients = case.gradients("", torch.float64)
    expected, expected_gradients = case.gradients("_ref", torch.float64)
    for out, truth in zip((*outputs, *gradients.values()), (*expected, *expected_gradients.values()), strict=True):
        assert largest_difference(out, truth) <= 1e-12


@KERNELS
def test_a_broadcast_gradient(case: Case, triton_form: None) -> None:
    """That of a sum has no strides at all; and of several outputs, only one may have any."""
    found: dict[str, list[Tensor]] = {"": [], "_ref": []}
    for form, gradients in found.items():
        leaves = {name: t.clone().requires_grad_() for name, t in case.cast(torch.float32).items()}
        for out in case.run(form, leaves):
            gradients += torch.autograd.grad(
                out.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
            )
    for gradient, truth in zip(*found.values(), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-5)


def far_apart(given: Tensor) -> Tensor:
    """The same in fp16, the last of its tokens past 2^31 elements: of the 4 GiB, only what holds numbers is real."""
    inner = math.prod(given.shape[2:])
    stride = 2**31 // (given.shape[1] - 1) + 1
    memory = torch.empty(stride * (given.shape[1] - 1) + given.shape[0] * inner, dtype=torch.float16)
    return memory.as_strided(given.shape, (inner, stride, *given[0, 0].contiguous().stride())).copy_(given)


@KERNELS
def test_offsets_past_two_to_the_31(case: Case, triton_form: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = {k: far_apart(t) if t.dim() > 2 and t.shape[1] > 1 else t.half() for k, t in case.tensors.items()}
    near = {k: t.double() for k, t in far.items()}
    outputs, gradients = replace(case, tensors=far).gradients("", torch.float16)
    expected, expected_gradients = replace(case, tensors=near).gradients("_ref", torch.float64)
    for out, truth in zip((*outputs, *gradients.values()), (*expected, *expected_gradients.values()), strict=True):
        assert largest_difference(out.double(), truth) <= 2e-3


@KERNELS
@pytest.mark.parametrize("form", ["", "_ref"])
def test_results_have_the_first_arguments_dtype(case: Case, form: str, triton_form: None) -> None:
    """In bf16, with fp32 parameters as without: the norms are as exact as their rounded input and output."""
    mixed = case.cast(torch.bfloat16) | {k: t.float() for k, t in case.tensors.items() if k in ("weight", "scale")}
    for tensors in (case.cast(torch.bfloat16), mixed):
        expected = case.run("_ref", {name: t.double() for name, t in tensors.items()})
        for out, truth in zip(case.run(form, tensors), expected, strict=True):
            assert out.dtype == torch.bfloat16
            assert largest_difference(out.double(), truth) <= 0.03


@KERNELS
@pytest.mark.parametrize("form", ["", "_ref"])
def test_nan_stays_where_it_is(case: Case, form: str, triton_form: None) -> None:
    """A NaN in one token of one sample: that sample's results hold it, the other's do not."""
    tensors = case.cast(torch.float32)
    first = next(iter(tensors.values()))
    first[0, 5] = float("nan")
    for out in case.run(form, tensors):
        assert out[0].isnan().any() and not out[0].isnan().all()
        assert not out[1].isnan().any()


# ------------------------------------------------------------------------------------ dispatch


@KERNELS
def test_the_form_that_was_asked_for_runs(case: Case, triton_form: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"modulate": "modulate", "norm_rotate": "rotate"}.get(case.kernel, "gated")
    fused = f"lingen.kernels.norm_{module}_triton.{case.kernel}_triton"
    answer = (torch.zeros(1, 1, 1),) * 3 if case.kernel == "norm_rotate" else torch.zeros(1)
    monkeypatch.setattr(fused, lambda *arguments: answer)
    assert case.run("", case.tensors)[-1].numel() == 1
    forms.ask({"norm": "torch"}, CPU)
    for out, truth in zip(case.run("", case.tensors), case.run("_ref", case.tensors), strict=True):
        assert torch.equal(out, truth)


def test_a_cpu_takes_torch_and_never_imports_triton(python: Callable[..., Any]) -> None:
    done = python(
        "-c",
        "import sys, torch; from lingen.kernels.norm import modulate; x = torch.ones(1, 2, 4);"
        "modulate(x, x[:, :1], x[:, :1], eps=1e-6); assert 'lingen.kernels.norm_modulate_triton' not in sys.modules",
    )
    assert done.returncode == 0, done.stderr


@KERNELS
def test_fake_tensors_have_shapes(case: Case) -> None:
    """What plans a model's memory and counts its FLOPs sees shapes only."""
    expected = case.run("", case.tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(t) for name, t in case.tensors.items()}
        assert [out.shape for out in case.run("", fakes)] == [out.shape for out in expected]
