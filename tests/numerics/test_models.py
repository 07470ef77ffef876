"""Counts and precision of the models: FLOPs as torch counts them, parameters of a size, bf16 beside fp32."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lingen.compose import compose
from lingen.config import Config
from lingen.models import make_model

NAMES = ["lingen", "dit"]
PATHS = ["name=test", "data.path=none", "autoencoder.path=none"]
TEXT_DIM, TEXT_TOKENS = 384, {"minilm": 7}
PAPER_TOKENS = {"minilm": 512}


@cache
def config(name: str, *overrides: str) -> Config:
    return compose([f"model={name}", *PATHS, *overrides])


def inputs(grid: tuple[int, int, int], batch: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, grid[0], 2 * grid[1], 2 * grid[2], generator=generator)
    text = {name: torch.randn(batch, count, TEXT_DIM, generator=generator) for name, count in TEXT_TOKENS.items()}
    return latents, torch.full((batch,), 0.3), text, torch.ones(batch, sum(TEXT_TOKENS.values()), dtype=torch.bool)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 4, 4), (5, 8, 8), (3, 11, 9), (2, 16, 16)])
def test_flops_are_what_torch_counts(name: str, grid: tuple[int, int, int]) -> None:
    model = make_model(config(name))
    # torch does not count its fused CPU attention, but does count the matmuls of the plain one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs(grid))
    assert model.flops(grid, TEXT_TOKENS) == pytest.approx(counter.get_total_flops(), rel=1e-4)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "1b", "4b"])
def test_models_of_one_size_have_as_many_parameters(size: str) -> None:
    with torch.device("meta"):
        models = [make_model(config(name, f"size={size}")) for name in NAMES]
    lingen, dit = (sum(weight.numel() for weight in model.parameters()) for model in models)
    assert abs(lingen / dit - 1) < 0.03
    if size == "4b":
        assert 3.9e9 < dit < 4.1e9


def test_the_published_flop_ratios_come_out() -> None:
    """LinGen publishes 5x, 8x and 15x at 17, 34 and 68 seconds; 512x896 pixels, 512 text tokens."""
    with torch.device("meta"):
        lingen, dit = (make_model(config(name, "size=4b")) for name in NAMES)
    grids = [(frames, 32, 56) for frames in (34, 68, 136)]
    ratios = [dit.flops(grid, PAPER_TOKENS) / lingen.flops(grid, PAPER_TOKENS) for grid in grids]
    assert ratios == pytest.approx([5, 8, 15], rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_flops_of_lingen_grow_linearly_and_of_dit_faster(name: str) -> None:
    with torch.device("meta"):
        model = make_model(config(name, "size=4b"))
    growth = model.flops((128, 32, 32), PAPER_TOKENS) / model.flops((32, 32, 32), PAPER_TOKENS)
    assert growth < 4.01 if name == "lingen" else growth > 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 4, 4), (5, 8, 8)])
def test_bf16_is_close_to_fp32_and_no_part_leaks_another_dtype(name: str, grid: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = make_model(config(name))
    with torch.no_grad():
        for weight in model.parameters():  # wake up what starts at zero, in both precisions alike
            weight.add_(0.02 * torch.randn_like(weight)).copy_(weight.bfloat16())
    arguments = inputs(grid, batch=2)
    exact = model(*arguments)
    model.to(torch.bfloat16)
    dtypes = set()

    def record(module: nn.Module, given: Any, result: Tensor) -> None:
        dtypes.add(result.dtype)

    for module in model.modules():
        if module is not model and not any(True for _ in module.children()):
            module.register_forward_hook(record)
    rough = model(*arguments)
    assert dtypes == {torch.bfloat16} and rough.dtype == torch.float32  # as the latents that came in
    assert (rough - exact).norm() < 0.03 * exact.norm()
    rough.pow(2).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
