"""A whole LinGen with its kernels in Triton beside the same in torch: velocity and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lingen.compose import compose
from lingen.kernels import forms
from lingen.models import Backbone, make_model

CPU = torch.device("cpu")
KERNELS = ("conv", "norm", "window")
TINY = [
    *("model=lingen", "name=test", "data.path=none", "autoencoder.path=none", "autoencoder.channels=4"),
    *("size.d_model=16", "size.head_dim=16", "size.d_state=4", "size.mlp_ratio=1"),
    *(
        "model.mate.mamba_head_dim=16",
        "model.mate.chunk_size=16",
        "model.mate.window=[2,2,4]",
        "text.encoders.minilm.dim=8",
    ),
]
# Layers 0 to 3 have all four orders, and windows that are shifted on odd ones.
CASES = [
    pytest.param((1, 2, 5), 1, 4, [], id="an image"),
    pytest.param((3, 2, 5), 1, 4, [], id="a video that neither windows nor reviews divide"),
    pytest.param((3, 2, 5), 1, 2, ["model.mate.projections=separate", "model.mate.scan=zigzag"], id="separate, zigzag"),
    pytest.param((1, 2, 5), 2, 2, ["model.mate.ssm=mamba1", "model.mate.review_pool=null"], id="Mamba1, no reviews"),
]


@pytest.fixture(autouse=True)
def forget_the_forms() -> Iterator[None]:
    yield
    forms.ask({}, CPU)


def results(model: Backbone, arguments: tuple[Any, ...], form: str) -> dict[str, Tensor]:
    """The velocity, and the gradients of the latents and of every weight."""
    forms.ask(dict.fromkeys(KERNELS, form), CPU)
    assert all(forms.chosen(kernel, CPU) == form for kernel in KERNELS)
    latents = arguments[0].clone().requires_grad_()
    model.zero_grad()
    velocity = model(latents, *arguments[1:])
    velocity.pow(2).sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    return {"velocity": velocity.detach(), "latents": latents.grad, **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize(("grid", "batch", "layers", "words"), CASES)
def test_triton_and_torch_agree(grid: tuple[int, int, int], batch: int, layers: int, words: list[str]) -> None:
    torch.manual_seed(0)
    depth = f"size.depth={{lingen: {layers}, dit: {layers}}}"
    model = make_model(compose([*TINY, depth, *words]))
    with torch.no_grad():
        for weight in model.parameters():  # wake up what starts at zero
            weight.add_(0.05 * torch.randn_like(weight))
    latents = torch.randn(batch, 4, grid[0], 2 * grid[1], 2 * grid[2])
    text = {"minilm": torch.randn(batch, 3, 8)}
    arguments = (latents, torch.rand(batch), text, torch.ones(batch, 3, dtype=torch.bool))
    want, got = (results(model, arguments, form) for form in ("torch", "triton"))
    largest = max(gradient.abs().max() for gradient in want.values())
    for name, tensor in want.items():
        # Decay rates' gradients are small differences of large sums, whence the second term.
        allowed = 1e-5 * tensor.abs().max() + 1e-7 * largest
        assert tensor.abs().max() > 0 and (got[name] - tensor).abs().max() <= allowed, name
