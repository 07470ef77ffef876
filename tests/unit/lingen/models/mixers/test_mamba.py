"""The bidirectional Mambas against two causal passes, one token at a time, in sequence form."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lingen.kernels.conv import review_grid
from lingen.kernels.index import Grid
from lingen.models.mixers.mamba1 import BidirectionalMamba1
from lingen.models.mixers.mamba2 import BidirectionalMamba2
from lingen.models.mixers.scan import ScanOrder, scan_order, walk

D, P, S = 8, 4, 3
E = 2 * D
ROWS = scan_order("fixed", 0)
CASES: list[tuple[ScanOrder, Grid, Grid | None]] = [
    (ROWS, (2, 4, 4), (2, 2, 2)),
    (scan_order("rotary", 1), (3, 3, 5), (2, 2, 2)),  # ragged
    (scan_order("rotary", 2), (1, 4, 3), (2, 2, 2)),  # an image
    (scan_order("rotary", 3), (5, 1, 2), (3, 4, 2)),
    (scan_order("zigzag", 2), (3, 2, 3), (2, 1, 2)),
    (scan_order("hilbert", 1), (2, 3, 4), None),
]
Mamba = BidirectionalMamba2 | BidirectionalMamba1
Make = Callable[..., Mamba]


def wake(module: Mamba) -> Mamba:
    """In double precision, and with nothing left at zero or one."""
    module.double()
    for weight in (module.conv_bias, module.D, module.norm_weight):
        torch.nn.init.normal_(weight, mean=0.5)
    return module


def mamba2(order: ScanOrder = ROWS, review_pool: Grid | None = (2, 2, 2), separate: bool = False) -> Mamba:
    torch.manual_seed(0)
    sizes = {"expand": 2, "head_dim": P, "d_state": S, "conv_kernel": 4, "chunk_size": 8}
    return wake(BidirectionalMamba2(D, **sizes, separate=separate, order=order, review_pool=review_pool))


def mamba1(order: ScanOrder = ROWS, review_pool: Grid | None = (2, 2, 2), separate: bool = False) -> Mamba:
    torch.manual_seed(0)
    sizes = {"expand": 2, "d_state": S, "conv_kernel": 4}
    return wake(BidirectionalMamba1(D, **sizes, separate=separate, order=order, review_pool=review_pool))


def naive_reviews(x: Tensor, pool: Grid) -> Tensor:
    """x (T, H, W, C): the mean of each box, box after box."""
    starts = itertools.product(*(range(0, n, side) for n, side in zip(x.shape[:3], pool, strict=True)))
    boxes = [x[tuple(slice(a, a + side) for a, side in zip(at, pool, strict=True))] for at in starts]
    return torch.stack([box.mean((0, 1, 2)) for box in boxes])


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(M, C) -> the same."""
    padded = F.pad(x.T, (weight.shape[1] - 1, 0))[None]
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))[0].T


def causal_pass2(module: BidirectionalMamba2, mixed: Tensor, direction: int) -> Tensor:
    """Mamba2 without its gate: mixed (M, E + 2S + h) -> (M, E), token by token."""
    d, heads = direction, module.heads
    weight = torch.cat((module.conv_weight[d * E : (d + 1) * E], module.conv_weight[2 * E + 2 * S * d :][: 2 * S]))
    bias = torch.cat((module.conv_bias[d * E : (d + 1) * E], module.conv_bias[2 * E + 2 * S * d :][: 2 * S]))
    xbc, dt = mixed.split((E + 2 * S, heads), dim=-1)
    x, b, c = causal_conv(xbc, weight, bias).split((E, S, S), dim=-1)
    mine = slice(d * heads, (d + 1) * heads)
    dt = F.softplus(dt + module.dt_bias[mine])
    a, skip = -module.A_log[mine].exp(), module.D[mine]
    state = torch.zeros(heads, P, S, dtype=mixed.dtype)
    rows = []
    for t in range(len(mixed)):
        heads_x = x[t].view(heads, P)
        state = state * (dt[t] * a).exp()[:, None, None] + dt[t][:, None, None] * heads_x[:, :, None] * b[t]
        rows.append((state @ c[t] + skip[:, None] * heads_x).flatten())
    return torch.stack(rows)


def causal_pass1(module: BidirectionalMamba1, mixed: Tensor, direction: int) -> Tensor:
    """Mamba without its gate: mixed (M, E) -> (M, E), token by token."""
    mine = slice(direction * E, (direction + 1) * E)
    x = causal_conv(mixed, module.conv_weight[mine], module.conv_bias[mine])
    low, b, c = (x @ module.x_proj[direction].T).split((module.rank, S, S), dim=-1)
    dt = F.softplus(low @ module.dt_proj[direction].T + module.dt_bias[mine])
    a = -module.A_log[mine].exp()  # (E, S)
    state = torch.zeros(E, S, dtype=mixed.dtype)
    rows = []
    for t in range(len(mixed)):
        state = state * (dt[t][:, None] * a).exp() + (dt[t] * x[t])[:, None] * b[t]
        rows.append(state @ c[t] + module.D[mine] * x[t])
    return torch.stack(rows)


