"""LinGen and DiT as whole models: one difference, any resolution, and what the arguments may be."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lingen.models.block as block_file
from lingen.compose import compose
from lingen.config import Config
from lingen.errors import UserError
from lingen.models import Backbone, make_model

NAMES = ["lingen", "dit"]
PATHS = ["name=test", "data.path=none", "autoencoder.path=none"]
TEXT_DIM = 24
SMALL = [
    "size.d_model=64",
    "size.depth={lingen: 3, dit: 3}",
    "autoencoder.channels=4",
    f"text.encoders.minilm.dim={TEXT_DIM}",
]


@cache
def config(name: str, *overrides: str) -> Config:
    return compose([f"model={name}", *PATHS, *SMALL, *overrides])


def model(name: str, *overrides: str) -> Backbone:
    """A small model whose zero-initialised weights are woken up, so that every part matters."""
    torch.manual_seed(0)
    made = make_model(config(name, *overrides))
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return made


def inputs(
    latent: tuple[int, int, int] = (3, 4, 6), batch: int = 2
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Latents, sigma, text and its mask, always the same."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(7)[None] < torch.arange(2, 2 + batch)[:, None]
    return (
        torch.randn(batch, 4, *latent, generator=generator),
        torch.rand(batch, generator=generator),
        {"minilm": torch.randn(batch, 7, TEXT_DIM, generator=generator)},
        mask,
    )


def test_the_models_differ_by_the_mixer_alone() -> None:
    shapes = [
        {key: value.shape for key, value in model(name).state_dict().items() if ".mixer." not in key} for name in NAMES
    ]
    assert shapes[0] == shapes[1]
    folder = Path(block_file.__file__).parent
    for file in ("backbone.py", "block.py", "embed.py"):
        for node in ast.walk(ast.parse((folder / file).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            assert "mixers" not in source and not any("mixers" in name for name in names), file


@pytest.mark.parametrize("name", NAMES)
def test_the_velocity_starts_at_zero_and_learns(name: str) -> None:
    made = make_model(config(name))
    arguments = inputs()
    velocity = made(*arguments)
    assert velocity.shape == arguments[0].shape and not velocity.any()
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = (made(*arguments) - arguments[0]).pow(2).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_gets_a_gradient(name: str) -> None:
    made = model(name)
    made(*inputs()).pow(2).sum().backward()
    assert [key for key, weight in made.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("latent", [(1, 2, 2), (1, 8, 8), (5, 6, 4), (9, 2, 10), (2, 22, 18)])
def test_one_model_takes_any_resolution_and_length(name: str, latent: tuple[int, int, int]) -> None:
    arguments = inputs(latent)
    velocity = model(name)(*arguments)
    assert velocity.shape == arguments[0].shape and velocity.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_see_each_other(name: str) -> None:
    made, (latents, sigma, text, mask) = model(name), inputs(batch=3)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        made(latents[order], sigma[order], {"minilm": text["minilm"][order]}, mask[order]),
        made(latents, sigma, text, mask)[order],
    )


@pytest.mark.parametrize("name", NAMES)
def test_masked_text_changes_nothing_and_text_something(name: str) -> None:
    made, (latents, sigma, text, mask) = model(name), inputs()
    velocity = made(latents, sigma, text, mask)
    masked = {name: torch.where(mask[..., None], states, 9.0) for name, states in text.items()}
    moved = {name: states + 1.0 for name, states in text.items()}
    assert torch.equal(made(latents, sigma, masked, mask), velocity)
    assert not torch.allclose(made(latents, sigma, moved, mask), velocity, atol=1e-3)
    assert not torch.allclose(made(latents, 1 - sigma, text, mask), velocity, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for on in ("false", "true"):
        made = model(name, f"engine.activation_checkpointing={on}")
        assert made.activation_checkpointing is (on == "true")
        made(*inputs()).pow(2).sum().backward()
        gradients.append([weight.grad for weight in made.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_weights(name: str) -> None:
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made = make_model(config(name))
        weights.append(torch.cat([weight.flatten() for weight in made.parameters()]))
    assert weights[0].isfinite().all()
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_allocates_nothing(name: str) -> None:
    with torch.device("meta"):
        made = make_model(config(name))
    assert all(weight.is_meta for weight in made.parameters())
    assert made.flops((5, 4, 4), {"minilm": 7}) > 0


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (0, torch.zeros(2, 3, 1, 4, 4), r"latents must be \(B, 4, T, H, W\), got \(2, 3, 1, 4, 4\)"),
        (0, torch.zeros(2, 4, 4, 4), "latents must be"),
        (0, torch.zeros(2, 4, 1, 5, 4), "latents of .* not a multiple of the patch"),
        (1, torch.zeros(2, 1), r"sigma must be \(2,\)"),
        (2, {"minilm": torch.zeros(2, 7, TEXT_DIM + 1)}, f"text of minilm must be \\(2, L, {TEXT_DIM}\\)"),
        (2, {"t5": torch.zeros(2, 7, TEXT_DIM)}, "text must have the states of minilm, got t5"),
        (3, torch.ones(2, 6, dtype=torch.bool), r"text_mask must be bool of \(2, 7\)"),
        (3, torch.ones(2, 7), "text_mask must be bool"),
    ],
)
def test_a_wrong_argument_is_named(argument: int, value: Any, message: str) -> None:
    arguments: list[Any] = list(inputs((1, 4, 4)))
    arguments[argument] = value
    with pytest.raises(ValueError, match=message):
        model("dit")(*arguments)


def test_heads_that_do_not_divide_are_the_users_to_mend() -> None:
    with pytest.raises(UserError, match=r"model\.mate\.mamba_head_dim=48 must divide"):
        make_model(config("lingen", "model.mate.mamba_head_dim=48"))
