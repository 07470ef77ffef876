"""Long and large videos in overlapping tiles of time and space, joined by ramps: memory is that of a tile.

Shapes: B clips, F = t*k + 1 frames, T = k + 1 latent frames, h = H/s, w = W/s. A window [a, b) counts latents along one
axis; in pixels it is [a*s, b*s), and in time the frames [a*t, (b-1)*t + 1).

A tile that does not begin with the clip begins with a frame *alone*, which is what an autoencoder makes of any first
frame. It is not what the clip has there, so the first latent (or decoded) frame of such a tile is always left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lingen.autoencoder_config import TileConfig
from lingen.autoencoders.base import Autoencoder, refuse_other_shapes

Window = tuple[int, int]
Box = tuple[Window, ...]  # time, height, width
TIME = 0


def tiled(autoencoder: Autoencoder, tile: TileConfig | None) -> Autoencoder:
    """``autoencoder``, in tiles where there are any."""
    return autoencoder if tile is None else TiledAutoencoder(autoencoder, tile)


class TiledAutoencoder:
    """``inner`` in tiles of ``tile.frames`` x ``tile.height`` x ``tile.width`` pixels; see ``Autoencoder``.

    The tiles of an axis overlap by ``tile.overlap`` of their length or more: the last one ends with the clip, so all
    are of one size. What they have in common is mixed by a ramp over its middle half in space. In time the ramp is
    over its third quarter: an autoencoder looks back, so a tile's beginning is worse than its end.
    """

    def __init__(self, inner: Autoencoder, tile: TileConfig) -> None:
        self.channels, self.time, self.space = inner.channels, inner.time, inner.space
        self.fingerprint = inner.fingerprint
        self._inner = inner
        self._overlap = tile.overlap
        self._sizes = (  # of a tile, in latents; None: the axis is whole
            None if tile.frames is None else (tile.frames - 1) // self.time + 1,
            None if tile.height is None else tile.height // self.space,
            None if tile.width is None else tile.width // self.space,
        )

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See ``Autoencoder.encode``."""
        refuse_other_shapes(self, pixels)
        frames, height, width = pixels.shape[2:]
        whole = (0, (frames - 1) // self.time + 1), (0, height // self.space), (0, width // self.space)
        walk = _Walk(self._sizes, self._overlap, lambda box: self._inner.encode(_cut(pixels, self._in_pixels(box))))
        return walk(whole, lambda box: box)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See ``Autoencoder.decode``."""
        steps, height, width = latents.shape[2:]
        walk = _Walk(self._sizes, self._overlap, lambda box: self._inner.decode(_cut(latents, box)))
        return walk(((0, steps), (0, height), (0, width)), self._in_pixels)

    def _in_pixels(self, box: Box) -> Box:
        (first, last), *rest = box
        rows, columns = ((a * self.space, b * self.space) for a, b in rest)
        return (first * self.time, (last - 1) * self.time + 1), rows, columns


@dataclass(frozen=True)
class _Walk:
    """Goes over the tiles, time outermost, and joins them axis by axis, so that one slab of each axis is held."""

    sizes: tuple[int | None, int | None, int | None]
    overlap: float
    run: Callable[[Box], torch.Tensor]  # what comes of one tile

    def __call__(self, box: Box, out: Callable[[Box], Box], axis: int = TIME) -> torch.Tensor:
        """What comes of ``box``, whose axes before ``axis`` are those of a tile. ``out`` says which part of the result
        a box is."""
        if axis == len(box):
            return self.run(box)
        whole: torch.Tensor | None = None
        end = 0  # of what is joined so far
        for window in windows(box[axis], self.sizes[axis], self.overlap, axis):
            tile = (*box[:axis], window, *box[axis + 1 :])
            part = self(tile, out, axis + 1)
            if window == box[axis]:
                return part
            (origin, length), (begin, stop) = out(box)[axis], out(tile)[axis]
            if whole is None:
                shape = list(part.shape)
                shape[axis + 2] = length - origin
                whole = part.new_empty(shape)
            elif axis == TIME:
                begin, part = begin + 1, part[:, :, 1:]
            _join(whole, part, axis + 2, begin - origin, end, late=axis == TIME)
            end = stop - origin
        assert whole is not None  # there is one window at least
        return whole


def windows(span: Window, size: int | None, overlap: float, axis: int) -> Iterator[Window]:
    """The tiles of an axis: all of ``size``, each with ``overlap`` of it or more in common with the next."""
    begin, end = span
    if size is None or size >= end - begin:
        yield span
        return
    common = min(size - 1, max(round(size * overlap), axis == TIME))  # in time one latent frame is lost
    for first in range(begin, end - common, size - common):
        first = min(first, end - size)
        yield first, first + size


def _join(whole: torch.Tensor, part: torch.Tensor, dim: int, begin: int, end: int, *, late: bool) -> None:
    """Put ``part`` at ``begin`` of ``whole``, which is filled up to ``end``: what both have is mixed."""
    common = max(end - begin, 0)
    shape = [1] * part.ndim
    shape[dim] = common
    ramp = (torch.arange(common, device=part.device) + 0.5) / max(common, 1)  # 0 to 1 over what both have
    ramp = (4 * ramp - 2 if late else 2 * ramp - 0.5).clamp(0, 1).view(shape).to(part.dtype)
    both = whole.narrow(dim, begin, common)
    both.copy_(both.lerp(part.narrow(dim, 0, common), ramp))  # exact where both are equal
    rest = part.shape[dim] - common
    whole.narrow(dim, begin + common, rest).copy_(part.narrow(dim, common, rest))


def _cut(clip: torch.Tensor, box: Box) -> torch.Tensor:
    time, rows, columns = (slice(*window) for window in box)
    return clip[:, :, time, rows, columns]
