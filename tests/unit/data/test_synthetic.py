"""The rendered world: captions say what is shown, the checks agree with them, and equal seeds give equal files."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data.decode import decode_clip, probe
from data.encode import encode_mp4
from data.synthetic import (
    CAMERAS,
    COLORS,
    MOTIONS,
    SHAPES,
    Scene,
    main,
    parse_caption,
    render_clip,
    write_world,
)
from lingen.errors import UserError

CLIPS = 60


def compressed(pixels: np.ndarray) -> np.ndarray:
    """(F, S, S, 3) through H.264 and back."""
    frames, size = pixels.shape[:2]
    media = encode_mp4(pixels, 8.0)
    clip = decode_clip(media, frames=frames, height=size, width=size, fps=8, start=0)
    return clip.permute(1, 2, 3, 0).numpy()


@pytest.fixture(scope="module")
def world() -> list[tuple[np.ndarray, Scene]]:
    return [
        (pixels, parse_caption(text)) for pixels, text in (render_clip(7, n, frames=17, size=64) for n in range(CLIPS))
    ]


def test_captions_name_everything(world: list[tuple[np.ndarray, Scene]]) -> None:
    scenes = [scene for _, scene in world]
    assert {scene.colour for scene in scenes} == set(COLORS)
    assert {scene.shape for scene in scenes} == set(SHAPES)
    assert {scene.motion for scene in scenes} == set(MOTIONS)
    assert {scene.camera for scene in scenes} == set(CAMERAS)
    _, caption = render_clip(7, 0, frames=1, size=64)
    picture = parse_caption(caption)
    assert picture.colour in COLORS and picture.shape in SHAPES and picture.motion is None and picture.camera is None


def test_a_world_has_the_backgrounds_that_it_is_asked_for() -> None:
    said = [render_clip(7, n, frames=9, size=16, backgrounds=["plain", "gradient"])[1] for n in range(60)]
    assert any("on a smooth gradient" in one for one in said) and any("on a plain background" in one for one in said)
    assert not any("textured" in one or "pans" in one or "zooms" in one for one in said)
    with pytest.raises(UserError, match="backgrounds"):
        main(["out=nowhere", "backgrounds=[striped]"])


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a red circle moving left", Scene("red", "circle", "left", "static")),
        ("A BLUE star drifting right while the camera pans left", Scene("blue", "star", "right", "pan left")),
        ("an orange square not moving, the camera zooms in", Scene("orange", "square", "still", "zoom in")),
        ("a picture of a pink triangle on a smooth gradient", Scene("pink", "triangle", None, None)),
        ("the green circle floating upwards", Scene("green", "circle", "up", "static")),
        ("nothing that we know", Scene(None, None, None, None)),
    ],
)
def test_parse_caption(caption: str, scene: Scene) -> None:
    assert parse_caption(caption) == scene


def test_every_phrase_means_one_motion() -> None:
    for (motion, phrases), (_, cameras) in product(MOTIONS.items(), CAMERAS.items()):
        for phrase, camera in product(phrases, cameras):
            assert parse_caption(f"a red star {phrase} on a smooth gradient{camera}").motion == motion


@pytest.mark.parametrize(("frames", "size"), [(1, 32), (9, 48), (33, 128)])
def test_other_sizes(frames: int, size: int) -> None:
    pixels, _ = render_clip(0, 3, frames=frames, size=size)
    assert pixels.shape == (frames, size, size, 3) and pixels.dtype == np.uint8
    again, _ = render_clip(0, 3, frames=frames, size=size)
    assert (pixels == again).all()
    assert (render_clip(1, 3, frames=frames, size=size)[0] != pixels).any()


def test_compression_is_mild(world: list[tuple[np.ndarray, Scene]]) -> None:
    errors = [((compressed(pixels).astype(float) - pixels) ** 2).mean() for pixels, _ in world[:20]]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 31  # what is left is the halved resolution of colour


def test_write_world_is_deterministic(tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 2)):
        write_world(tmp_path / name, clips=5, images=3, size=32, frames=9, fps=8, seed=4, workers=workers)
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    assert sorted(files)[:2] == ["clip-00000.mp4", "clip-00000.txt"] and len(files) == 16
    info = probe(files["clip-00002.mp4"])
    assert (info.frames, info.height, info.width) == (9, 32, 32) and info.fps == pytest.approx(8)
    assert probe(files["image-00001.png"]).frames == 1
    with pytest.raises(UserError, match="exists"):
        write_world(tmp_path / "a", clips=1, images=0, size=32, frames=9, fps=8, seed=4)
    with pytest.raises(UserError, match="size=33 is odd"):
        write_world(tmp_path / "c", clips=1, images=0, size=33, frames=9, fps=8, seed=4)


def test_a_world_is_written_beside_nothing_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp/mine").write_text("mine")
    main([f"out={tmp_path}/a", "clips=1", "images=0", "size=32", "frames=2", "workers=1"])
    assert (tmp_path / "a.tmp/mine").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "a.tmp"]  # nothing is left over
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "a.tmp").stat().st_mode
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, message in (("a.tmp/mine/x", "cannot be written"), ("a.tmp/mine", "exists"), ("link", "exists")):
        with pytest.raises(UserError, match=f"out=.*{place} {message}"):
            main([f"out={tmp_path}/{place}", "clips=1", "images=0"])


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["seed=-1"], "seed=-1"),
        (["clips=-1"], "clips=-1"),
        (["images=-1"], "images=-1"),
        (["clips=0", "images=0"], "clips=0 images=0"),
        (["frames=1", "clips=2", "images=2"], "frames=1"),
        (["fps=.inf"], "fps=inf"),
        (["fps=1e-9"], "fps=1e-9"),
        (["size=0"], "size=0"),
    ],
)
def test_worlds_that_cannot_be(tmp_path: Path, words: list[str], key: str) -> None:
    with pytest.raises(UserError, match=key):
        main([f"out={tmp_path}/world", *words])
    assert not list(tmp_path.iterdir())
