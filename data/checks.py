"""Does a video show what a caption of the rendered world asks for? Decided from the pixels, rendered or generated.

The shape's colour is saturated and the world's background never is, so a mask of saturated pixels finds the shape.

Shapes: F frames, H x W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from data.synthetic import COLORS, MOTIONS, SHAPES, Floats

CHROMA = (50, 110)  # max(r, g, b) - min(r, g, b) of 255: up to the first a pixel is background, from the second shape
MIN_AREA = 0.005  # share of the screen
MIN_TRAVEL = 0.15  # share of the screen, over the whole clip
MIN_GROWTH = 2.0  # of the area
MAX_OVERLAP = 0.88  # a spinning shape's intersection over union with itself at the start
CORNERS = {
    "triangle": (3, 0.55),
    "square": (4, 0.285),
    "star": (5, 0.645),
}  # and how strongly they show in a clean mask
MIN_CORNERS = 0.35  # of that strength; what has less is a circle


def check_colour(frames: npt.ArrayLike, colour: str) -> bool:
    """Whether most of what is saturated in a clip is of this colour, and is more than a speck.

    Args:
        frames: (F, H, W, 3) or (3, F, H, W), uint8.
        colour: one of ``COLORS``.
    """
    areas = _areas(*_saturated(frames))  # (colours,)
    asked = areas[list(COLORS).index(colour)]
    return bool(asked >= MIN_AREA and asked > 0.5 * areas.sum())


def check_motion(frames: npt.ArrayLike, motion: str) -> bool:
    """Whether the dominant saturated shape moves like this, one of ``MOTIONS``; ``frames`` as for ``check_colour``."""
    if motion not in MOTIONS:
        raise ValueError(f"motion '{motion}' is none of {', '.join(MOTIONS)}")
    mask = _dominant(frames)
    areas = mask.mean((1, 2))  # (F,)
    return len(mask) > 1 and bool((areas >= MIN_AREA).all()) and _motion(mask, areas) == motion


def check_shape(frames: npt.ArrayLike, shape: str) -> bool:
    """Whether the dominant saturated shape is one of ``SHAPES``; ``frames`` as for ``check_colour``.

    By the mask's moments of 3, 4 and 5 corners around its middle, which do not depend on how it is turned.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape '{shape}' is none of {', '.join(SHAPES)}")
    mask = _dominant(frames)
    if (mask.mean((1, 2)) < MIN_AREA).any():
        return False
    x, y = _middle(mask)
    around = (np.arange(mask.shape[2]) - x[:, None])[:, None, :] + 1j * (np.arange(mask.shape[1]) - y[:, None])[
        ..., None
    ]
    radius = np.maximum(np.abs(around), 1e-6)  # (F, H, W), of pixels
    spread = (mask * radius**2).sum((1, 2))  # (F,)
    found = {"circle": MIN_CORNERS}
    for name, (corners, strength) in CORNERS.items():
        moment = np.abs((mask * around**corners * radius ** (2 - corners)).sum((1, 2))) / spread  # (F,)
        found[name] = moment.mean() / strength
    return max(found, key=lambda name: found[name]) == shape


def travel(frames: npt.ArrayLike) -> float:
    """How far the dominant saturated shape's middle goes from frame to frame, as a share of the screen, the mean over
    those where it is seen; nan where it is in no two. ``frames`` as for ``check_colour``."""
    mask = _dominant(frames)
    mask = mask[mask.mean((1, 2)) >= MIN_AREA]
    if len(mask) < 2:
        return float("nan")
    x, y = _middle(mask)
    return float(np.hypot(np.diff(x / mask.shape[2]), np.diff(y / mask.shape[1])).mean())


def _dominant(frames: npt.ArrayLike) -> Floats:
    """How much of each pixel is of the most common saturated colour: (F, H, W) in [0, 1]."""
    colours, weights = _saturated(frames)
    mask: Floats = weights * (colours == _areas(colours, weights).argmax())
    return mask


def _middle(mask: Floats) -> tuple[Floats, Floats]:
    """x and y of a mask's middle in pixels: (F,) each."""
    mass = mask.sum((1, 2))
    return mask.sum(1) @ np.arange(mask.shape[2]) / mass, mask.sum(2) @ np.arange(mask.shape[1]) / mass


def _motion(mask: Floats, areas: Floats) -> str:
    """By the mask's area, then by the track of its middle, then by its overlap with itself."""
    frames, height, width = mask.shape
    third = max(1, frames // 3)
    if areas[-third:].mean() > MIN_GROWTH * areas[:third].mean():
        return "growing"
    x, y = _middle(mask)
    tracks = x / width, y / height  # (F,) in (0, 1)
    dx, dy = (float(track[-third:].mean() - track[:third].mean()) * frames / (frames - third) for track in tracks)
    if max(abs(dx), abs(dy)) > MIN_TRAVEL:
        return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    start = mask[: max(1, frames // 8)].mean(0)  # (H, W); a mean is steadier than one frame
    overlap = np.minimum(mask, start).sum((1, 2)) / np.maximum(mask, start).sum((1, 2))  # (F,)
    return "spinning" if overlap[third:].mean() < MAX_OVERLAP else "still"


def _saturated(frames: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], Floats]:
    """For each pixel the place in ``COLORS`` of the nearest hue, and in [0, 1] how saturated it is: (F, H, W) each."""
    pixels = np.asarray(frames)
    if pixels.shape[-1] != 3:
        pixels = np.moveaxis(pixels, 0, -1)  # (F, H, W, 3)
    hue, chroma = _hue(pixels)
    palette, _ = _hue(np.array(list(COLORS.values())))  # (colours,)
    order = np.argsort(palette)
    edges = (palette[order] + np.append(palette[order][1:], palette[order][0] + 2 * np.pi)) / 2  # midway to the next
    colours = order[np.searchsorted(edges, np.where(hue >= edges[-1] - 2 * np.pi, hue, hue + 2 * np.pi)) % len(order)]
    return colours, np.clip((chroma - CHROMA[0]) / (CHROMA[1] - CHROMA[0]), 0, 1)


def _areas(colours: npt.NDArray[np.int64], weights: Floats) -> Floats:
    """The share of all pixels that each colour covers: (colours,)."""
    counts = np.bincount(colours.ravel(), weights.ravel(), minlength=len(COLORS))
    return (counts / colours.size).astype(np.float32)


def _hue(rgb: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """(..., 3) in 0..255 to hue in radians (-pi, pi] and chroma in 0..255: (...) each."""
    r, g, b = np.moveaxis(rgb.astype(np.float32), -1, 0)
    hue = np.arctan2(np.float32(np.sqrt(3)) * (g - b), 2 * r - g - b)
    return hue, np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)
