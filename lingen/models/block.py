"""One block for both models: a token mixer, cross-attention to the text, an MLP. Knows no mixer by name.

Shapes: B batch, N tokens of the grid (T, H, W), D d_model, h heads of P channels, L text tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingen.kernels.index import Grid
from lingen.kernels.norm import modulate

NORM_EPS = 1e-6


class Mixer(Protocol):
    """What lets the tokens see each other: the only part in which LinGen and DiT differ. An ``nn.Module``."""

    def __call__(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D); the tokens come in the order (T, H, W)."""

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample."""


class CrossAttention(nn.Module):
    """Every token attends to the text; RMS-normed queries and keys keep bf16 logits small."""

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.kv = nn.Linear(d_model, 2 * d_model, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.out = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """This branch has no gate, so its output starts at zero (PixArt-alpha, section 2.3)."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """x (B, N, D), text (B, L, D), text_mask (B, L) bool -> (B, N, D)."""
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q(x).unflatten(-1, heads)).transpose(1, 2)  # (B, h, N, P)
        k, v = self.kv(text).chunk(2, dim=-1)  # (B, L, D) each
        k = self.k_norm(torch.unflatten(k, -1, heads)).transpose(1, 2)  # (B, h, L, P)
        v = torch.unflatten(v, -1, heads).transpose(1, 2)  # (B, h, L, P)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask[:, None, None, :])  # (B, h, N, P)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out

    def flops(self, tokens: int, text_tokens: int) -> int:
        """Forward FLOPs of one sample: q and out, keys and values, scores and their weighted sum."""
        d_model = self.q.in_features
        return 4 * tokens * d_model**2 + 4 * text_tokens * d_model**2 + 4 * tokens * text_tokens * d_model


class Block(nn.Module):
    """Mixer, cross-attention and MLP on a residual stream, modulated by adaLN-single (PixArt-alpha, section 2.3).

    ``modulation`` is the shared projection of the noise level; each block only adds a learned table to it.
    """

    def __init__(self, mixer: Mixer, d_model: int, head_dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm_text = nn.LayerNorm(d_model, elementwise_affine=False, eps=NORM_EPS)
        self.cross_attention = CrossAttention(d_model, head_dim)
        self.mlp_in = nn.Linear(d_model, mlp_ratio * d_model)
        self.mlp_out = nn.Linear(mlp_ratio * d_model, d_model)
        self.table = nn.Parameter(torch.empty(6, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All gates start at zero: adaLN-Zero (DiT, section 3.2)."""
        nn.init.zeros_(self.table)

    def forward(self, x: Tensor, grid: Grid, modulation: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """x (B, N, D), modulation (B, 6, D), text (B, L, D), text_mask (B, L) bool -> (B, N, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (modulation + self.table).chunk(6, dim=1)  # (B, 1, D) each
        mixed = self.mixer(modulate(x, shift, scale, eps=NORM_EPS), grid)  # (B, N, D)
        x = torch.addcmul(x, gate, mixed)  # (B, N, D)
        x = x + self.cross_attention(self.norm_text(x), text, text_mask)  # (B, N, D)
        hidden = self.mlp_in(modulate(x, mlp_shift, mlp_scale, eps=NORM_EPS))  # (B, N, mlp_ratio*D)
        return torch.addcmul(x, mlp_gate, self.mlp_out(F.gelu(hidden, approximate="tanh")))  # (B, N, D)

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Forward FLOPs of one sample."""
        tokens = grid[0] * grid[1] * grid[2]
        mlp = 4 * tokens * self.mlp_in.in_features * self.mlp_in.out_features
        return self.mixer.flops(grid) + self.cross_attention.flops(tokens, text_tokens) + mlp
