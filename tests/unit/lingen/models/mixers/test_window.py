"""TESA against attention that loops over tokens and asks, for each pair, whether one window holds both."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lingen.kernels.index import Grid
from lingen.kernels.norm import norm_rotate_ref
from lingen.models.embed import rotary_table
from lingen.models.mixers.window import WindowAttention

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


def naive(module: WindowAttention, x: torch.Tensor, grid: Grid, own_positions: bool = False) -> torch.Tensor:
    """Softmax over the tokens of each token's own window. x (N, D).

    Rotary positions count from the edge of the grid, or, with ``own_positions``, from the edge of the token's window.
    """
    tokens = list(itertools.product(*map(range, grid)))
    places = [window_of(token, grid, module.window, module.shifted) for token in tokens]
    table = rotary_table(grid, P, x.dtype, x.device)
    if own_positions:
        edges: dict[tuple[int, ...], tuple[int, ...]] = {}  # the first token of each window
        own = []
        for token, place in zip(tokens, places, strict=True):
            edge = edges.setdefault(place, token)
            own.append(tokens.index(tuple(at - start for at, start in zip(token, edge, strict=True))))
        table = table[0][own], table[1][own]
    qkv = module.qkv.linear(x).view(1, len(tokens), 3, D // P, P)
    q, k, v = (side[0] for side in norm_rotate_ref(qkv, module.qkv.scale, table, eps=1e-6))
    rows = []
    for i, place in enumerate(places):
        mine = [j for j, other in enumerate(places) if other == place]
        scores = torch.einsum("hp,jhp->hj", q[i], k[mine]) / P**0.5
        rows.append(torch.einsum("hj,jhp->hp", scores.softmax(-1), v[mine]).flatten())
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
def test_rotating_by_the_place_on_the_grid_or_in_the_window_is_the_same(
    grid: Grid, window: Grid, shifted: bool
) -> None:
    module = attention(window, shifted)
    x = torch.randn(1, math.prod(grid), D, dtype=torch.float64)
    torch.testing.assert_close(module(x, grid)[0], naive(module, x[0], grid, own_positions=True), rtol=1e-6, atol=1e-8)


def test_what_was_first_made_under_inference_mode_serves_training() -> None:
    module, grid = attention((2, 2, 2), shifted=True), (3, 5, 2)
    x = torch.randn(1, 30, D, dtype=torch.float64)
    with torch.inference_mode():
        module(x, grid)
    module(x.requires_grad_(), grid).sum().backward()
    assert x.grad is not None
