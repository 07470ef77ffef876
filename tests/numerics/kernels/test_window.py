"""Attention in windows: ``_ref`` against a dense mask from coordinates, and Triton, in its interpreter, against both.

Shapes: B batch, N tokens of the grid (T, H, W), h heads of P channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lingen.kernels.index import Grid
from lingen.kernels.window import Tiling, tile, window_attention, window_attention_ref

CPU = torch.device("cpu")
BATCH, HEADS, P = 2, 2, 16
CASES: list[tuple[Grid, Grid]] = [  # grid, window
    ((2, 4, 4), (2, 2, 4)),  # divides
    ((3, 3, 5), (2, 2, 4)),  # ragged on every axis
    ((1, 6, 5), (4, 4, 4)),  # an image
    ((3, 2, 2), (4, 8, 8)),  # one window holds everything
    ((3, 5, 3), (3, 4, 3)),  # windows longer than a block of the kernel
]
everywhere = pytest.mark.parametrize("shifted", [False, True])
each_case = pytest.mark.parametrize(("grid", "window"), CASES)


@pytest.fixture
def triton_form(take_triton: Callable[[str], None]) -> None:
    """The seam takes Triton."""
    take_triton("window")


pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of rows that are not written


def sees(grid: Grid, window: Grid, shifted: bool) -> Tensor:
    """(N, N) bool: whether one window holds both tokens, from their coordinates."""
    places = []
    for token in itertools.product(*map(range, grid)):
        place = []
        for at, n, limit in zip(token, grid, window, strict=True):
            count = math.ceil(n / limit)
            size = math.ceil(n / count)
            place.append(math.floor((at - (size // 2 if shifted and count > 1 else 0)) / size))
        places.append(place)
    return torch.tensor([[one == other for other in places] for one in places])


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax over what the mask (N, N) lets through."""
    scores = torch.einsum("bihp,bjhp->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhp->bihp", scores.masked_fill(~mask, -math.inf).softmax(-1), v)


