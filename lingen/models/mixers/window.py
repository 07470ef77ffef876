"""TESA, the temporal Swin attention of the TE-branch: self-attention inside small 3D windows (LinGen, "TE-branch").

The windows do not grow with the grid, so the cost is linear in the tokens. On odd layers they are shifted by half
their size, as in Swin (section 3.2), so that neighbours which one layer parts meet in the next.

Shapes: B batch, N tokens of the grid (T, H, W) in natural order, D d_model, h heads of P channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from lingen.kernels.index import Grid
from lingen.kernels.window import tile, window_attention
from lingen.models.mixers.attention import RotaryQKV
from lingen.models.parallel import ALONE


class WindowAttention(nn.Module):
    """TESA: linear in the number of tokens.

    Args:
        window: the largest window (T, H, W), in tokens.
        shifted: whether this layer's windows are shifted by half.
    """

    sequence = ALONE

    def __init__(self, d_model: int, head_dim: int, *, window: Grid, shifted: bool) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.qkv = RotaryQKV(d_model, head_dim)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x, grid)  # (B, N, h, P)
        seen = window_attention(q, k, v, tile(grid, self.window, self.shifted))  # (B, N, h, P)
        out: Tensor = self.out(self.sequence.to_tokens(seen, dim=2).flatten(2))  # (B, N, D)
        return out

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample: 2*4ND^2 for the projections, 4D for each pair of tokens that a window holds."""
        tokens, d_model = grid[0] * grid[1] * grid[2], self.out.in_features
        pairs = tile(grid, self.window, self.shifted).pairs()
        return self.qkv.flops(grid) + 4 * pairs * d_model + 2 * tokens * d_model**2
