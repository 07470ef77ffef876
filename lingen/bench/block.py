"""The whole LinGen block on one CPU thread, forward and backward: cost per token, which must not grow with the length.

Shapes: B = 1 sample, N tokens of the grid (T, H, W), D width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from lingen.bench.tables import markdown
from lingen.bench.timing import Case, interleave, median, ratio
from lingen.bench.workload import bench_config, grid_of
from lingen.kernels.index import Grid
from lingen.models import make_model
from lingen.models.block import Block


class BlockWords(BaseModel):
    """``parts`` times the block's parts too, each by itself on inputs of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Annotated[list[PositiveInt], Field(min_length=1)] = [4096, 16384, 65536]
    width: PositiveInt = 256
    head_dim: PositiveInt = 64
    d_state: PositiveInt = 64
    text_tokens: PositiveInt = 32
    layer: Annotated[int, Field(ge=0)] = 1  # of the model: its scan order, and shifted windows where it is odd
    rounds: PositiveInt = 5
    parts: bool = False


def run(words: BlockWords) -> dict[str, Any]:
    """CPU microseconds a token, and the longest length's cost a token over the shortest one's in the same round."""
    torch.set_num_threads(1)
    block = _block(words)
    tokens = sorted(set(words.tokens))
    cases: dict[str, Case] = {}
    names = ["block", *(_parts(block) if words.parts else {})]
    for count in tokens:
        calls = max(1, tokens[-1] // count)  # each measurement covers as many tokens
        cases |= {f"{name} {count}": Case(_step(words, block, name, grid_of(count)), calls) for name in names}
    seconds = interleave(cases, words.rounds)
    costs = {name: {n: median(seconds, f"{name} {n}") / n * 1e6 for n in tokens} for name in names}
    growth = {
        name: ratio(seconds, f"{name} {tokens[-1]}", f"{name} {tokens[0]}") * tokens[0] / tokens[-1] for name in names
    }
    headers = ("us a token", *(f"{n:,}" for n in tokens), f"{tokens[-1]:,} over {tokens[0]:,}")
    print(markdown(headers, [(n, *(f"{us:.2f}" for us in costs[n].values()), f"{growth[n]:.2f}") for n in names]))
    return {
        "bench": "block",
        "clock": "process CPU time, 1 thread, median of interleaved rounds",
        "torch": torch.__version__,
        **words.model_dump(),
        "tokens": tokens,
        "us_per_token": {name: [round(us, 3) for us in line.values()] for name, line in costs.items()},
        "growth": {name: round(value, 3) for name, value in growth.items()},
    }


def _block(words: BlockWords) -> Block:
    sizes = {"d_model": words.width, "head_dim": words.head_dim, "d_state": words.d_state}
    depth = f"size.depth.lingen={words.layer + 1}"
    config = bench_config("lingen", "small", *(f"size.{key}={value}" for key, value in sizes.items()), depth)
    torch.manual_seed(0)
    block = make_model(config).blocks[words.layer]
    assert isinstance(block, Block)
    return block


def _parts(block: Block) -> dict[str, nn.Module]:
    mixer = block.get_submodule("mixer")
    return {
        "MA-branch": mixer.get_submodule("ma"),
        "TE-branch": mixer.get_submodule("te"),
        "cross-attention": block.cross_attention,
        "MLP": nn.Sequential(block.mlp_in, nn.GELU(approximate="tanh"), block.mlp_out),
    }


def _step(words: BlockWords, block: Block, name: str, grid: Grid) -> Callable[[], object]:
    """Forward and backward of the block, or of the part of that name."""
    torch.manual_seed(0)
    tokens = grid[0] * grid[1] * grid[2]
    x, weight = torch.randn(2, 1, tokens, words.width)  # (1, N, D) each
    x.requires_grad_()
    text, mask = torch.randn(1, words.text_tokens, words.width), torch.ones(1, words.text_tokens, dtype=torch.bool)
    modulation = torch.randn(1, 6, words.width)
    arguments: dict[str, tuple[Any, ...]] = {
        "block": (x, grid, modulation, text, mask),
        "cross-attention": (x, text, mask),
        "MLP": (x,),
    }
    module = {"block": block, **_parts(block)}[name]

    def step() -> None:
        out: Tensor = module(*arguments.get(name, (x, grid)))
        torch.autograd.grad(out, [x, *module.parameters()], weight)

    return step
