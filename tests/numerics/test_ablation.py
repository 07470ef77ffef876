"""Every row of the published ablation, and every other choice of MATE, from the command line to two training steps."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lingen.compose import compose
from lingen.config import Config
from lingen.engine import decay_groups
from lingen.errors import UserError
from lingen.models import Backbone, make_model

PUBLISHED_ROWS = {  # of the ablation (LinGen), in its order
    "without TESA": ["model.mate.te=false"],
    "without RMS": ["model.mate.scan=fixed"],
    "without review tokens": ["model.mate.review_pool=null"],
    "without the MA-branch": ["model.mate.ma=false"],
    "zigzag scan": ["model.mate.scan=zigzag"],
    "Hilbert scan": ["model.mate.scan=hilbert"],
    "Mamba1": ["model.mate.ssm=mamba1"],
}
CHOICES = {
    "window": ["model.mate.window=[2,4,2]"],
    "review pooling": ["model.mate.review_pool=[2,4,4]"],
    "d_state": ["size.d_state=24"],
    "expand": ["model.mate.expand=1"],
    "separate projections": ["model.mate.projections=separate"],
    "Mamba1 with separate projections": ["model.mate.ssm=mamba1", "model.mate.projections=separate"],
    "MA-branch alone, no reviews": ["model.mate.te=false", "model.mate.review_pool=null", "model.mate.scan=hilbert"],
}
ROWS = {"LinGen": []} | PUBLISHED_ROWS | CHOICES
PATHS = ["model=lingen", "name=test", "data.path=none", "autoencoder.path=none"]
SMALL = [
    "size.d_model=32",
    "size.head_dim=16",
    "size.d_state=8",
    "model.mate.mamba_head_dim=16",
    "model.mate.chunk_size=16",
    "text.encoders.minilm.dim=24",
]
LAYERS = ["size.depth={lingen: 4, dit: 4}"]  # all four orders
TEXT_DIM, TEXT_TOKENS = 24, 7
GRIDS = [(1, 4, 6), (3, 5, 7)]  # an image; a video that neither windows nor reviews divide


def config(row: str, *words: str) -> Config:
    return compose([*PATHS, *words, *ROWS[row]])


def model(row: str) -> Backbone:
    """A small model of a row, whose zero-initialised weights are woken up, so that every part matters."""
    torch.manual_seed(0)
    made = make_model(config(row, *SMALL, *LAYERS))
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return made


@cache
def parameters(row: str, size: str, *words: str) -> int:
    with torch.device("meta"):
        made = make_model(config(row, f"size={size}", *words))
    assert all(weight.is_meta for weight in made.parameters())
    return sum(weight.numel() for weight in made.parameters())


def inputs(grid: tuple[int, int, int], batch: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, grid[0], 2 * grid[1], 2 * grid[2], generator=generator)
    text = {"minilm": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator)}
    return latents, torch.full((batch,), 0.3), text, torch.ones(batch, TEXT_TOKENS, dtype=torch.bool)


@pytest.mark.parametrize("row", ROWS)
def test_trains_and_every_weight_learns(row: str) -> None:
    made, losses = model(row), []
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    for _ in range(3):
        latents, *conditions = inputs(GRIDS[1], batch=2)
        loss = (made(latents, *conditions) - latents).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        silent = [name for name, weight in made.named_parameters() if weight.grad is None or not weight.grad.any()]
        assert silent == []
        before = [weight.detach().clone() for weight in made.parameters()]
        optimizer.step()
        assert all(not torch.equal(old, new) for old, new in zip(before, made.parameters(), strict=True))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("grid", GRIDS)
def test_flops_are_what_torch_counts(row: str, grid: tuple[int, int, int]) -> None:
    made = model(row)
    # torch does not count its fused CPU attention, but does count the matmuls of the plain one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made(*inputs(grid))
    assert made.flops(grid, {"minilm": TEXT_TOKENS}) == pytest.approx(counter.get_total_flops(), rel=1e-4)


@pytest.mark.parametrize(
    "row", ["without RMS", "zigzag scan", "Hilbert scan", "without review tokens", "review pooling", "window"]
)
def test_the_same_weights_compute_something_else(row: str) -> None:
    published, made = model("LinGen"), model(row)
    made.load_state_dict(published.state_dict())
    velocity, other = (each(*inputs(GRIDS[1])) for each in (published, made))
    assert (velocity - other).norm() > 1e-3 * velocity.norm()
    same_cost = made.flops(GRIDS[1], {"minilm": TEXT_TOKENS}) == published.flops(GRIDS[1], {"minilm": TEXT_TOKENS})
    assert same_cost == ("scan" in row or "RMS" in row)


@pytest.mark.parametrize("row", ["Mamba1", "separate projections", "Mamba1 with separate projections"])
def test_bf16_is_close_to_fp32(row: str) -> None:
    made = model(row)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(weight.bfloat16())
    exact = made(*inputs(GRIDS[1]))
    rough = made.bfloat16()(*inputs(GRIDS[1]))
    assert (rough - exact).norm() < 0.03 * exact.norm()
    rough.pow(2).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in made.parameters())


@pytest.mark.parametrize("row", ROWS)
def test_one_token_is_a_video_too(row: str) -> None:
    made = model(row)
    with torch.inference_mode():
        made(*inputs((1, 1, 1)))
    velocity = made(*inputs((1, 1, 1)))
    velocity.pow(2).sum().backward()
    assert velocity.isfinite().all()


def expected_change(row: str, d: int, layers: int) -> int:
    """Parameters of a row beyond LinGen's, at width d: E = 2d, heads of 64, d_state 64, convolution of 4."""
    inner, state, heads, rank = 2 * d, 64, 2 * d // 64, math.ceil(d / 16)
    mamba2_in, mamba2_own = d * (2 * inner + 2 * state + heads), 2 * (inner + 2 * state) * 5 + 6 * heads + inner
    mamba1_own = 2 * inner * 5 + 2 * inner * (2 * rank + 2 * state + 2 + state) + inner
    mamba2, mamba1 = mamba2_in + mamba2_own + inner * d, 2 * d * inner + mamba1_own + inner * d
    half = d // 64
    changes = {
        "without TESA": -(4 * d * d + 2 * 64),
        "without the MA-branch": -mamba2,
        "Mamba1": mamba1 - mamba2,
        "expand": -(3 * d * d + d * half + 2 * d * 5 + 6 * half + d),
        "separate projections": mamba2_in + inner + inner * d,
        "Mamba1 with separate projections": mamba1 - mamba2 + 2 * d * inner + inner + inner * d,
        "d_state": (24 - state) * 2 * (d + 2 * 5),
        "MA-branch alone, no reviews": -(4 * d * d + 2 * 64),
    }
    return layers * changes.get(row, 0)


