"""TESA, the temporal Swin attention of the TE-branch: self-attention inside small 3D windows (LinGen, "TE-branch").

The windows do not grow with the grid, so the cost is linear in the tokens. On odd layers they are shifted by half
their size, as in Swin (section 3.2), so that neighbours which one layer parts meet in the next.

Shapes: B batch, N tokens of the grid (T, H, W), D d_model, h heads of P channels, G windows of w tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingen.kernels.index import Grid
from lingen.models.embed import token_spacing
from lingen.models.mixers.attention import RotaryQKV


@dataclass(frozen=True)
class Tiling:
    """How windows lie on a token grid: on each axis ``count`` windows of ``size`` tokens, moved back by ``shift``."""

    grid: Grid
    count: Grid
    size: Grid
    shift: Grid

    @property
    def padded(self) -> Grid:
        """The grid that the windows cover: tokens are appended where they do not divide it."""
        return tuple(n * size for n, size in zip(self.count, self.size, strict=True))  # type: ignore[return-value]

    @property
    def masked(self) -> bool:
        """Whether some tokens of a window must not see each other."""
        return self.padded != self.grid or any(self.shift)


def tile(grid: Grid, window: Grid, shifted: bool) -> Tiling:
    """The fewest windows of at most ``window`` tokens an axis that cover the grid, all of one size.

    Where ``window`` divides the grid, that is the size; else the size is evened out, because padding costs as much as
    tokens do: 5 frames under windows of 4 make 3 + 2, not 4 + 1. One window that holds the whole axis is not shifted.
    """
    count = [-(-n // limit) for n, limit in zip(grid, window, strict=True)]
    size = [-(-n // windows) for n, windows in zip(grid, count, strict=True)]
    shift = [side // 2 if shifted and windows > 1 else 0 for side, windows in zip(size, count, strict=True)]
    return Tiling(grid, *(tuple(axis) for axis in (count, size, shift)))  # type: ignore[arg-type]


def partition(x: Tensor, tiling: Tiling) -> Tensor:
    """(B, N, D) -> (B*G, w, D). Padding is appended; what a shift moves out in front comes back behind, as in Swin."""
    (T, H, W), padded = tiling.grid, tiling.padded
    x = torch.unflatten(x, 1, tiling.grid)  # (B, T, H, W, D)
    if padded != tiling.grid:
        x = F.pad(x, (0, 0, 0, padded[2] - W, 0, padded[1] - H, 0, padded[0] - T))
    if any(tiling.shift):
        x = x.roll([-shift for shift in tiling.shift], dims=(1, 2, 3))
    (count_t, count_h, count_w), (t, h, w) = tiling.count, tiling.size
    x = x.reshape(-1, count_t, t, count_h, h, count_w, w, x.shape[-1])
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, t * h * w, x.shape[-1])


def merge(windows: Tensor, tiling: Tiling) -> Tensor:
    """The inverse of ``partition``: (B*G, w, D) -> (B, N, D); padding is dropped."""
    (T, H, W), padded, dim = tiling.grid, tiling.padded, windows.shape[-1]
    x = windows.reshape(-1, *tiling.count, *tiling.size, dim)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *padded, dim)  # (B, T, H, W, D), padded
    if any(tiling.shift):
        x = x.roll(tiling.shift, dims=(1, 2, 3))
    return x[:, :T, :H, :W].flatten(1, 3)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a mask first made while sampling must serve training too
def window_mask(tiling: Tiling, device: torch.device) -> Tensor:
    """(G, 1, w, w) bool: which tokens of a window see each other.

    Tokens that a shift brought in from the opposite edge, and padding, sit beside strangers: each kind sees its own.
    (Padding sees padding, so that no row of the softmax is empty.)
    """
    label = torch.zeros(1, dtype=torch.int64)
    for n, padded, shift in zip(tiling.grid, tiling.padded, tiling.shift, strict=True):
        at = torch.arange(padded)
        label = 3 * label[..., None] + (at < shift).long() + 2 * (at >= n).long()  # (1, T), (1, T, H), (1, T, H, W)
    whole = Tiling(tiling.padded, tiling.count, tiling.size, tiling.shift)
    label = partition(label.flatten(1)[..., None], whole)[..., 0]  # (G, w)
    return (label[:, None, :, None] == label[:, None, None, :]).to(device)


class WindowAttention(nn.Module):
    """TESA: linear in the number of tokens.

    Args:
        window: the largest window (T, H, W), in tokens.
        shifted: whether this layer's windows are shifted by half.
    """

    def __init__(self, d_model: int, head_dim: int, *, window: Grid, shifted: bool) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.qkv = RotaryQKV(d_model, head_dim)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        tiling = tile(grid, self.window, self.shifted)
        q, k, v = self.qkv(partition(x, tiling), tiling.size, token_spacing(grid))  # (B*G, h, w, P)
        mask = window_mask(tiling, x.device).repeat(x.shape[0], 1, 1, 1) if tiling.masked else None  # (B*G, 1, w, w)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B*G, h, w, P)
        out: Tensor = self.out(merge(seen.transpose(1, 2).flatten(2), tiling))  # (B, N, D)
        return out

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample: padding takes part in all but the output projection."""
        tiling, d_model = tile(grid, self.window, self.shifted), self.out.in_features
        tokens, window = grid[0] * grid[1] * grid[2], tiling.size[0] * tiling.size[1] * tiling.size[2]
        padded = window * tiling.count[0] * tiling.count[1] * tiling.count[2]
        return 6 * padded * d_model**2 + 4 * padded * window * d_model + 2 * tokens * d_model**2
