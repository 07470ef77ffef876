"""No launch of mamba-ssm's kernels passes 2^31 - 1 at any stage of the published ladder, on shapes and strides alone.

The stages and their buckets are those of conf/stage, the mixer is the 4B model's on the meta device, with review
tokens. How far each launch reaches is ``largest_offsets``; that it covers every tensor of every kernel is shown in
test_ssd_mamba.py, on what was launched.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lingen.compose import compose
from lingen.config import token_grid
from lingen.kernels.index import Grid
from lingen.kernels.ssd_mamba import MAX_GRID, MAX_OFFSET, largest_offsets, piece
from lingen.models.build import MIXERS
from lingen.models.mixers import mamba2

CONF = Path(__file__).resolve().parents[3] / "conf"
PUBLISHED = sorted(path.stem for path in (CONF / "stage").glob("*.yaml") if not path.stem.startswith("demo"))
WORDS = ["experiment=paper_4b", "model=lingen", "name=x", "data.path=shards", "autoencoder.path=autoencoder"]
CHUNK = 64


def buckets(stage: str, config: Any) -> list[Grid]:
    """The token grids of a stage."""
    tree = yaml.safe_load((CONF / "stage" / f"{stage}.yaml").read_text())
    return [token_grid(config, b["frames"], b["height"], b["width"]) for b in tree["buckets"]]


def handed_to_the_scan(
    monkeypatch: pytest.MonkeyPatch, config: Any, grid: Grid, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dt, B and C with the strides that the mixer gives them where the convolution is the fused one."""
    handed: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def scan_conv(tokens: Tensor, reviews: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
        return weight.new_empty(batch, reviews.shape[1] + tokens.shape[1], weight.shape[0])

    def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int, D: Tensor) -> Tensor:
        assert chunk_size == CHUNK
        handed.append((x, dt, B, C))
        return x.new_empty(x.shape)

    monkeypatch.setattr(mamba2, "scan_conv", scan_conv)
    monkeypatch.setattr(mamba2, "ssd", ssd)
    with torch.device("meta"):
        mixer = MIXERS["lingen"](config, 0)
        mixer.ma(torch.empty(batch, math.prod(grid), config.size.d_model), grid)
    return handed[0]


def launches(batch: int, length: int, samples: int, tokens: int) -> int:
    return -(-batch // samples) * -(-length // tokens)


def fewest_launches(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> int:
    """By trying every number of samples, and ever shorter pieces of the sequence."""
    batch, length = x.shape[:2]
    chunks, fewest = -(-length // CHUNK), batch * length
    for samples in range(1, batch + 1):
        for cuts in range(1, fewest // -(-batch // samples) + 1):
            tokens = min(-(-chunks // cuts) * CHUNK, length)
            if max(largest_offsets(x, dt, B, C, CHUNK, samples, tokens).values()) <= MAX_OFFSET:
                fewest = min(fewest, launches(batch, length, samples, tokens))
                break
    return fewest


@pytest.mark.parametrize("d_state", [64, 128])
@pytest.mark.parametrize("stage", PUBLISHED)
def test_no_launch_passes_the_limit_and_there_are_as_few_as_can_be(
    stage: str, d_state: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([*WORDS, f"size.d_state={d_state}"])
    for grid in buckets(stage, config):
        for batch in (1, 2, 3, 64):  # 2: guidance
            given = handed_to_the_scan(monkeypatch, config, grid, batch)
            samples, tokens = piece(*given, CHUNK, MAX_OFFSET)
            reached = largest_offsets(*given, CHUNK, samples, tokens)
            assert max(reached.values()) <= 2**31 - 1, (grid, batch, reached)
            assert samples * -(-tokens // CHUNK) <= MAX_GRID
            length = given[0].shape[1]
            assert tokens == length or tokens % CHUNK == 0
            assert launches(batch, length, samples, tokens) == fewest_launches(*given), (grid, batch)


@pytest.mark.parametrize(
    ("frames", "batch", "d_state", "expected"),
    [
        (265, 1, 64, 1),  # 17 s
        (265, 2, 64, 1),
        (265, 2, 128, 2),  # a chunk's states are twice as large as its x
        (537, 1, 64, 1),  # 34 s
        (537, 2, 64, 2),  # a sample a launch
        (537, 1, 128, 2),
        (1081, 1, 64, 2),  # 68 s
        (1081, 2, 64, 4),
    ],
)
def test_launches_at_512p(
    frames: int, batch: int, d_state: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([*WORDS, f"size.d_state={d_state}"])
    given = handed_to_the_scan(monkeypatch, config, token_grid(config, frames, 512, 896), batch)
    length = given[0].shape[1]
    uncut = max(largest_offsets(*given, CHUNK, batch, length).values())
    assert (uncut <= MAX_OFFSET) == (expected == 1)
    assert launches(batch, length, *piece(*given, CHUNK, MAX_OFFSET)) == expected


def test_a_launch_has_no_more_programs_than_a_grid_can_have() -> None:
    """Short chunks of a narrow model: far fewer elements than 2^31, but more chunks than an axis of the grid takes."""
    x, dt = torch.empty(1, 300_000, 2, 16, device="meta"), torch.empty(1, 300_000, 2, device="meta")
    B = torch.empty(1, 300_000, 2, 16, device="meta")
    samples, tokens = piece(x, dt, B, B, 4, MAX_OFFSET)
    assert samples == 1 and tokens // 4 * 2 <= MAX_GRID < tokens // 4 * 2 + 2


def test_what_cannot_be_addressed_is_named() -> None:
    x, dt = torch.empty(1, 64, 2, 2**25, device="meta"), torch.empty(1, 64, 2, device="meta")
    B = torch.empty(1, 64, 2, 16, device="meta")
    with pytest.raises(ValueError, match=r"x \(1, 64, 2, 33554432\) with strides .*a chunk of chunk_size=64 tokens"):
        piece(x, dt, B, B, 64, MAX_OFFSET)
