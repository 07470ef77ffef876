"""Ranks that compute one sample together give what one rank alone gives: the velocity, and every gradient.

This file is also the program that runs in those processes (see ``work``): one launch of four serves all tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lingen.compose import compose
from lingen.config import Config
from lingen.dist import Dist, init
from lingen.errors import UserError
from lingen.models import Backbone, make_model
from lingen.models.parallel import ALONE, SequenceGroup, parallelise

WORLD, TEXT_DIM = 4, 12
WORDS = [
    "name=test", "data.path=none", "autoencoder.path=none", "autoencoder.channels=4", "size.d_model=32",
    "size.head_dim=8", "size.d_state=8", "size.mlp_ratio=2", "size.depth={lingen: 2, dit: 2}",
    f"text.encoders.minilm.dim={TEXT_DIM}",
]  # fmt: skip
LINGEN = ["model=lingen", "model.mate.mamba_head_dim=8", "model.mate.window=[2,3,3]"]
MATE = "model.mate."
MODELS = {
    "lingen": [*LINGEN, "size.depth.lingen=4"],  # four scan orders
    "lingen, recomputed": [*LINGEN, "engine.activation_checkpointing=true"],
    "dit": ["model=dit"],
    "dit, recomputed": ["model=dit", "engine.activation_checkpointing=true"],
    "separate projections": [*LINGEN, f"{MATE}projections=separate"],
    "mamba1": [*LINGEN, f"{MATE}ssm=mamba1"],
    "mamba1, separate projections": [*LINGEN, f"{MATE}ssm=mamba1", f"{MATE}projections=separate"],
    "zigzag": [*LINGEN, f"{MATE}scan=zigzag"],
    "hilbert": [*LINGEN, f"{MATE}scan=hilbert"],
    "without RMS and reviews": [*LINGEN, f"{MATE}scan=fixed", f"{MATE}review_pool=null"],
    "without TESA": [*LINGEN, f"{MATE}te=false"],
    "without the MA-branch": [*LINGEN, f"{MATE}ma=false"],
}
# Tokens that neither 2 nor 4 divides, with windows that are ragged and shifted; those that both divide; images of as
# many tokens as ranks, of fewer, and of so many that the last of four ranks has none.
GRIDS = {"odd": (3, 5, 7), "even": (2, 4, 4), "four": (1, 2, 2), "three": (1, 1, 3), "five": (1, 1, 5)}
PAIRS = [(model, "odd") for model in MODELS]
PAIRS += [(model, grid) for model in ("lingen", "dit") for grid in GRIDS if grid != "odd"]
CASES = [(ranks, *pair) for ranks in (2, 4) for pair in PAIRS]


def key(ranks: int, model: str, grid: str, dtype: torch.dtype) -> str:
    return f"{ranks} ranks, {model}, {grid}, {dtype}"


@cache
def config(name: str) -> Config:
    return compose([*WORDS, *MODELS[name]])


def make(name: str, dtype: torch.dtype) -> Backbone:
    """A model whose gates and heads are awake."""
    torch.manual_seed(0)
    model = make_model(config(name))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.to(dtype)


def run(model: Backbone, grid: tuple[int, int, int], ranks: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The velocity, and this rank's part of the gradients of a loss that all ``ranks`` compute whole."""
    generator, dtype = torch.Generator().manual_seed(1), next(model.parameters()).dtype
    latents = torch.randn(2, 4, grid[0], 2 * grid[1], 2 * grid[2], generator=generator).to(dtype)
    target = torch.randn(latents.shape, generator=generator)
    text = {"minilm": torch.randn(2, 5, TEXT_DIM, generator=generator)}
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    velocity = model(latents, torch.tensor([0.3, 0.8]), text, mask)
    ((velocity - target).square().mean() / ranks).backward()
    return velocity.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differ(found: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the greatest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The same of all gradients, as one vector, by its length."""
    apart = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm()
    return float(apart / torch.cat([gradient.flatten() for gradient in expected.values()]).norm())


def compare(dist: Dist, name: str, grid: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any] | None:
    """What the group of this rank computes beside what a rank alone computes; its first rank reports it."""
    import torch.distributed as td

    model = make(name, dtype)
    parallelise(model, SequenceGroup(dist.sequence_group, dist.sequence_rank, dist.sequence))
    velocity, gradients = run(model, grid, dist.sequence)
    least, greatest = velocity.clone(), velocity.clone()
    td.all_reduce(least, td.ReduceOp.MIN, group=dist.sequence_group)
    td.all_reduce(greatest, td.ReduceOp.MAX, group=dist.sequence_group)
    for gradient in gradients.values():
        td.all_reduce(gradient, group=dist.sequence_group)
    if dist.sequence_rank:
        return None
    expected, truth = run(make(name, dtype), grid, 1)
    return {
        "velocity": differ(velocity, expected),
        "gradient": distance(gradients, truth),
        "worst gradient": max((differ(gradients[name], gradient), name) for name, gradient in truth.items()),
        "same on all": torch.equal(least, greatest),
        "parameters": [len(gradients), len(truth), len(list(model.parameters()))],
    }


def work(out: Path) -> None:
    """Compute every case in this process and its siblings; groups of two share out the cases."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for ranks in (2, 4):
        dist = init("cpu", ranks)
        cases = [case for case in CASES if case[0] == ranks]
        for number, (_, model, grid) in enumerate(cases):
            if number % dist.data_world == dist.data_rank:
                for dtype in (torch.float32, torch.float64, torch.bfloat16):
                    found = compare(dist, model, GRIDS[grid], dtype)
                    results[key(ranks, model, grid, dtype)] = found
    first = {name: result for name, result in results.items() if result is not None}
    together = dist.gather(first)
    if dist.rank == 0:
        (out / "results.json").write_text(json.dumps({k: v for part in together for k, v in part.items()}))
    dist.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("parallel")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}"]
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID")}
    done = subprocess.run(
        [sys.executable, *launcher, __file__, str(out)],
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


@pytest.mark.parametrize(("ranks", "model", "grid"), CASES)
def test_ranks_together_compute_what_one_alone_does(results: dict[str, Any], ranks: int, model: str, grid: str) -> None:
    """In fp64 each parameter's gradient by itself. In fp32 that of the decay rates is, alone as together, a small
    difference of large sums, right to 1e-3 at best; all gradients as one vector are right to 1e-5."""
    rough, exact = (results[key(ranks, model, grid, dtype)] for dtype in (torch.float32, torch.float64))
    assert rough["velocity"] < 1e-5 and rough["gradient"] < 1e-5
    assert exact["velocity"] < 1e-12
    assert exact["worst gradient"][0] < 1e-9, exact["worst gradient"]
    assert rough["same on all"] and exact["same on all"]
    assert len(set(exact["parameters"])) == 1
    coarse = results[key(ranks, model, grid, torch.bfloat16)]
    assert coarse["velocity"] < 3e-2 and coarse["gradient"] < 3e-2 and coarse["same on all"]


@pytest.mark.parametrize(
    ("tokens", "size", "slices"),
    [
        (4, 4, [[0], [1], [2], [3]]),
        (5, 4, [[0, 1], [2, 3], [4, -1], [-1, -1]]),
        (3, 2, [[0, 1], [2, -1]]),
        (3, 1, [[0, 1, 2]]),
    ],
)
def test_slices_are_equal_and_end_in_zeros(tokens: int, size: int, slices: list[list[int]]) -> None:
    x = torch.arange(1.0, tokens + 1).expand(2, 3, tokens)
    for rank, expected in enumerate(slices):
        found = SequenceGroup(None, rank, size).slice_of(x, 2)
        assert torch.equal(found, torch.tensor(expected).add(1.0).expand(2, 3, -1))


def test_a_rank_alone_exchanges_nothing() -> None:
    x = torch.randn(2, 3, 4)
    assert ALONE.slice_of(x) is ALONE.gather(x, 3) is ALONE.to_heads(x, 3, 2) is ALONE.to_tokens(x, 2) is x
    assert ALONE.total(x) is ALONE.share_of(x, 0) is ALONE.share_of_both(x) is x


def test_what_the_ranks_do_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(1, 5, 3\); dim -1 must be a multiple of the 2 ranks"):
        SequenceGroup(None, 0, 2).cut(torch.zeros(1, 5, 3), -1)


@pytest.mark.parametrize(
    ("ranks", "words", "part"),
    [
        (3, ["model=dit"], r"sequence_parallel=3 must divide the 4 heads of attention"),
        (3, LINGEN, r"sequence_parallel=3 must divide the 4 heads of attention"),
        (4, [*LINGEN, f"{MATE}mamba_head_dim=32"], r"sequence_parallel=4 must divide the 2 heads of the Mamba"),
        (3, [*LINGEN, f"{MATE}te=false", f"{MATE}ssm=mamba1"], r"must divide the 64 channels of the Mamba"),
        (0, ["model=dit"], r"engine\.sequence_parallel"),
    ],
)
def test_ranks_must_divide_what_they_share(ranks: int, words: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        compose([*WORDS, f"engine.sequence_parallel={ranks}", *words])


def test_ranks_share_only_what_a_model_exchanges() -> None:
    words = [*LINGEN, "engine.sequence_parallel=8", f"{MATE}te=false"]  # 8 heads of the Mamba, 4 of attention
    assert compose([*WORDS, *words]).engine.sequence_parallel == 8


def test_a_group_must_divide_the_processes() -> None:
    with pytest.raises(UserError, match=r"engine\.sequence_parallel=2 must divide the number of processes, which is 1"):
        init("cpu", 2)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
