"""The convolution's seam: ``_ref`` against loops in fp64, and Triton, in its interpreter, against ``_ref``.

Shapes: B batch, N tokens of a grid, R reviews, M = R + N, d projections of C = E + G channels, k taps, h heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lingen.kernels import conv, forms
from lingen.kernels.conv import (
    review_grid,
    review_tokens,
    review_tokens_ref,
    scan_conv,
    scan_conv_ref,
    scan_steps,
    scan_steps_ref,
)
from lingen.kernels.index import Grid, ScanIndex

CPU = torch.device("cpu")
AXES = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0))  # Rotary-Major Scan's, from the slowest
Call = Callable[..., Tensor]


@pytest.fixture
def triton_form(take_triton: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam takes Triton, with several tiles of everything."""
    take_triton("conv")
    from lingen.kernels import conv_triton, conv_triton_steps, review_triton

    monkeypatch.setattr(conv_triton, "CHANNELS", 16)
    monkeypatch.setattr(conv_triton, "PROGRAMS", 24)
    monkeypatch.setattr(conv_triton_steps, "HEADS", 16)
    monkeypatch.setattr(conv_triton_steps, "PROGRAMS", 6)
    monkeypatch.setattr(review_triton, "CHANNELS", 16)


@dataclass(frozen=True)
class Case:
    """One layer's convolution."""

    grid: Grid = (2, 3, 4)
    pool: Grid | None = (2, 2, 2)
    axes: tuple[int, ...] | None = (0, 1, 2)  # of the scan, from the slowest; a random permutation where None
    batch: int = 1
    projections: int = 1
    inner: int = 20
    groups: int = 6
    taps: int = 4

    @property
    def channels(self) -> int:
        return self.inner + self.groups

    @property
    def index(self) -> ScanIndex:
        parts, rows = [], 0
        for box in (review_grid(self.grid, self.pool), self.grid) if self.pool else (self.grid,):
            count = math.prod(box)
            if self.axes is None:
                order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
            else:
                order = torch.arange(count).view(box).permute(self.axes).flatten()
            parts.append(rows + order)
            rows += count
        source = torch.cat(parts)
        return ScanIndex(source.int(), source.argsort().int(), rows - math.prod(self.grid))

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """tokens and reviews, slices of what is wider; weight and bias."""
        index = self.index
        tokens, reviews = (
            normal(self.batch, rows, self.projections, self.channels + 5, seed=rows).to(dtype)[..., 2:-3]
            for rows in (index.tokens, index.reviews)
        )
        weight, bias = (normal(2 * self.channels, *taps, seed=2).to(dtype) for taps in ((self.taps,), ()))
        return [tokens, reviews, weight, bias]


CASES = {
    **{f"order {axes}": Case(axes=axes) for axes in AXES},
    "random order, separate, batch": Case(axes=None, projections=2, batch=2),
    "odd lengths, batch": Case(grid=(3, 5, 3), axes=(2, 1, 0), batch=2, inner=7, groups=3),
    "one frame, separate": Case(grid=(1, 5, 7), axes=(1, 2, 0), projections=2, inner=16, groups=16),
    "no reviews": Case(grid=(2, 3, 3), pool=None, axes=(1, 2, 0)),
    "one direction's x alone": Case(groups=0, inner=17, axes=None),
    "two taps": Case(taps=2, axes=(0, 2, 1), inner=8, groups=8),
    "one tap": Case(taps=1, inner=8, groups=8),
    "three taps, separate": Case(taps=3, projections=2, inner=8, groups=8),
    "six taps": Case(taps=6, axes=(2, 1, 0), inner=8, groups=8),
    "fewer positions than taps": Case(grid=(1, 1, 2), pool=None, inner=8, groups=8),
    "one token": Case(grid=(1, 1, 1), pool=None, inner=1, groups=1),
    "one token, one review": Case(grid=(1, 1, 1), inner=3, groups=0, projections=2),
    "more reviews than a tile": Case(grid=(3, 3, 4), pool=(1, 1, 2), axes=(1, 2, 0), inner=8, groups=8),
}
SMALL = ("order (1, 2, 0)", "random order, separate, batch", "no reviews", "fewer positions than taps", "one token")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
small_cases = pytest.mark.parametrize("case", [CASES[name] for name in SMALL], ids=SMALL)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(call: Call, inputs: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of a fixed random functional of it."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out.dtype))]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        if b.numel():
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3), f"tensor {i}"