def inputs(grid: Grid, dtype: torch.dtype = torch.float64, channels: int = P) -> Tensor:
    """qkv (B, N, 3, h, P), with scores that tell tokens apart."""
    shape, generator = (BATCH, math.prod(grid), 3, HEADS, channels), torch.Generator().manual_seed(0)
    return 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gradient_of(out: Tensor, qkv: Tensor) -> Tensor:
    """Of a fixed random functional of ``out``."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weights.to(out.dtype)).sum(), qkv)[0]


# ---------------------------------------------------------------------------------------------------- windows


@everywhere
def test_windows_cut_an_axis_into_runs_that_hold_every_token_once(shifted: bool) -> None:
    for n, limit in itertools.product(range(1, 40), range(1, 9)):
        tiling = tile((1, n, 1), (1, limit, 1), shifted)
        runs = tiling.runs(1)
        assert sum(windows * side for windows, side in runs) == n and len(runs) <= 3
        assert all(windows > 0 and 0 < side <= limit for windows, side in runs)
        mask = sees((1, n, 1), (1, limit, 1), shifted)
        sides = [side for windows, side in runs for _ in range(windows)]
        assert torch.equal(mask, torch.block_diag(*(torch.ones(side, side) for side in sides)).bool())


def test_windows_are_evened_out() -> None:
    assert tile((5, 8, 8), (4, 8, 8), shifted=False).runs(0) == [(1, 3), (1, 2)]
    assert tile((34, 32, 56), (4, 8, 8), shifted=True) == Tiling((34, 32, 56), (4, 8, 8), (2, 4, 4))
    assert tile((34, 32, 56), (4, 8, 8), shifted=True).count == (9, 5, 8)


def test_an_axis_under_one_window_is_not_shifted() -> None:
    assert tile((1, 8, 16), (4, 8, 8), shifted=True).shift == (0, 0, 4)


@everywhere
@each_case
def test_pairs_and_flops_are_counted(grid: Grid, window: Grid, shifted: bool) -> None:
    tiling = tile(grid, window, shifted)
    assert tiling.pairs() == sees(grid, window, shifted).sum()
    q, k, v = inputs(grid).unbind(2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        window_attention_ref(q, k, v, tiling)
    assert counter.get_total_flops() == BATCH * 4 * tiling.pairs() * HEADS * P


# ---------------------------------------------------------------------------------------------------- numbers


@everywhere
@each_case
def test_ref_equals_a_dense_mask(grid: Grid, window: Grid, shifted: bool) -> None:
    qkv = inputs(grid).requires_grad_()
    got = window_attention_ref(*qkv.unbind(2), tile(grid, window, shifted))
    want = dense(*qkv.unbind(2), sees(grid, window, shifted))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient_of(got, qkv), gradient_of(want, qkv))


@pytest.mark.usefixtures("triton_form")
@everywhere
@each_case
def test_triton_equals_a_dense_mask(grid: Grid, window: Grid, shifted: bool) -> None:
    exact, rough = inputs(grid).requires_grad_(), inputs(grid, torch.float32).requires_grad_()
    want = dense(*exact.unbind(2), sees(grid, window, shifted))
    got = window_attention(*rough.unbind(2), tile(grid, window, shifted))
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradient_of(got, rough).double(), gradient_of(want, exact), rtol=2e-5, atol=5e-6)


@pytest.mark.usefixtures("triton_form")
@pytest.mark.parametrize("channels", [8, 20, 32])
@pytest.mark.parametrize("blocks", [(32, 16), (16, 32)])
def test_triton_takes_any_blocks_and_channels(
    channels: int, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lingen.kernels import window_triton

    monkeypatch.setattr(window_triton, "FULL_PRECISION_BLOCKS", blocks)
    grid, tiling = (3, 5, 3), tile((3, 5, 3), (3, 4, 3), shifted=True)
    rough = inputs(grid, torch.float32, channels).requires_grad_()
    want, got = window_attention_ref(*rough.unbind(2), tiling), window_attention(*rough.unbind(2), tiling)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradient_of(got, rough), gradient_of(want, rough), rtol=2e-5, atol=5e-6)


@pytest.mark.usefixtures("triton_form")
def test_triton_takes_inputs_and_gradients_in_any_layout() -> None:
    grid, tiling = (2, 3, 3), tile((2, 3, 3), (2, 2, 2), shifted=True)
    heads_first = inputs(grid, torch.float32).permute(2, 0, 3, 1, 4).contiguous().requires_grad_()  # (3, B, h, N, P)
    qkv = heads_first.transpose(2, 3).unbind(0)
    got, want = window_attention(*qkv, tiling), window_attention_ref(*qkv, tiling)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    broadcast = torch.ones(()).expand(got.shape)
    transposed = inputs(grid, torch.float32)[:, :, 0].transpose(1, 3).contiguous().transpose(1, 3)
    for dout in (broadcast, transposed):
        one, other = (torch.autograd.grad(out, heads_first, dout, retain_graph=True)[0] for out in (got, want))
        torch.testing.assert_close(one, other, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_large_scores_do_not_overflow(form: str, request: pytest.FixtureRequest) -> None:
    if form == "triton":
        request.getfixturevalue("triton_form")
    grid, tiling = (1, 4, 6), tile((1, 4, 6), (1, 4, 5), shifted=True)
    qkv = (60 * inputs(grid, torch.float32)).requires_grad_()
    got, want = window_attention(*qkv.unbind(2), tiling), dense(*qkv.double().unbind(2), sees(grid, (1, 4, 5), True))
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    assert gradient_of(got, qkv).isfinite().all()


@pytest.mark.usefixtures("triton_form")
def test_rows_lie_past_2_to_the_31(tmp_path: Path) -> None:
    """Rows 2^30 numbers apart, in a file that is nearly all hole: an offset of 32 bits would read elsewhere."""
    stride, grid, tiling = 2**30, (1, 1, 4), tile((1, 1, 4), (1, 1, 4), shifted=False)
    file = torch.from_file(str(tmp_path / "hole"), shared=True, size=6 * stride, dtype=torch.float32)
    (tmp_path / "hole").unlink()
    near = inputs(grid, torch.float32)[:1].requires_grad_()
    far = file.as_strided((1, 4, 3, HEADS, P), (4 * stride, stride, HEADS * P, P, 1), 2 * stride)
    far.copy_(near.detach())
    far.requires_grad_()
    got, want = (window_attention(*qkv.unbind(2), tiling) for qkv in (far, near))
    assert torch.equal(got, want)
    assert torch.equal(gradient_of(got, far), gradient_of(want, near))


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_stays_in_its_window(form: str, part: int, request: pytest.FixtureRequest) -> None:
    if form == "triton":
        request.getfixturevalue("triton_form")
    grid, window = (2, 3, 4), (2, 2, 2)
    mine = sees(grid, window, shifted=True)[13]
    qkv = inputs(grid, torch.float32)
    qkv[0, 13, part, 1, 3] = math.nan
    qkv.requires_grad_()
    out = window_attention(*qkv.unbind(2), tile(grid, window, shifted=True))
    reached = mine if part else torch.arange(len(mine)) == 13  # a query is its own, keys and values are seen by others
    assert torch.equal(out.isnan().any(-1)[0, :, 1], reached)
    assert not out[1].isnan().any() and not out[:, :, 0].isnan().any()
    gradient = gradient_of(out, qkv)
    if part < 2:  # the gradient of a value does not depend on values
        assert gradient[0, 13, :2, 1].isnan().any()
    assert not gradient[0, ~mine].isnan().any() and not gradient[1].isnan().any()


# ---------------------------------------------------------------------------------------------------- a GPU's code


COMPILE = """
from lingen.kernels.window import tile
from lingen.kernels.window_triton import window_attention_triton

