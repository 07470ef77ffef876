"""Full self-attention over all tokens: the DiT's mixer, and the projections that TESA's windows share with it.

Shapes: B batch, N tokens of the grid (T, H, W) in natural order, D d_model, h heads of P channels. Where ranks compute
each sample together (``sequence``), x holds a slice of the tokens, and q, k, v all of them and a share of the heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lingen.kernels.attention import attention
from lingen.kernels.index import Grid
from lingen.kernels.norm import norm_rotate
from lingen.models.embed import rotary_table
from lingen.models.parallel import ALONE

NORM_EPS = 1e-6


class RotaryQKV(nn.Module):
    """Queries, keys and values; queries and keys RMS-normed (bf16 logits stay small) and rotated by position.

    The positions are those on the grid. Attention sees only their differences, which are the same inside a window.
    """

    sequence = ALONE

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.linear = nn.Linear(d_model, 3 * d_model, bias=False)
        self.scale = nn.Parameter(torch.empty(2, 1, head_dim))  # of q and of k
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A plain RMS norm at the start."""
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D) -> q, k, v (B, N, h, P)."""
        qkv = self.linear(x).unflatten(-1, (3, -1, self.head_dim))  # (B, N, 3, h, P)
        qkv = self.sequence.to_heads(qkv, math.prod(grid), dim=3)
        table = rotary_table(grid, self.head_dim, x.dtype, x.device)  # (N, 1, 1, P) each
        return norm_rotate(qkv, self.scale, table, eps=NORM_EPS)

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample."""
        return 2 * grid[0] * grid[1] * grid[2] * self.linear.in_features * self.linear.out_features


class FullAttention(nn.Module):
    """Softmax attention of every token to every token (DiT, section 3.2): quadratic in N."""

    sequence = ALONE

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = RotaryQKV(d_model, head_dim)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x, grid)  # (B, N, h, P)
        seen = self.sequence.to_tokens(attention(q, k, v), dim=2)  # (B, N, h, P)
        out: Tensor = self.out(seen.flatten(2))  # (B, N, D)
        return out

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample: 2*4ND^2 for the projections, 4N^2 D for scores and their weighted sum."""
        tokens, d_model = grid[0] * grid[1] * grid[2], self.out.in_features
        return self.qkv.flops(grid) + 4 * tokens**2 * d_model + 2 * tokens * d_model**2
