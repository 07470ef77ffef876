"""Patches, positions and conditions."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from lingen.models.embed import (
    SigmaEmbedding,
    TextEmbedding,
    TextProjection,
    patchify,
    position_embedding,
    rotary_table,
    token_spacing,
    unpatchify,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_unpatchify_inverts_patchify(patch: tuple[int, int, int]) -> None:
    grid = (2, 3, 4)
    latents = torch.randn(2, 5, *(n * side for n, side in zip(grid, patch, strict=True)))
    tokens = patchify(latents, patch)
    assert tokens.shape == (2, 24, 5 * math.prod(patch))
    assert torch.equal(unpatchify(tokens, grid, patch), latents)


def test_a_token_is_one_patch_and_tokens_run_t_then_h_then_w() -> None:
    latents = torch.arange(2 * 4 * 6).view(1, 1, 2, 4, 6)
    tokens = patchify(latents, (1, 2, 2))
    assert tokens[0, 0].tolist() == [0, 1, 6, 7]
    assert tokens[0, 1].tolist() == [2, 3, 8, 9]  # the next along W
    assert tokens[0, 3].tolist() == [12, 13, 18, 19]  # the next row
    assert tokens[0, 6].tolist() == [24, 25, 30, 31]  # the next frame


def test_a_patch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5, 4\).*patch \(1, 2, 2\)"):
        patchify(torch.zeros(1, 1, 2, 5, 4), (1, 2, 2))


def test_positions_are_distinct_within_a_grid() -> None:
    table = position_embedding((5, 8, 12), 128, torch.float32, CPU)
    assert table.shape == (5 * 8 * 12, 128)
    distances = torch.cdist(table, table) + 10 * torch.eye(len(table))
    assert distances.min() > 0.05


def test_a_higher_resolution_samples_the_same_field_more_densely() -> None:
    low = position_embedding((3, 8, 8), 96, torch.float64, CPU).view(3, 8, 8, 96)
    high = position_embedding((3, 24, 24), 96, torch.float64, CPU).view(3, 24, 24, 96)
    torch.testing.assert_close(high[:, 1::3, 1::3], low)  # the centre of each 3x3 group is the coarse token's place


def test_a_longer_video_continues_a_shorter_one() -> None:
    short = position_embedding((3, 4, 6), 64, torch.float32, CPU)
    long = position_embedding((9, 4, 6), 64, torch.float32, CPU)
    assert torch.equal(long[: len(short)], short)


def test_a_frame_has_the_same_area_at_every_shape() -> None:
    for grid in ((1, 16, 16), (1, 32, 56), (1, 4, 4)):
        assert token_spacing(grid) ** 2 * grid[1] * grid[2] == pytest.approx(256.0)


def test_rotation_keeps_lengths_and_sees_only_differences_of_positions() -> None:
    torch.manual_seed(0)
    grid, channels = (3, 4, 5), 12
    cosines, signed_sines = (side[:, 0, 0] for side in rotary_table(grid, channels, torch.float64, CPU))
    q, k = torch.randn(2, channels, dtype=torch.float64)  # the same vectors at every position
    turned_q, turned_k = (side * cosines + side.roll(channels // 2) * signed_sines for side in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(60))
    turned_q, turned_k = turned_q.view(*grid, channels), turned_k.view(*grid, channels)
    apart = turned_q[0, 0, 0] @ turned_k[1, 2, 1]
    torch.testing.assert_close(apart, turned_q[1, 1, 3] @ turned_k[2, 3, 4])  # both (1, 2, 1) apart
    assert not torch.allclose(apart, turned_q[0, 0, 0] @ turned_k[1, 1, 1])


def test_sigma_embedding_tells_close_levels_apart() -> None:
    torch.manual_seed(0)
    embedded = SigmaEmbedding(32)(torch.tensor([0.0, 0.5, 0.501, 1.0]))
    assert embedded.shape == (4, 32)
    assert (embedded[1] - embedded[2]).norm() > 1e-2 * (embedded[0] - embedded[3]).norm()


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_text_has_unit_rms_whatever_the_encoders_scale(kind: Literal["mlp", "linear"]) -> None:
    torch.manual_seed(0)
    text = 100 * torch.randn(2, 3, 24)
    projected = TextProjection(24, 64, kind)(text)
    torch.testing.assert_close(projected.pow(2).mean(-1), torch.ones(2, 3), rtol=1e-4, atol=0)


def test_several_encoders_are_one_sequence_in_their_order() -> None:
    torch.manual_seed(0)
    parts = {"t5": TextProjection(24, 64, "mlp"), "clip": TextProjection(8, 64, "linear")}
    embedding = TextEmbedding(parts)
    text = {"clip": torch.randn(2, 5, 8), "t5": torch.randn(2, 3, 24)}  # the encoders' order counts, not this one
    joined = embedding(text, torch.float32)
    assert joined.shape == (2, 8, 64)
    assert torch.equal(joined[:, :3], parts["t5"](text["t5"])) and torch.equal(
        joined[:, 3:], parts["clip"](text["clip"])
    )
    counted = {name: len(text[name][0]) for name in parts}
    assert embedding.flops(counted) == 2 * (3 * 64 * (24 + 64) + 5 * 64 * 8)
    assert {name.split(".")[0] for name, _ in embedding.named_parameters()} == {"from_t5", "from_clip"}
    embedding.check(text, torch.ones(2, 8, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match=r"text_mask must be bool of \(2, 8\)"):
        embedding.check(text, torch.ones(2, 5, dtype=torch.bool), 2)
