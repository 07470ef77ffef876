"""The embedded world: rendered clips of one coloured shape that moves over a muted background, with captions.

The shape's colour is saturated and the background's never is, so a mask of saturated pixels finds the shape, and the
asked colour, shape and motion can be checked on any video, rendered or generated (data/checks.py). The motion is what
one sees on the screen; the camera moves the background behind it, as in a tracking shot.

Shapes: F frames, S pixels a side.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from rich.progress import track

from data.encode import encode_mp4
from lingen.compose import parse
from lingen.errors import UserError, run_main

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 25),
    "orange": (245, 135, 10),
    "yellow": (235, 225, 20),
    "green": (25, 190, 40),
    "cyan": (20, 215, 220),
    "blue": (30, 60, 235),
    "purple": (135, 30, 220),
    "pink": (245, 40, 165),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS: dict[str, tuple[str, ...]] = {
    "left": ("moving left", "sliding to the left", "drifting left"),
    "right": ("moving right", "sliding to the right", "drifting right"),
    "up": ("moving up", "rising", "floating upwards"),
    "down": ("moving down", "falling", "sinking downwards"),
    "growing": ("growing", "getting bigger", "expanding"),
    "spinning": ("spinning", "rotating", "turning around"),
    "still": ("standing still", "not moving", "staying in place"),
}
CAMERAS: dict[str, tuple[str, ...]] = {
    "static": ("", ", static camera"),
    "pan left": (", the camera pans left", " while the camera pans left"),
    "pan right": (", the camera pans right", " while the camera pans right"),
    "zoom in": (", the camera zooms in", " while the camera zooms in"),
}
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "plain": ("", " on a plain background"),
    "gradient": ("", " on a smooth gradient"),
    "textured": ("", " on a textured background"),
}
SHARES = {"plain": 0.25, "gradient": 0.25, "textured": 0.5}  # of the clips
SUBJECTS = ("a {}", "one {}", "the {}", "a video of a {}")
STILL_SUBJECTS = ("a {}", "one {}", "the {}", "a picture of a {}")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # (x, y), y downwards


Backgrounds = Annotated[list[Literal["plain", "gradient", "textured"]], Field(min_length=1)]


class Scene(NamedTuple):
    """What a caption says. ``motion`` and ``camera`` are None for a picture, or where a caption does not say."""

    colour: str | None
    shape: str | None
    motion: str | None
    camera: str | None


def parse_caption(caption: str) -> Scene:
    """The attributes that a caption names; those it does not name are None."""
    text = caption.lower()
    camera = next((name for name, phrases in CAMERAS.items() if any(p and p in text for p in phrases)), None)
    for phrase in (p for phrases in CAMERAS.values() for p in phrases if p):
        text = text.replace(phrase, "")

    def named(names: dict[str, tuple[str, ...]]) -> str | None:
        return next((n for n, phrases in names.items() if any(re.search(rf"\b{p}\b", text) for p in phrases)), None)

    motion = named(MOTIONS)
    if motion is not None and camera is None:
        camera = "static"
    return Scene(named({c: (c,) for c in COLORS}), named({s: (s,) for s in SHAPES}), motion, camera)


def render_clip(
    seed: int, number: int, *, frames: int, size: int, backgrounds: Sequence[str] = tuple(BACKGROUNDS)
) -> tuple[Pixels, str]:
    """Clip ``number`` of the world ``seed``: (F, S, S, 3) uint8 and its caption. One frame makes a picture. Only
    textured ``backgrounds`` show how the camera moves."""
    rng = np.random.default_rng((seed, number, frames))
    colour, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
    motions = [motion for motion in MOTIONS if (shape, motion) != ("circle", "spinning")]  # a circle spins unseen
    motion = str(rng.choice(motions)) if frames > 1 else None
    shares = np.array([SHARES[kind] for kind in backgrounds])
    background = str(rng.choice(list(backgrounds), p=shares / shares.sum()))
    moves = background == "textured" and motion is not None  # elsewhere a camera's move would not be seen
    camera = str(rng.choice(list(CAMERAS), p=(0.4, 0.2, 0.2, 0.2))) if moves else "static"
    caption = _describe(rng, Scene(colour, shape, motion, camera), background)
    time = np.linspace(0.0, 1.0, frames, dtype=np.float32) if frames > 1 else np.zeros(1, np.float32)  # (F,)
    behind = _background(rng, background, camera, time, size)  # (F, S, S, 3)
    coverage = _shape_mask(rng, shape, motion, time, size)[..., None]  # (F, S, S, 1)
    paint = np.array(COLORS[colour], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)  # (3,)
    pixels = behind + coverage * (paint - behind)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8), caption


def _describe(rng: np.random.Generator, scene: Scene, background: str) -> str:
    def one(phrases: tuple[str, ...]) -> str:
        return str(rng.choice(phrases))

    subject = one(SUBJECTS if scene.motion else STILL_SUBJECTS).format(f"{scene.colour} {scene.shape}")
    subject = re.sub(r"\ba(?= orange)", "an", subject)
    if scene.motion is None:
        return subject + one(BACKGROUNDS[background])
    return (
        f"{subject} {one(MOTIONS[scene.motion])}{one(BACKGROUNDS[background])}{one(CAMERAS[scene.camera or 'static'])}"
    )


def _background(rng: np.random.Generator, kind: str, camera: str, time: Floats, size: int) -> Floats:
    """(F, S, S, 3) or, where nothing moves, (1, S, S, 3): greys with a slight tint."""
    grey = rng.uniform(60, 190)
    tint = rng.uniform(-10, 10, 3).astype(np.float32)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1  # (S,) in (-1, 1)
    if kind == "plain":
        return np.broadcast_to(np.asarray(grey + tint, np.float32), (1, size, size, 3))
    if kind == "gradient":
        angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(15, 40)
        ramp = depth * (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None])  # (S, S)
        return np.asarray(np.clip(grey + ramp, 20, 235)[None, ..., None] + tint, np.float32)
    zoom = 1 / (1 + 0.6 * time) if camera == "zoom in" else np.ones_like(time)  # (F,)
    shift = 0.9 * time * {"pan left": -1, "pan right": 1}.get(camera, 0)  # (F,) where the camera looks
    texture = np.zeros((len(time), size, size), np.float32)  # (F, S, S)
    for _ in range(4):  # a few waves across; separable, so a frame costs two rows of cosines and one product
        wave_x, wave_y = rng.uniform(2, 9, 2)
        phase_x, phase_y = rng.uniform(0, 2 * np.pi, 2)
        across = np.cos(wave_x * (axis * zoom[:, None] + shift[:, None]) + phase_x)  # (F, S)
        along = np.cos(wave_y * axis * zoom[:, None] + phase_y)  # (F, S)
        texture += (along[:, :, None] * across[:, None, :]).astype(np.float32)
    if camera == "static":
        texture = texture[:1]
    return np.asarray(np.clip(grey + rng.uniform(7, 14) * texture, 20, 235)[..., None] + tint, np.float32)


def _shape_mask(rng: np.random.Generator, shape: str, motion: str | None, time: Floats, size: int) -> Floats:
    """How much of each pixel the shape covers: (F, S, S) in [0, 1], anti-aliased."""
    radius = rng.uniform(0.26, 0.36)  # of half the screen
    travel = rng.uniform(0.7, 1.0)
    x, y = rng.uniform(-0.35, 0.35, 2)
    dx, dy = DIRECTIONS.get(motion or "", (0.0, 0.0))
    if dx or dy:  # along its way the shape passes the middle of the screen
        x, y = x * (dx == 0) - dx * travel / 2, y * (dy == 0) - dy * travel / 2
    radii = radius * (0.65 + 0.85 * time) if motion == "growing" else np.full_like(time, radius)  # (F,)
    turn = rng.uniform(0, 2 * np.pi) + (rng.choice((-1, 1)) * 2.4 * time if motion == "spinning" else 0 * time)  # (F,)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1  # (S,)
    across = axis - (x + dx * travel * time)[:, None].astype(np.float32)  # (F, S)
    along = axis - (y + dy * travel * time)[:, None].astype(np.float32)  # (F, S)
    distance = np.hypot(across[:, None, :], along[:, :, None])  # (F, S, S) from the shape's middle
    edge: Floats = radii[:, None, None].astype(np.float32)  # (F, 1, 1), or (F, S, S) where it depends on the angle
    if shape != "circle":
        angle = np.arctan2(along[:, :, None], across[:, None, :]) + turn[:, None, None].astype(np.float32)
        edge = edge * _outline(shape, angle)
    return np.asarray(np.clip((edge - distance) * (size / 2) + 0.5, 0, 1), np.float32)


def _outline(shape: str, angle: Floats) -> Floats:
    """Distance from the middle to the edge at each angle; areas are about those of a circle of radius 1."""
    if shape == "star":
        point = np.abs(np.mod(angle, 2 * np.pi / 5) * (5 / np.pi) - 1)  # 0 between two points, 1 at a point
        return np.asarray(0.62 + 0.83 * point**2, np.float32)
    corners, scale = {"square": (4, 1.25), "triangle": (3, 1.5)}[shape]
    half = np.pi / corners
    return np.asarray(scale * np.cos(half) / np.cos(np.mod(angle, 2 * half) - half), np.float32)


def write_world(
    out: str | Path,
    *,
    clips: int,
    images: int,
    size: int,
    frames: int,
    fps: float,
    seed: int,
    backgrounds: Sequence[str] = tuple(BACKGROUNDS),
    workers: int = 1,
) -> None:
    """Write clip-00000.mp4 ..., image-00000.png ..., each with a .txt beside it. Equal arguments give equal pixels.

    Raises:
        UserError: ``out`` exists or cannot be written, or ``size`` is odd (H.264 halves the resolution of colour).
    """
    folder = Path(out)
    if os.path.lexists(folder):
        raise UserError(f"out={out} exists; choose another folder, or remove this one to render it again")
    if size % 2:
        raise UserError(f"size={size} is odd, and H.264 needs it even; try {size + 1}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rendering-", dir=folder.parent) as beside:
            aside = Path(beside) / "world"
            aside.mkdir()
            jobs = [_Job(aside, seed, number, frames, size, fps, backgrounds) for number in range(clips)]
            jobs += [_Job(aside, seed, number, 1, size, fps, backgrounds) for number in range(images)]
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for _ in track(pool.imap_unordered(_write_one, jobs, chunksize=8), "rendering", total=len(jobs)):
                    pass
            aside.rename(folder)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error}") from error


class _Job(NamedTuple):
    folder: Path
    seed: int
    number: int
    frames: int
    size: int
    fps: float
    backgrounds: Sequence[str]


def _write_one(job: _Job) -> None:
    pixels, caption = render_clip(job.seed, job.number, frames=job.frames, size=job.size, backgrounds=job.backgrounds)
    name = f"{'clip' if job.frames > 1 else 'image'}-{job.number:05d}"
    if job.frames > 1:
        (job.folder / f"{name}.mp4").write_bytes(encode_mp4(pixels, job.fps))
    else:
        Image.fromarray(pixels[0]).save(job.folder / f"{name}.png")
    (job.folder / f"{name}.txt").write_text(caption + "\n")


class _Words(BaseModel):
    model_config = ConfigDict(extra="forbid")
    out: str
    clips: NonNegativeInt = 1000
    images: NonNegativeInt = 500
    size: PositiveInt = 64
    frames: int = Field(17, ge=2)  # of a clip; an image has one
    fps: float = Field(8.0, ge=0.1, le=1000)
    seed: NonNegativeInt = 0
    backgrounds: Backgrounds = ["plain", "gradient", "textured"]
    workers: PositiveInt = os.cpu_count() or 1

    @model_validator(mode="after")
    def _not_empty(self) -> _Words:
        if not self.clips + self.images:
            raise ValueError("clips=0 images=0 is an empty world; ask for one clip or image at least")
        return self


def main(words: list[str]) -> int:
    """``python -m data.synthetic out=DIR clips=1000 images=500 size=64 frames=17 fps=8 seed=0``"""
    write_world(**parse(_Words, words).model_dump())
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
