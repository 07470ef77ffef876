"""Tiles of time and space: what they cover, that tiled equals untiled, and that memory is that of a tile."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.autoencoder_config import TileConfig
from lingen.autoencoders.base import Autoencoder
from lingen.autoencoders.pca import PcaAutoencoder
from lingen.autoencoders.tiles import TiledAutoencoder, tiled, windows
from tests.unit.lingen.autoencoders.test_tae import frozen, small, trained_in_time
from tests.vaes import RATIOS, clip, load

Saved = Callable[[str], Path]
C, T, S = 6, 4, 8


@pytest.fixture(scope="module")
def pca() -> PcaAutoencoder:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3 * T * S * S, C, generator=generator))[0].T.reshape(C, 3, T, S, S)
    mean = 0.1 * torch.randn(3, T, S, S, generator=generator)
    return PcaAutoencoder(basis.contiguous(), mean, torch.linspace(2, 1, C), "cpu")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_windows_cover_an_axis_and_overlap_enough(axis: int, overlap: float) -> None:
    for length in range(1, 30):
        for size in range(2, 12):
            found = list(windows((0, length), size, overlap, axis))
            assert found[0][0] == 0 and found[-1][1] == length
            assert all(b - a == min(size, length) for a, b in found)
            for (_, end), (begin, _) in pairwise(found):
                least = max(round(size * overlap), axis == 0)
                assert end - begin >= least
                assert len(found) <= 2 + (length - size) / (size - least)


TILES: list[dict[str, Any]] = [
    {"frames": 9},
    {"frames": 5, "overlap": 0.5},
    {"height": 16, "width": 24},
    {"frames": 13, "height": 24, "width": 16, "overlap": 0.5},
    {"frames": 9, "height": 16, "width": 16, "overlap": 0.0},
    {"frames": 101, "height": 800, "width": 800},
]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(1, 40, 56), (5, 16, 24), (33, 40, 56)])
def test_the_pca_is_exact(pca: PcaAutoencoder, tile: dict[str, Any], shape: tuple[int, int, int]) -> None:
    tiles = tiled(pca, TileConfig(**tile))
    pixels = torch.cat([clip(*shape, seed=s) for s in (0, 1)])
    latents, decoded = pca.encode(pixels), pca.decode(pca.encode(pixels))
    torch.testing.assert_close(tiles.encode(pixels), latents, atol=1e-5, rtol=0)  # rounding: other shapes, other sums
    torch.testing.assert_close(tiles.decode(latents), decoded, atol=1e-5, rtol=0)
    as_bytes = ((pixels + 1) * 127.5).to(torch.uint8)
    torch.testing.assert_close(tiles.encode(as_bytes), pca.encode(as_bytes), atol=1e-5, rtol=0)


def test_a_tiled_autoencoder_is_the_same_one(pca: PcaAutoencoder) -> None:
    assert tiled(pca, None) is pca
    tiles = TiledAutoencoder(pca, TileConfig(width=16))
    assert (tiles.channels, tiles.time, tiles.space, tiles.fingerprint) == (C, T, S, pca.fingerprint)
    with pytest.raises(ValueError, match=r"4x8x8 is not \(4\*k \+ 1\) x multiples of 8"):
        tiles.encode(torch.zeros(1, 3, 4, 8, 8))


# The relative RMS error of (latents, decoded pixels) that was measured for these small random instances, and a third
# more; the deviation within a channel is 1. What remains is what a tile cannot know: norms and attention over a whole
# frame (HunyuanVideo: over all frames; DC: linear attention), and what random weights carry further than an overlap.
IN_SPACE = {
    "AutoencoderKLWan": (0.075, 0.055),
    "AutoencoderKLHunyuanVideo": (0.15, 0.41),
    "AutoencoderKLHunyuanVideo15": (0.035, 0.026),
    "AutoencoderKLCogVideoX": (0.08, 0.18),
    "AutoencoderKLLTXVideo": (0.018, 0.025),
    "AutoencoderKLMochi": (0.17, 0.16),
    "AutoencoderKLCosmos": (0.038, 0.05),
    "AutoencoderKL": (0.075, 0.21),
    "AutoencoderDC": (0.46, 0.34),
}
IN_TIME = {
    "AutoencoderKLHunyuanVideo": (0.37, 0.78),
    "AutoencoderKLHunyuanVideo15": (0.065, 0.11),
    "AutoencoderKLLTXVideo": (0.055, 0.02),
    "AutoencoderKLMochi": (0.47, 0.003),
    "AutoencoderKLCosmos": (0.02, 0.001),
}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the deviation within a channel."""
    spread = expected - expected.mean((0, 2, 3, 4), keepdim=True)
    return float(((found - expected).square().mean() / spread.square().mean()).sqrt())


