"""The bidirectional Mamba2 against two causal passes, one token at a time, in sequence form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from lingen.kernels.index import Grid
from lingen.models.mixers.mamba2 import BidirectionalMamba2, review_count, review_tokens

D, P, S = 8, 4, 3
E = 2 * D
CASES: list[tuple[Grid, Grid]] = [  # grid and pooling box, in scan order
    ((2, 4, 4), (2, 2, 2)),
    ((3, 3, 5), (2, 2, 2)),  # ragged
    ((1, 4, 3), (2, 2, 2)),  # an image
    ((5, 1, 2), (3, 4, 2)),
]


def mamba() -> BidirectionalMamba2:
    torch.manual_seed(0)
    module = BidirectionalMamba2(D, expand=2, head_dim=P, d_state=S, conv_kernel=4, chunk_size=8).double()
    for weight in (module.conv_bias, module.D, module.norm_weight):
        torch.nn.init.normal_(weight, mean=0.5)
    return module


def forwards_only(module: BidirectionalMamba2) -> BidirectionalMamba2:
    """Silence the backward direction: its x is zero, hence its output is."""
    with torch.no_grad():
        module.conv_weight[E : 2 * E] = 0
        module.conv_bias[E : 2 * E] = 0
    return module


def naive_reviews(x: torch.Tensor, pool: Grid) -> torch.Tensor:
    """x (n1, n2, n3, C): the mean of each box, box after box."""
    starts = itertools.product(*(range(0, n, side) for n, side in zip(x.shape[:3], pool, strict=True)))
    boxes = [x[tuple(slice(a, a + side) for a, side in zip(at, pool, strict=True))] for at in starts]
    return torch.stack([box.mean((0, 1, 2)) for box in boxes])


def causal_pass(module: BidirectionalMamba2, sequence: torch.Tensor, direction: int) -> torch.Tensor:
    """One plain Mamba2 without its gate: sequence (M, D) -> (M, E), token by token."""
    d, heads = direction, module.heads
    _, x, b, c, dt = module.in_proj(sequence).split((E, E, S, S, heads), dim=-1)
    weight = torch.cat((module.conv_weight[d * E : (d + 1) * E], module.conv_weight[2 * E + 2 * S * d :][: 2 * S]))
    bias = torch.cat((module.conv_bias[d * E : (d + 1) * E], module.conv_bias[2 * E + 2 * S * d :][: 2 * S]))
    xbc = F.pad(torch.cat((x, b, c), -1).T, (3, 0))[None]
    xbc = F.silu(F.conv1d(xbc, weight[:, None], bias, groups=E + 2 * S))[0].T
    x, b, c = xbc.split((E, S, S), dim=-1)
    mine = slice(d * heads, (d + 1) * heads)
    dt = F.softplus(dt + module.dt_bias[mine])
    a, skip = -module.A_log[mine].exp(), module.D[mine]
    state = torch.zeros(heads, P, S, dtype=sequence.dtype)
    rows = []
    for t in range(len(sequence)):
        heads_x = x[t].view(heads, P)
        state = state * (dt[t] * a).exp()[:, None, None] + dt[t][:, None, None] * heads_x[:, :, None] * b[t]
        rows.append((state @ c[t] + skip[:, None] * heads_x).flatten())
    return torch.stack(rows)


def naive(module: BidirectionalMamba2, x: torch.Tensor, pool: Grid) -> torch.Tensor:
    """x (n1, n2, n3, D) -> the same: reviews pooled before the projection, and run ahead of both directions."""
    reviews, tokens = naive_reviews(x, pool), x.flatten(0, 2)
    count = len(reviews)
    forward = causal_pass(module, torch.cat((reviews, tokens)), 0)[count:]
    backward = causal_pass(module, torch.cat((reviews.flip(0), tokens.flip(0))), 1)[count:].flip(0)
    gated = (forward + backward) * F.silu(module.in_proj(tokens)[:, :E])
    normed = gated * (gated.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * module.norm_weight
    return (normed @ module.out_proj.weight.T).view(x.shape)


@pytest.mark.parametrize(("grid", "pool"), CASES)
def test_equals_two_causal_passes(grid: Grid, pool: Grid) -> None:
    module = mamba()
    x = torch.randn(2, *grid, D, dtype=torch.float64)
    got = module(x, pool)
    for sample in range(2):
        torch.testing.assert_close(got[sample], naive(module, x[sample], pool), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("grid", "pool"), CASES)
def test_review_tokens_are_the_means_of_boxes(grid: Grid, pool: Grid) -> None:
    x = torch.randn(2, *grid, 5, dtype=torch.float64)
    got = review_tokens(x, pool)
    assert got.shape[1] == review_count(grid, pool)
    torch.testing.assert_close(got[1], naive_reviews(x[1], pool))


def changed_by(module: BidirectionalMamba2, x: torch.Tensor, change: torch.Tensor) -> list[bool]:
    """Which tokens' outputs a change of the input reaches."""
    difference = module(x + change, (2, 2, 2)) - module(x, (2, 2, 2))
    return (difference.flatten(1, 3).abs().amax(-1)[0] > 1e-9).tolist()


def test_the_last_token_reaches_the_first_through_the_reviews_alone() -> None:
    x = torch.randn(1, 2, 2, 8, D, dtype=torch.float64)
    change = torch.zeros_like(x)
    change[0, -1, -1, -1] = 1.0
    assert changed_by(forwards_only(mamba()), x, change)[0]


def test_a_change_that_no_review_sees_only_reaches_later_tokens_forwards_and_all_tokens_in_both_directions() -> None:
    x = torch.randn(1, 1, 1, 12, D, dtype=torch.float64)
    change = torch.zeros_like(x)
    change[..., 6, :], change[..., 7, :] = 1.0, -1.0  # the two tokens of one box: its mean stays
    assert changed_by(forwards_only(mamba()), x, change) == [False] * 6 + [True] * 6
    assert changed_by(mamba(), x, change) == [True] * 12


def test_starts_as_mamba2_does() -> None:
    module = BidirectionalMamba2(64, expand=2, head_dim=2, d_state=S, conv_kernel=4, chunk_size=8)
    dt, a = F.softplus(module.dt_bias), module.A_log.exp()
    assert dt.min() * 1.001 >= 1e-3 and dt.max() <= 1e-1 * 1.001 and dt.std() > 0
    assert a.min() * 1.001 >= 1.0 and a.max() <= 16.0 * 1.001 and a.std() > 0


def test_heads_must_divide_the_inner_width() -> None:
    with pytest.raises(ValueError, match="head_dim=5 must divide"):
        BidirectionalMamba2(D, expand=2, head_dim=5, d_state=S, conv_kernel=4, chunk_size=8)


def test_the_convolution_in_slices_is_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    module = mamba()
    x = torch.randn(2, 9, module.conv_weight.shape[0], dtype=torch.float64)
    whole = module._causal_conv(x)
    calls: list[int] = []
    convolve = module._convolve
    monkeypatch.setattr(module, "_convolve", lambda *part: calls.append(part[0].numel()) or convolve(*part))
    monkeypatch.setattr("lingen.models.mixers.mamba2.MAX_ELEMENTS", 200)
    torch.testing.assert_close(module._causal_conv(x), whole)
    assert len(calls) > 1 and sum(calls) == x.numel() and max(calls) <= 200
