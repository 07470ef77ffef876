"""TESA against attention that loops over tokens and asks, for each pair, whether one window holds both."""

from __future__ import annotations

import itertools

import pytest
import torch

from lingen.kernels.index import Grid
from lingen.models.embed import rotary_table, rotate, token_spacing
from lingen.models.mixers.window import WindowAttention, merge, partition, tile

D, P = 24, 12
CASES: list[tuple[Grid, Grid]] = [  # grid, window
    ((4, 4, 4), (2, 2, 2)),  # divides
    ((5, 3, 7), (2, 2, 4)),  # ragged on every axis
    ((1, 6, 5), (4, 4, 4)),  # an image
    ((3, 2, 2), (4, 8, 8)),  # one window holds everything
    ((4, 1, 3), (3, 2, 2)),
]


def attention(window: Grid, shifted: bool) -> WindowAttention:
    torch.manual_seed(0)
    module = WindowAttention(D, P, window=window, shifted=shifted).double()
    torch.nn.init.normal_(module.qkv.scale, mean=1.0, std=0.3)
    return module


def window_of(token: tuple[int, ...], grid: Grid, window: Grid, shifted: bool) -> tuple[int, ...]:
    """Which window a token lies in, axis by axis, from the definition; -1 is the part in front of a shift."""
    place = []
    for at, n, limit in zip(token, grid, window, strict=True):
        count = -(-n // limit)
        size = -(-n // count)
        shift = size // 2 if shifted and count > 1 else 0
        place.append((at - shift) // size)
    return tuple(place)


def naive(module: WindowAttention, x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Softmax over the tokens of each token's own window, with rotary positions of the whole grid. x (N, D)."""
    tokens = list(itertools.product(*map(range, grid)))
    places = [window_of(token, grid, module.window, module.shifted) for token in tokens]
    qkv = module.qkv.linear(x).view(len(tokens), 3, D // P, P)
    qk = qkv[:, :2] * (qkv[:, :2].pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * module.qkv.scale
    q, k = rotate(qk[None], rotary_table(grid, token_spacing(grid), P, x.dtype, x.device))[0].unbind(1)
    rows = []
    for i, place in enumerate(places):
        mine = [j for j, other in enumerate(places) if other == place]
        scores = torch.einsum("hp,jhp->hj", q[i], k[mine]) / P**0.5
        rows.append(torch.einsum("hj,jhp->hp", scores.softmax(-1), qkv[mine, 2]).flatten())
    return torch.stack(rows) @ module.out.weight.T


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_equals_the_naive_loop(grid: Grid, window: Grid, shifted: bool) -> None:
    module = attention(window, shifted)
    x = torch.randn(2, grid[0] * grid[1] * grid[2], D, dtype=torch.float64)
    got = module(x, grid)
    for sample in range(2):
        torch.testing.assert_close(got[sample], naive(module, x[sample], grid), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_a_token_reaches_its_own_window_and_no_other(grid: Grid, window: Grid, shifted: bool) -> None:
    module = attention(window, shifted)
    tokens = list(itertools.product(*map(range, grid)))
    x = torch.randn(1, len(tokens), D, dtype=torch.float64)
    before = module(x, grid)
    for touched in (0, len(tokens) // 2, len(tokens) - 1):
        moved = x.clone()
        moved[0, touched] += 1.0
        changed = (module(moved, grid) - before).abs().amax(-1)[0] > 1e-9
        place = window_of(tokens[touched], grid, window, shifted)
        assert changed.tolist() == [window_of(token, grid, window, shifted) == place for token in tokens]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_partition_and_merge_are_inverse(grid: Grid, window: Grid, shifted: bool) -> None:
    tiling = tile(grid, window, shifted)
    x = torch.randn(2, grid[0] * grid[1] * grid[2], 3)
    assert torch.equal(merge(partition(x, tiling), tiling), x)


def test_windows_are_evened_out_and_never_larger_than_asked() -> None:
    assert tile((5, 8, 8), (4, 8, 8), shifted=False).size == (3, 8, 8)
    assert tile((34, 32, 56), (4, 8, 8), shifted=True).size == (4, 8, 8)
    assert tile((34, 32, 56), (4, 8, 8), shifted=True).shift == (2, 4, 4)
    for n, limit in itertools.product(range(1, 40), range(1, 9)):
        tiling = tile((n, 1, 1), (limit, 1, 1), shifted=False)
        assert tiling.size[0] <= limit and n <= tiling.padded[0] < n + tiling.count[0]


def test_an_axis_under_one_window_is_not_shifted() -> None:
    assert tile((1, 8, 16), (4, 8, 8), shifted=True).shift == (0, 0, 4)


def test_a_mask_first_made_under_inference_mode_serves_training() -> None:
    module, grid = attention((2, 2, 2), shifted=True), (3, 5, 2)
    x = torch.randn(1, 30, D, dtype=torch.float64)
    with torch.inference_mode():
        module(x, grid)
    module(x.requires_grad_(), grid).sum().backward()
    assert x.grad is not None