for batch, grid, heads, channels, dtype in (
    (2, (34, 32, 56), 2, 64, torch.bfloat16),  # the 4B model's, but for its 32 heads
    (1, (9, 16, 17), 1, 128, torch.bfloat16),
    (1, (1, 1, 1), 1, 32, torch.float16),  # Triton makes constants of arguments that are 1
    (1, (5, 8, 9), 3, 20, torch.float32),
):
    qkv = torch.zeros(batch, grid[0] * grid[1] * grid[2], 3, heads, channels, dtype=dtype, requires_grad=True)
    window_attention_triton(*qkv.unbind(2), tile(grid, (4, 8, 8), shifted=True)).sum().backward()
"""


def test_every_kernel_compiles_for_an_h100(compiled: Callable[[str], list[str]]) -> None:
    assert compiled(COMPILE) == 4 * ["_window_forward", "_window_backward_queries", "_window_backward_keys"]


# ---------------------------------------------------------------------------------------------------- bad input


def bad_inputs() -> dict[str, tuple[list[Tensor], Grid, str]]:
    q, k, v = inputs((1, 2, 3), torch.float32).unbind(2)
    grid = (1, 2, 3)
    return {
        "axes": ([q[0], k, v], grid, r"q has shape \(6, 2, 16\); it must be \(B, N, h, P\)"),
        "empty": ([q[:0], k[:0], v[:0]], grid, r"q has shape \(0, 6, 2, 16\); it must be .*each at least 1"),
        "tokens": ([q, k, v], (1, 2, 2), r"q has shape .* the N = 4 tokens of the grid \(1, 2, 2\)"),
        "heads": ([q, k[:, :, :1], v], grid, r"k is \(2, 6, 1, 16\) .*; it must be as q is, \(2, 6, 2, 16\)"),
        "precision": ([q, k, v.double()], grid, r"v is .*torch.float64.*as q is.*torch.float32"),
        "device": ([q, k, v.to("meta")], grid, r"v is .* on meta; it must be as q is.* on cpu"),
        "integers": ([q.int(), k.int(), v.int()], grid, r"q .* has dtype torch.int32; it must be floating point"),
        "strides": ([q.mT.contiguous().mT, k, v], grid, r"q .* has strides \(192, 32, 1, 2\); the last must be 1"),
    }


@pytest.mark.parametrize("name", list(bad_inputs()))
def test_bad_input_is_named(name: str) -> None:
    given, grid, words = bad_inputs()[name]
    with pytest.raises(ValueError, match=words):
        window_attention(*given, tile(grid, grid, shifted=False))


@pytest.mark.usefixtures("triton_form")
def test_triton_names_what_it_does_not_take() -> None:
    tiling = tile((1, 2, 3), (1, 2, 3), shifted=False)
    exact = torch.zeros(1, 6, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"kernels.window=triton cannot run here: it does not compute in fp64"):
        window_attention(exact, exact, exact, tiling)
    wide = torch.zeros(1, 6, 1, 160)
    with pytest.raises(ValueError, match=r"\(1, 6, 1, 160\); .* takes P up to 128; set kernels.window=torch"):
        window_attention(wide, wide, wide, tiling)
    long = torch.zeros(1, 1, 1, 1).expand(1, 2**20 + 1, 1, 1)
    with pytest.raises(ValueError, match=r"windows of \(1, 1, 1048577\); .* takes up to 1048576 tokens"):
        window_attention(long, long, long, tile((1, 1, 2**20 + 1), (1, 1, 2**21), shifted=False))
