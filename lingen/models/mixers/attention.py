"""Full self-attention over all tokens: the DiT's mixer, and the projections that TESA's windows share with it.

Shapes: B batch, N tokens of the grid (T, H, W), D d_model, h heads of P channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingen.kernels.index import Grid
from lingen.models.embed import rotary_table, rotate, token_spacing

NORM_EPS = 1e-6


class RotaryQKV(nn.Module):
    """Queries, keys and values; queries and keys RMS-normed (bf16 logits stay small) and rotated by position."""

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.linear = nn.Linear(d_model, 3 * d_model, bias=False)
        self.scale = nn.Parameter(torch.empty(2, 1, head_dim))  # of q and of k
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A plain RMS norm at the start."""
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, extent: Grid, spacing: float) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, n, D), the tokens of a box of ``extent`` -> q, k, v (B, h, n, P)."""
        qkv = self.linear(x).unflatten(-1, (3, -1, self.head_dim))  # (B, n, 3, h, P)
        qk, v = qkv.split((2, 1), dim=2)  # (B, n, 2, h, P), (B, n, 1, h, P)
        qk = F.rms_norm(qk, (self.head_dim,), eps=NORM_EPS) * self.scale
        q, k = rotate(qk, rotary_table(extent, spacing, self.head_dim, x.dtype, x.device)).unbind(2)  # (B, n, h, P)
        return q.transpose(1, 2), k.transpose(1, 2), v.squeeze(2).transpose(1, 2)


class FullAttention(nn.Module):
    """Softmax attention of every token to every token (DiT, section 3.2): quadratic in N."""

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = RotaryQKV(d_model, head_dim)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x, grid, token_spacing(grid))  # (B, h, N, P)
        seen = F.scaled_dot_product_attention(q, k, v)  # (B, h, N, P)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))  # (B, N, D)
        return out

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample: 2*4ND^2 for the projections, 4N^2 D for scores and their weighted sum."""
        tokens, d_model = grid[0] * grid[1] * grid[2], self.out.in_features
        return 8 * tokens * d_model**2 + 4 * tokens**2 * d_model