@pytest.mark.parametrize("row", ROWS)
def test_parameters_at_4b_are_what_the_widths_say(row: str) -> None:
    assert parameters(row, "4b") - parameters("LinGen", "4b") == expected_change(row, 2048, 43)


def test_decay_rates_are_not_weights_to_decay() -> None:
    decayed, plain = (names for _, names in decay_groups(model("Mamba1")))
    assert not any(name.endswith("A_log") for name in decayed)
    assert sum(name.endswith("A_log") for name in plain) == 4


def test_no_branch_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.mate\.ma=false and model\.mate\.te=false leave no mixer"):
        compose([*PATHS, "model.mate.ma=false", "model.mate.te=false"])


@pytest.mark.parametrize("word", ["scan=hilbert", "ssm=mamba1", "projections=separate", "review_pool=null"])
def test_choices_of_a_branch_that_is_not_there_are_refused(word: str) -> None:
    """Else two rows would have two names and one model."""
    with pytest.raises(UserError, match=rf"^model\.mate\.{word.split('=')[0]} is of the MA-branch, which [^\n]*$"):
        compose([*PATHS, "model.mate.ma=false", f"model.mate.{word}"])


@pytest.mark.parametrize("row", ["without the MA-branch", "Mamba1"])
def test_heads_of_mamba2_need_not_fit_where_there_are_none(row: str) -> None:
    heads = "model.mate.mamba_head_dim=48"
    assert expected_change(row, 2048, 43) == parameters(row, "4b", heads) - parameters("LinGen", "4b")
    with pytest.raises(UserError, match=r"mamba_head_dim=48 must divide"):
        config("LinGen", heads)


def test_the_page_on_the_models_names_the_words_of_each_row() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
    assert [word for words in PUBLISHED_ROWS.values() for word in words if f"`{word}`" not in page] == []
