"""What enters the blocks: patches of latents, their 3D positions, the noise level and the text.

Shapes: B batch, C latent channels, (T, H, W) token grid of N = T*H*W tokens, (t, h, w) patch, D d_model, P head_dim,
L tokens of a text encoder, S width of its states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from lingen.kernels.index import Grid

REFERENCE_SIDE = 16  # tokens on a side of a square frame of 256 pixels, where a token is one unit of space
SPACE_WAVELENGTHS = (2.0, 64.0)  # units; the longest one is unambiguous over a field of 16 units, even a wide one
TIME_WAVELENGTHS = (2.0, 1024.0)  # latent frames; 1024 are over eight minutes at 16 frames a second
SIGMA_FREQUENCIES = 128


# ---------------------------------------------------------------------------------------------------- patches


def token_grid(latent: Grid, patch: Grid) -> Grid:
    """(T, H, W) tokens of latents of (T*t, H*h, W*w) positions.

    Raises:
        ValueError: the patch does not divide the latents.
    """
    if any(size % side for size, side in zip(latent, patch, strict=True)):
        raise ValueError(f"latents of (T, H, W) = {latent} are not a multiple of the patch {patch}")
    return latent[0] // patch[0], latent[1] // patch[1], latent[2] // patch[2]


def patchify(latents: Tensor, patch: Grid) -> Tensor:
    """(B, C, T*t, H*h, W*w) -> (B, N, t*h*w*C), tokens in the order (T, H, W)."""
    (grid_t, grid_h, grid_w), (t, h, w) = token_grid(tuple(latents.shape[2:]), patch), patch  # type: ignore[arg-type]
    x = latents.reshape(*latents.shape[:2], grid_t, t, grid_h, h, grid_w, w)  # (B, C, T, t, H, h, W, w)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)  # (B, N, t*h*w*C)


def unpatchify(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """The inverse of ``patchify``: (B, N, t*h*w*C) -> (B, C, T*t, H*h, W*w)."""
    x = tokens.reshape(tokens.shape[0], *grid, *patch, -1)  # (B, T, H, W, t, h, w, C)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, T, t, H, h, W, w)
    return x.reshape(*x.shape[:2], *(n * side for n, side in zip(grid, patch, strict=True)))


# ---------------------------------------------------------------------------------------------------- positions


def token_spacing(grid: Grid) -> float:
    """Distance between neighbouring tokens of a frame, in units of space.

    A frame's area is the same at every resolution, so that a higher one is a denser sampling of the same field, and
    a weight learnt at 256 pixels meets the coordinates it knows at 512. The aspect ratio is kept.
    """
    return REFERENCE_SIDE / math.sqrt(grid[1] * grid[2])


def _axis_angles(grid: Grid, pairs: int) -> list[Tensor]:
    """Phases in radians along T, H and W, (size, count) each: the counts share out ``pairs``, time takes the rest.

    Time counts latent frames (each lasts a fixed time) from 0; space is centred. Wavelengths are spaced evenly in their
    logarithm. Always computed on the CPU, in double precision: the same bits for every device.
    """
    space, spacing = pairs // 3, token_spacing(grid)
    phases = []
    for axis, size in enumerate(grid):
        index = torch.arange(size, dtype=torch.float64, device="cpu")
        at = index if axis == 0 else (index - (size - 1) / 2) * spacing
        count, (short, long) = (pairs - 2 * space, TIME_WAVELENGTHS) if axis == 0 else (space, SPACE_WAVELENGTHS)
        octaves = torch.linspace(math.log(short), math.log(long), count, dtype=torch.float64, device="cpu")
        phases.append(at[:, None] * (2 * math.pi / octaves.exp()))
    return phases


def _lay_out(axes: Sequence[Tensor]) -> Tensor:
    """What holds along T, H and W, (size, count) each, for every token of the box: (n, sum of counts)."""
    extent = [len(values) for values in axes]
    spread = [
        values.view(*(len(values) if other == axis else 1 for other in range(3)), -1).expand(*extent, -1)
        for axis, values in enumerate(axes)
    ]
    return torch.cat(spread, dim=-1).flatten(0, 2)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled model would make the table anew at each call
@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a table first made while sampling must serve training too
def _axis_waves(grid: Grid, d_model: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Sines and cosines along each axis: small enough to keep, where the whole embedding is not."""
    angles = _axis_angles(grid, d_model // 2)
    return [torch.cat((phase.sin(), phase.cos()), dim=-1).to(device, dtype) for phase in angles]


def position_embedding(grid: Grid, d_model: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed sinusoidal 3D embedding (N, D) of a token grid: nothing learnt, hence any resolution, aspect and length."""
    return _lay_out(_axis_waves(grid, d_model, dtype, device))


@torch.compiler.disable  # type: ignore[untyped-decorator]
@lru_cache(maxsize=4)  # each holds 2NP numbers
@torch.inference_mode(False)
def rotary_table(grid: Grid, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each (N, 1, 1, P), of the 3D rotary positions of a token grid (RoFormer, eq. 34)."""
    angles = _axis_angles(grid, head_dim // 2)
    cosines = _lay_out([phase.cos().to(device, dtype) for phase in angles])[:, None, None]  # (N, 1, 1, P/2)
    sines = _lay_out([phase.sin().to(device, dtype) for phase in angles])[:, None, None]
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


# ---------------------------------------------------------------------------------------------------- conditions


class SigmaEmbedding(nn.Module):
    """The noise level as a vector: sinusoids of 1000 * sigma, then a two-layer MLP."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * SIGMA_FREQUENCIES, d_model)
        self.outer = nn.Linear(d_model, d_model)

    def forward(self, sigma: Tensor) -> Tensor:
        """(B,) in [0, 1] -> (B, D)."""
        octaves = torch.arange(SIGMA_FREQUENCIES, dtype=torch.float32, device=sigma.device) / SIGMA_FREQUENCIES
        phases = 1000.0 * sigma.float()[:, None] * torch.exp(-math.log(10_000.0) * octaves)  # (B, frequencies)
        waves = torch.cat((phases.cos(), phases.sin()), dim=-1).to(self.inner.weight.dtype)
        embedded: Tensor = self.outer(nn.functional.silu(self.inner(waves)))
        return embedded

    def flops(self) -> int:
        """Forward FLOPs of one sample."""
        d_model = self.outer.out_features
        return 2 * d_model * (2 * SIGMA_FREQUENCIES + d_model)


class TextProjection(nn.Module):
    """A text encoder's states in the model's width, of unit RMS whatever the encoder's scale is.

    Two linear layers with a GELU between them (``mlp``), or one (``linear``: Movie Gen, section 3.1.4).
    """

    def __init__(self, text_dim: int, d_model: int, kind: Literal["mlp", "linear"]) -> None:
        super().__init__()
        self.text_dim = text_dim
        self.inner = nn.Linear(text_dim, d_model) if kind == "mlp" else None
        self.outer = nn.Linear(text_dim if self.inner is None else d_model, d_model)
        self.norm = nn.RMSNorm(d_model, eps=1e-6)

    def forward(self, text: Tensor) -> Tensor:
        """(B, L, S) -> (B, L, D)."""
        hidden = text if self.inner is None else nn.functional.gelu(self.inner(text), approximate="tanh")
        projected: Tensor = self.norm(self.outer(hidden))
        return projected

    def flops(self, text_tokens: int) -> int:
        """Forward FLOPs of one sample."""
        weights = sum(linear.weight.numel() for linear in (self.inner, self.outer) if linear is not None)
        return 2 * text_tokens * weights


class TextEmbedding(nn.Module):
    """The states of all text encoders as one sequence of tokens, in the order of the encoders."""

    def __init__(self, projections: Mapping[str, TextProjection]) -> None:
        super().__init__()
        self.encoders = tuple(projections)
        for name, projection in projections.items():
            self.add_module(f"from_{name}", projection)

    def _of(self, name: str) -> TextProjection:
        projection = self.get_submodule(f"from_{name}")
        assert isinstance(projection, TextProjection)
        return projection

    def forward(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """(B, L, S) by encoder -> (B, sum(L), D), computed in ``dtype``."""
        return torch.cat([self._of(name)(text[name].to(dtype)) for name in self.encoders], dim=1)

    def flops(self, text_tokens: Mapping[str, int]) -> int:
        """Forward FLOPs of one sample."""
        return sum(self._of(name).flops(text_tokens[name]) for name in self.encoders)

    def check(self, text: Mapping[str, Tensor], text_mask: Tensor, batch: int) -> None:
        """Raises:
        ValueError: the states or their mask have another shape or dtype; the message names what is wrong.
        """
        if set(text) != set(self.encoders):
            raise ValueError(f"text must have the states of {', '.join(self.encoders)}, got {', '.join(text)}")
        for name in self.encoders:
            shape, dim = tuple(text[name].shape), self._of(name).text_dim
            if len(shape) != 3 or shape[0] != batch or shape[2] != dim:
                raise ValueError(f"text of {name} must be ({batch}, L, {dim}), got {shape}")
        want = batch, sum(states.shape[1] for states in text.values())
        if text_mask.shape != want or text_mask.dtype != torch.bool:
            raise ValueError(f"text_mask must be bool of {want}, got {text_mask.dtype} of {tuple(text_mask.shape)}")
