"""The checks of what a video shows agree with the captions of the rendered world, and find nothing in noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from data.checks import check_colour, check_motion, check_shape
from data.decode import decode_clip
from data.encode import encode_mp4
from data.synthetic import COLORS, MOTIONS, SHAPES, Scene, parse_caption, render_clip

CLIPS = 60


def compressed(pixels: np.ndarray) -> np.ndarray:
    """(F, S, S, 3) through H.264 and back."""
    frames, size = pixels.shape[:2]
    clip = decode_clip(encode_mp4(pixels, 8.0), frames=frames, height=size, width=size, fps=8, start=0)
    return clip.permute(1, 2, 3, 0).numpy()


def blurred(pixels: np.ndarray) -> np.ndarray:
    """About what a coarse autoencoder leaves: no detail below three pixels, and noise."""
    clip = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()  # (F, 3, S, S)
    small = torch.nn.functional.interpolate(clip, scale_factor=0.4, mode="area")
    back = torch.nn.functional.interpolate(small, size=clip.shape[-2:], mode="bicubic")
    noisy = back + 6 * torch.randn(back.shape, generator=torch.Generator().manual_seed(0))
    return noisy.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def next_of(names: dict[str, object], name: str) -> str:
    """Another one of the names."""
    every = list(names)
    return every[(every.index(name) + 1) % len(every)]


@pytest.fixture(scope="module")
def world() -> list[tuple[np.ndarray, Scene]]:
    return [
        (pixels, parse_caption(text)) for pixels, text in (render_clip(7, n, frames=17, size=64) for n in range(CLIPS))
    ]


@pytest.mark.parametrize(("degrade", "least"), [(lambda x: x, 1.0), (compressed, 0.98), (blurred, 0.95)])
def test_the_checks_agree_with_the_captions(
    world: list[tuple[np.ndarray, Scene]], degrade: Callable[[np.ndarray], np.ndarray], least: float
) -> None:
    colours = shapes = motions = wrong = 0
    for pixels, scene in world:
        assert scene.colour and scene.shape and scene.motion
        shown = degrade(pixels)
        colours += check_colour(shown, scene.colour)
        shapes += check_shape(shown, scene.shape)
        motions += check_motion(shown, scene.motion)
        assert not check_colour(shown, next_of(COLORS, scene.colour))
        wrong += check_motion(shown, next_of(MOTIONS, scene.motion))
        wrong += sum(check_shape(shown, shape) for shape in SHAPES if shape != scene.shape)
    assert colours / CLIPS >= min(least + 0.02, 1.0)
    assert shapes / CLIPS >= least and motions / CLIPS >= least and wrong / CLIPS <= 1 - least


def test_against_the_captions_of_others_the_checks_are_at_chance(world: list[tuple[np.ndarray, Scene]]) -> None:
    scenes = [scene for _, scene in world]
    pairs = [(pixels, scenes[(n + hop) % CLIPS]) for n, (pixels, _) in enumerate(world) for hop in (7, 19)]
    for check, names, asked in (
        (check_colour, COLORS, [scene.colour for _, scene in pairs]),
        (check_shape, SHAPES, [scene.shape for _, scene in pairs]),
        (check_motion, MOTIONS, [scene.motion for _, scene in pairs]),
    ):
        hits = sum(check(pixels, str(name)) for (pixels, _), name in zip(pairs, asked, strict=True)) / len(pairs)
        chance = 1 / len(names)
        assert abs(hits - chance) < 3.5 * (chance * (1 - chance) / len(pairs)) ** 0.5


def test_noise_and_grey_have_no_colour() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    faint = rng.integers(110, 140, (5, 64, 64, 3), dtype=np.uint8)
    for clip in (noise, faint, np.full((5, 64, 64, 3), 128, np.uint8)):
        assert not any(check_colour(clip, colour) for colour in COLORS)
    assert not any(check_motion(faint, motion) for motion in MOTIONS)
    assert not any(check_shape(faint, shape) for shape in SHAPES)


@pytest.mark.parametrize("size", [32, 96])
def test_a_picture_has_a_shape_at_any_size(size: int) -> None:
    for n in range(40):
        pixels, caption = render_clip(3, n, frames=1, size=size)
        assert [shape for shape in SHAPES if check_shape(pixels, shape)] == [parse_caption(caption).shape]


def test_two_colours_are_decided_by_area() -> None:
    clip = np.full((3, 40, 40, 3), 120, np.uint8)
    clip[:, :20, :20] = COLORS["red"]
    clip[:, 30:, 30:] = COLORS["blue"]
    assert check_colour(clip, "red") and not check_colour(clip, "blue")
    clip[:] = 120
    clip[:, :2, :2] = COLORS["red"]  # a speck
    assert not check_colour(clip, "red")


def test_the_checks_take_both_layouts(world: list[tuple[np.ndarray, Scene]]) -> None:
    for pixels, scene in world[:5]:
        other = torch.from_numpy(pixels).permute(3, 0, 1, 2)  # (3, F, H, W)
        assert check_colour(other, str(scene.colour)) and check_motion(other, str(scene.motion))
        assert check_shape(other, str(scene.shape))


def test_a_picture_has_a_colour_but_no_motion() -> None:
    pixels, caption = render_clip(1, 4, frames=1, size=64)
    assert check_colour(pixels, str(parse_caption(caption).colour))
    assert not any(check_motion(pixels, motion) for motion in MOTIONS)
    with pytest.raises(ValueError, match="sideways"):
        check_motion(pixels, "sideways")
    with pytest.raises(ValueError, match="heptagon"):
        check_shape(pixels, "heptagon")