def orders(index: ScanIndex) -> tuple[list[int], list[int]]:
    """The rows of [reviews, tokens] that each direction reads."""
    rows = index.source.tolist()
    reviews, tokens = rows[: index.reviews], rows[index.reviews :]
    return rows, reviews[::-1] + tokens[::-1]


def naive_conv(case: Case, tokens: Tensor, reviews: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By the definition: position by position, tap by tap."""
    E, G, k = case.inner, case.groups, case.taps
    rows = torch.cat((reviews, tokens), dim=1)  # (B, M, d, C)
    sides = []
    for side, order in enumerate(orders(case.index)):
        seen = [rows[:, row, min(side, case.projections - 1)] for row in order]  # (B, C) each
        mine = [*range(side * E, (side + 1) * E), *range(2 * E + side * G, 2 * E + (side + 1) * G)]
        taps, shift = weight[mine], bias[mine]
        results = []
        for m in range(len(order)):
            total = shift + sum(taps[:, k - 1 - ago] * seen[m - ago] for ago in range(min(k, m + 1)))
            results.append(total / (1 + torch.exp(-total)))
        sides.append(torch.stack(results, dim=1))  # (B, M, C)
    return torch.cat((sides[0][..., :E], sides[1][..., :E], sides[0][..., E:], sides[1][..., E:]), dim=-1)


def naive_steps(case: Case, dt: Tensor, reviews: Tensor, bias: Tensor) -> Tensor:
    rows = torch.cat((reviews, dt), dim=1)  # (B, M, d, h)
    sides = [rows[:, order, min(side, case.projections - 1)] for side, order in enumerate(orders(case.index))]
    return torch.log1p(torch.exp(torch.cat(sides, dim=-1) + bias))


def naive_reviews(x: Tensor, grid: Grid, pool: Grid) -> Tensor:
    starts = itertools.product(*(range(0, n, side) for n, side in zip(grid, pool, strict=True)))
    video = x.unflatten(1, grid)
    boxes = [video[:, t : t + pool[0], h : h + pool[1], w : w + pool[2]] for t, h, w in starts]
    return torch.stack([box.flatten(1, 3).mean(1) for box in boxes], dim=1)


# The truth.


@every_case
def test_reference_is_the_definition(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    found = scan_conv_ref(*inputs, case.index, inner=case.inner)
    assert_close([found], [naive_conv(case, *inputs)], 1e-12)
    dt, reviews, _, bias = inputs
    assert_close([scan_steps_ref(dt, reviews, bias, case.index)], [naive_steps(case, dt, reviews, bias)], 1e-12)


@small_cases
def test_reference_gradients(case: Case) -> None:
    case = replace(case, inner=2, groups=1)
    inputs = [t.requires_grad_() for t in case.inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda *given: scan_conv_ref(*given, case.index, inner=case.inner), inputs)
    dt, reviews, _, bias = inputs
    assert torch.autograd.gradcheck(lambda *given: scan_steps_ref(*given, case.index), (dt, reviews, bias))


def test_reference_in_slices_of_channels_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["random order, separate, batch"]

    def call(*given: Tensor) -> Tensor:
        return scan_conv_ref(*given, case.index, inner=case.inner)

    whole = with_gradients(call, case.inputs(torch.float64))
    monkeypatch.setattr(conv, "MAX_ELEMENTS", 5 * case.batch * (case.index.source.numel() + 2 * case.taps))
    monkeypatch.setattr(conv, "BLOCK_ELEMENTS", 300)
    assert_close(with_gradients(call, case.inputs(torch.float64)), whole, 1e-12)


def test_reference_counts_as_a_convolution() -> None:
    case = CASES["random order, separate, batch"]
    inputs = case.inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        scan_conv(*inputs, case.index, inner=case.inner)
    assert counter.get_total_flops() == 2 * case.batch * case.index.source.numel() * 2 * case.channels * case.taps


def test_reference_runs_on_fake_tensors() -> None:
    case = Case()
    with FakeTensorMode():
        tokens, reviews = torch.empty(1, 24, 1, 26, requires_grad=True), torch.empty(1, 4, 1, 26)
        index = ScanIndex(torch.empty(28, dtype=torch.int32), torch.empty(28, dtype=torch.int32), 4)
        out = scan_conv(tokens, reviews, torch.empty(52, 4), torch.empty(52), index, inner=case.inner)
        assert out.shape == (1, 28, 52)
        out.sum().backward()
        assert scan_steps(tokens, reviews, torch.empty(52), index).shape == (1, 28, 52)
        assert review_tokens(tokens, case.grid, (2, 2, 2)).shape == (1, 4, 1, 26)


REVIEWS = {
    "edges": ((3, 5, 6), (2, 3, 4), (20,)),
    "one frame": ((1, 5, 7), (2, 2, 2), (2, 5)),
    "a token a box": ((2, 3, 2), (1, 1, 1), (4,)),
    "one box": ((2, 2, 3), (5, 2, 7), (2, 3, 4)),
}
every_pooling = pytest.mark.parametrize(("grid", "pool", "rest"), REVIEWS.values(), ids=REVIEWS.keys())


@every_pooling
def test_reference_reviews_are_means_of_boxes(grid: Grid, pool: Grid, rest: tuple[int, ...]) -> None:
    x = normal(2, math.prod(grid), *rest[:-1], rest[-1] + 3, seed=0)[..., 1:-2]
    expected = naive_reviews(x, grid, pool)
    assert expected.shape[1] == math.prod(review_grid(grid, pool))
    assert_close([review_tokens_ref(x, grid, pool)], [expected], 1e-12)
    assert torch.autograd.gradcheck(lambda x: review_tokens_ref(x, grid, pool), (x[..., :2].requires_grad_(),))


# Triton.


@every_case
def test_triton_is_the_reference(case: Case, triton_form: None) -> None:
    def run(call: Call) -> list[Tensor]:
        given = case.inputs(torch.float32)
        return with_gradients(lambda *t: call(*t, case.index, inner=case.inner), given)

    assert_close(run(scan_conv), run(scan_conv_ref), 1e-5)


@every_case
def test_triton_steps_are_the_reference(case: Case, triton_form: None) -> None:
    def run(call: Call) -> list[Tensor]:
        dt, reviews, _, bias = case.inputs(torch.float32)
        return with_gradients(lambda *t: call(*t, case.index), [4 * dt - 4, 4 * reviews - 4, bias])

    found, expected = run(scan_steps), run(scan_steps_ref)
    assert_close(found, expected, 1e-5)
    assert ((found[0] - expected[0]).abs() <= 1e-5 * expected[0]).all()  # small time steps are exact too


@every_pooling
def test_triton_reviews_are_the_reference(grid: Grid, pool: Grid, rest: tuple[int, ...], triton_form: None) -> None:
    x = normal(2, math.prod(grid), *rest[:-1], rest[-1] + 3, seed=0).float()[..., 1:-2]
    found = with_gradients(lambda x: review_tokens(x, grid, pool), [x])
    assert_close(found, with_gradients(lambda x: review_tokens_ref(x, grid, pool), [x]), 1e-5)


def test_triton_in_fp64(triton_form: None) -> None:
    case = CASES["two taps"]

    def run(convolve: Call, steps: Call, pool: Call) -> list[Tensor]:
        tokens, reviews, weight, bias = case.inputs(torch.float64)
        results = with_gradients(lambda *t: convolve(*t, case.index, inner=case.inner), [tokens, reviews, weight, bias])
        results += with_gradients(lambda *t: steps(*t, case.index), [tokens, reviews, bias])
        return results + with_gradients(lambda x: pool(x, case.grid, (2, 2, 3)), [tokens])

    fused, truth = (scan_conv, scan_steps, review_tokens), (scan_conv_ref, scan_steps_ref, review_tokens_ref)
    assert_close(run(*fused), run(*truth), 1e-12)


def test_triton_takes_any_strides_of_the_gradient(triton_form: None) -> None:
    case = CASES["two taps"]

    def run(call: Call) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in case.inputs(torch.float32)]
        out = call(*leaves, case.index, inner=case.inner)
        scale = normal(*out.shape[:2], seed=3).float()
        return [*torch.autograd.grad((out.sum(-1) * scale).sum(), leaves)]  # the gradient is broadcast over channels

    assert_close(run(scan_conv), run(scan_conv_ref), 1e-5)


def test_triton_copies_nothing(triton_form: None) -> None:
    """The projection is read where it lies, and kept as it is for the backward."""
    case = Case()
    projection = normal(1, 24, 1, 40, seed=0).float().requires_grad_()
    _, reviews, weight, bias = case.inputs(torch.float32)
    out = scan_conv(projection[..., 7:33], reviews, weight, bias, case.index, inner=case.inner)
    kept = out.grad_fn.saved_tensors[0]  # type: ignore[union-attr]
    assert kept.data_ptr() == projection[..., 7:33].data_ptr() and kept.stride(1) == 40


def test_triton_offsets_pass_32_bits(triton_form: None, tmp_path: Path) -> None:
    """Three rows 2^30 elements apart, in a file that is nearly all hole: the third begins at 2^31, which in 32 bits is
    -2^31, and there are zeros."""
    case = Case(grid=(1, 1, 3), pool=None, inner=2, groups=2, taps=2)
    rows, (_, reviews, weight, bias) = normal(1, 3, 1, 4, seed=0).float(), case.inputs(torch.float32)
    hole = torch.from_file(str(tmp_path / "hole"), shared=True, size=2**32 + 4)
    far = hole.as_strided(rows.shape, (0, 2**30, 0, 1), storage_offset=2**31)
    far.copy_(rows)
    for call in (
        lambda x: scan_conv(x, reviews, weight, bias, case.index, inner=case.inner),
        lambda x: scan_steps(x, reviews, bias, case.index),
        lambda x: review_tokens(x, case.grid, (1, 1, 2)),
    ):
        assert_close(with_gradients(call, [far]), with_gradients(call, [rows]), 0.0)


def test_triton_form_is_asked_for(triton_form: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs where it was asked for, and is gone where it is not."""
    from lingen.kernels import conv_triton, conv_triton_steps, review_triton

    def ran(*_: object) -> Tensor:
        raise NotImplementedError("Triton ran")

    monkeypatch.setattr(conv_triton, "scan_conv_triton", ran)
    monkeypatch.setattr(conv_triton_steps, "scan_steps_triton", ran)
    monkeypatch.setattr(review_triton, "review_tokens_triton", ran)
    case = Case()
    tokens, reviews, weight, bias = case.inputs(torch.float32)
    calls = (
        lambda: scan_conv(tokens, reviews, weight, bias, case.index, inner=case.inner),
        lambda: scan_steps(tokens, reviews, bias, case.index),
        lambda: review_tokens(tokens, case.grid, (2, 2, 2)),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="Triton ran"):
            call()
    forms.ask({}, CPU)
    for call in calls:
        assert call().isfinite().all()