@pytest.mark.parametrize("name", IN_SPACE)
def test_tiles_of_space_are_close_to_the_whole(saved: Saved, name: str) -> None:
    _, time, space = RATIOS[name]
    whole = load(saved(name), name)
    tiles = load(saved(name), name, tile={"width": 24 * space, "overlap": 0.5})
    pixels = clip(5 if time == 4 and space == 8 else 1, 8 * space, 40 * space)
    latents = whole.encode(pixels)
    errors = error(tiles.encode(pixels), latents), error(tiles.decode(latents), whole.decode(latents))
    assert all(found < most for found, most in zip(errors, IN_SPACE[name], strict=True)), errors


@pytest.mark.parametrize("name", IN_TIME)
def test_tiles_of_time_are_close_to_the_whole(saved: Saved, name: str) -> None:
    _, time, space = RATIOS[name]
    whole = load(saved(name), name)
    tiles = load(saved(name), name, tile={"frames": 23 * time + 1, "overlap": 0.5})
    pixels = clip(31 * time + 1, 4 * space, 4 * space)
    latents = whole.encode(pixels)
    errors = error(tiles.encode(pixels), latents), error(tiles.decode(latents), whole.decode(latents))
    assert all(found < most for found, most in zip(errors, IN_TIME[name], strict=True)), errors


@pytest.mark.parametrize(
    ("tile", "shape", "most"),
    [
        ({"width": 24 * 8}, (1, 64, 40 * 8), (0.041, 0.049)),
        ({"frames": 23 * 8 + 1}, (31 * 8 + 1, 16, 16), (0.065, 0.12)),
    ],
)
def test_tiles_of_our_own_are_close_to_the_whole(
    tile: dict[str, Any], shape: tuple[int, int, int], most: tuple[float, float]
) -> None:
    whole = frozen(trained_in_time(small()))
    tiles, pixels = tiled(whole, TileConfig(**tile, overlap=0.5)), clip(*shape)
    latents = whole.encode(pixels)
    errors = error(tiles.encode(pixels), latents), error(tiles.decode(latents), whole.decode(latents))
    assert all(found < limit for found, limit in zip(errors, most, strict=True)), errors


def test_where_an_overlap_holds_the_receptive_field_tiles_are_exact(saved: Saved) -> None:
    name = "AutoencoderKLLTXVideo"  # it has no norm and no attention beyond a position
    whole = load(saved(name), name)
    for tile, shape in (
        ({"width": 56 * 32, "overlap": 0.5}, (1, 32, 80 * 32)),
        ({"frames": 8 * 63 + 1, "overlap": 0.5}, (8 * 95 + 1, 32, 32)),
    ):
        tiles = load(saved(name), name, tile=tile)
        pixels = clip(*shape)
        latents = whole.encode(pixels)
        torch.testing.assert_close(tiles.encode(pixels), latents, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tiles.decode(latents), whole.decode(latents), atol=1e-4, rtol=1e-3)


class Seen:
    """Notes the shapes that it is given; its latents and pixels are the frames' numbers."""

    channels, time, space, fingerprint = 1, 4, 8, "seen"

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.shapes.add(tuple(pixels.shape))
        return pixels[:, :1, :: self.time, :: self.space, :: self.space].float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.shapes.add(tuple(latents.shape))
        pixels = latents.repeat_interleave(self.space, 3).repeat_interleave(self.space, 4)
        return pixels.repeat_interleave(self.time, 2)[:, :, self.time - 1 :].repeat(1, 3, 1, 1, 1)


def test_no_more_than_a_tile_is_seen_at_once() -> None:
    inner = Seen()
    tiles: Autoencoder = TiledAutoencoder(inner, TileConfig(frames=17, height=32, width=48))
    pixels = torch.arange(65.0).view(1, 1, 65, 1, 1).expand(2, 3, 65, 80, 104)
    latents = tiles.encode(pixels)
    assert inner.shapes == {(2, 3, 17, 32, 48)}
    assert latents.shape == (2, 1, 17, 10, 13) and torch.equal(latents[0, 0, :, 4, 5], torch.arange(0.0, 65, 4))
    inner.shapes.clear()
    decoded = tiles.decode(latents)
    assert inner.shapes == {(2, 1, 5, 4, 6)}
    assert torch.equal(decoded, inner.decode(latents))


def test_a_seam_is_a_ramp() -> None:
    class Counting(Seen):
        """Each tile has its own number, so that what comes of two shows their shares."""

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            self.shapes.add((len(self.shapes),))
            return torch.full_like(super().encode(pixels), len(self.shapes) - 1.0)

    for tile, shape, dim in (({"width": 128}, (1, 8, 224), 4), ({"frames": 61}, (109, 8, 8), 2)):
        latents = TiledAutoencoder(Counting(), TileConfig(**tile, overlap=0.5)).encode(torch.zeros(1, 3, *shape))
        profile = latents.flatten()
        assert latents.shape[dim] == profile.numel() == 28
        steps = profile.diff()
        assert (steps >= 0).all() and steps.max() < 0.5 * profile[-1] and profile[0] < profile[-1]