def naive(module: Mamba, x: Tensor, grid: Grid) -> Tensor:
    """x (N, D) -> the same: reviews pooled before the projection, and run ahead of both directions."""
    tokens, reviews = walk(module.order, grid), x[:0]
    if module.review_pool:
        reviews = naive_reviews(x.view(*grid, D), module.review_pool)
        reviews = reviews[walk(module.order, review_grid(grid, module.review_pool))]
    projections = len(module.norm_weight) // E
    gates, mixed = module.in_proj.weight[: projections * E], module.in_proj.weight[projections * E :]
    causal = causal_pass2 if isinstance(module, BidirectionalMamba2) else causal_pass1
    both = []
    for direction in (0, 1):
        parts = (reviews, x[tokens]) if direction == 0 else (reviews.flip(0), x[tokens].flip(0))
        y = causal(module, torch.cat(parts) @ mixed.chunk(projections)[direction % projections].T, direction)
        y = y[len(reviews) :] if direction == 0 else y[len(reviews) :].flip(0)
        both.append(torch.empty_like(y).index_copy(0, tokens, y))
    each = [both[0] + both[1]] if projections == 1 else both
    gated = [y * F.silu(x @ gate.T) for y, gate in zip(each, gates.chunk(projections), strict=True)]
    normed = torch.cat([y * (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() for y in gated], dim=-1)
    return normed * module.norm_weight @ module.out_proj.weight.T


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("make", [mamba2, mamba1])
@pytest.mark.parametrize(("order", "grid", "pool"), CASES)
def test_equals_two_causal_passes(make: Make, order: ScanOrder, grid: Grid, pool: Grid | None, separate: bool) -> None:
    module = make(order, pool, separate)
    x = torch.randn(2, grid[0] * grid[1] * grid[2], D, dtype=torch.float64)
    got = module(x, grid)
    for sample in range(2):
        torch.testing.assert_close(got[sample], naive(module, x[sample], grid), rtol=1e-5, atol=1e-6)


def forwards_only(module: Mamba) -> Mamba:
    """Silence the backward direction: its x is zero, hence its output is."""
    with torch.no_grad():
        module.conv_weight[E : 2 * E] = 0
        module.conv_bias[E : 2 * E] = 0
    return module


def changed_by(module: Mamba, grid: Grid, change: Tensor) -> list[bool]:
    """Which tokens' outputs a change of the input reaches."""
    x = torch.randn(1, *change.shape, dtype=torch.float64)
    difference = module(x + change, grid) - module(x, grid)
    return (difference.abs().amax(-1)[0] > 1e-9).tolist()


@pytest.mark.parametrize("make", [mamba2, mamba1])
def test_the_last_token_reaches_the_first_through_the_reviews_alone(make: Make) -> None:
    change = torch.zeros(32, D, dtype=torch.float64)
    change[-1] = 1.0
    assert changed_by(forwards_only(make()), (2, 2, 8), change)[0]
    assert not changed_by(forwards_only(make(review_pool=None)), (2, 2, 8), change)[0]


@pytest.mark.parametrize("make", [mamba2, mamba1])
def test_a_change_that_no_review_sees_only_reaches_later_tokens_forwards_and_all_tokens_in_both_directions(
    make: Make,
) -> None:
    change = torch.zeros(12, D, dtype=torch.float64)
    change[6], change[7] = 1.0, -1.0  # the two tokens of one box: its mean stays
    assert changed_by(forwards_only(make()), (1, 1, 12), change) == [False] * 6 + [True] * 6
    assert changed_by(make(), (1, 1, 12), change) == [True] * 12


def test_starts_as_mamba_does() -> None:
    large = {"expand": 2, "d_state": S, "conv_kernel": 4, "separate": False, "order": ROWS, "review_pool": None}
    two = BidirectionalMamba2(64, head_dim=2, chunk_size=8, **large)
    a = two.A_log.exp()
    assert a.min() * 1.001 >= 1.0 and a.max() <= 16.0 * 1.001 and a.std() > 0
    one = BidirectionalMamba1(64, **large)
    torch.testing.assert_close(one.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(256, 3))
    for module in (one, two):
        dt = F.softplus(module.dt_bias)
        assert dt.min() * 1.001 >= 1e-3 and dt.max() <= 1e-1 * 1.001 and dt.std() > 0


def test_the_directions_of_mamba1_start_apart() -> None:
    module = mamba1()
    assert not torch.allclose(module.x_proj[0], module.x_proj[1])
    assert not torch.allclose(module.dt_proj[0], module.dt_proj[1])


def test_heads_must_divide_the_inner_width() -> None:
    sizes = {"expand": 2, "head_dim": 5, "d_state": S, "conv_kernel": 4, "chunk_size": 8}
    with pytest.raises(ValueError, match="head_dim=5 must divide"):
        BidirectionalMamba2(D, **sizes, separate=False, order=ROWS, review_pool=None)
