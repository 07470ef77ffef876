"""Guidance: what its two modes ask of the model, and that they agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lingen.compose import compose
from lingen.models import Backbone, make_model
from lingen.sampling.call import Call
from lingen.sampling.guidance import contexts, forward_of, guided
from lingen.text.join import Text

CPU = torch.device("cpu")
CALL = Call(index=3, count=9, sigma=0.5, step=3)


@pytest.fixture(scope="module", params=["lingen", "dit"])
def model(request: pytest.FixtureRequest) -> Backbone:
    """A small model whose zero-initialised weights are woken up."""
    small = [
        "size.d_model=64",
        "size.depth={lingen: 2, dit: 2}",
        "autoencoder.channels=4",
        "text.encoders.minilm.dim=24",
    ]
    torch.manual_seed(0)
    made = make_model(compose([f"model={request.param}", "name=x", "data.path=x", "autoencoder.path=x", *small]))
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return made


def draw(seed: int) -> tuple[torch.Tensor, Text]:
    """Latents and text of two samples."""
    random = torch.Generator().manual_seed(seed)
    text = {"minilm": torch.randn(2, 5, 24, generator=random)}, torch.arange(5)[None] < torch.tensor([[3], [5]])
    return torch.randn(2, 4, 3, 4, 6, generator=random), text


@torch.no_grad()
def test_one_batch_and_two_passes_agree(model: Backbone) -> None:
    (x, text), (_, negative), sigma = draw(0), draw(1), torch.full((2,), 0.5)
    found = []
    modes: tuple[Any, ...] = "batch", "two_passes"
    for mode in modes:
        denoise = guided(forward_of(model), text, negative, 5.0, device=CPU, dtype=torch.float32, mode=mode)
        found.append(denoise(x, sigma, CALL))
    wanted, unwanted = model(x, sigma, *text), model(x, sigma, *negative)
    for velocity in found:
        assert torch.allclose(velocity, unwanted + 5 * (wanted - unwanted), atol=1e-4)
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert (wanted - unwanted).abs().max() > 0.01


@pytest.mark.parametrize(
    ("scale", "mode", "expected"),
    [
        (5.0, "batch", [("pair", 4)]),
        (5.0, "two_passes", [("text", 2), ("negative", 2)]),
        (1.0, "batch", [("text", 2)]),
        (1.0, "two_passes", [("text", 2)]),
    ],
)
def test_each_forward_is_told_its_call_and_context(scale: float, mode: Any, expected: list[tuple[str, int]]) -> None:
    seen: list[tuple[Call, int]] = []

    def forward(latents: torch.Tensor, sigma: torch.Tensor, text: Any, mask: torch.Tensor, call: Call) -> torch.Tensor:
        assert len(latents) == len(sigma) == len(text["minilm"]) == len(mask)
        assert latents.dtype == text["minilm"].dtype == torch.bfloat16
        seen.append((call, len(latents)))
        return latents

    (x, text), (_, negative) = draw(0), draw(1)
    denoise = guided(forward, text, negative, scale, device=CPU, dtype=torch.bfloat16, mode=mode)
    assert denoise(x, torch.full((2,), 0.5), CALL).dtype == torch.float32
    assert [(call.context, rows) for call, rows in seen] == expected
    assert {(call.index, call.count, call.sigma, call.step) for call, _ in seen} == {(3, 9, 0.5, 3)}
    assert tuple(name for name, _ in expected) == contexts(scale, mode)
