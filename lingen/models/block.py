"""One block for both models: a token mixer, cross-attention to the text, an MLP. Knows no mixer by name.

Shapes: B batch, N tokens of the grid (T, H, W), D d_model, h heads of P channels, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class Part:
    """One residual step of a block: ``x + gate * branch(view(x))``.

    Whoever needs the branch alone, or has its output already, takes the steps one by one; ``__call__`` takes them all.
    """

    view: Callable[[Tensor], Tensor]  # what the branch sees of x: its norm, modulated. (B, N, D) -> (B, N, D)
    branch: Callable[[Tensor], Tensor]  # (B, N, D) -> (B, N, D)
    gate: Tensor | None  # (B, 1, D); None: no gate

    def __call__(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.add(x, self.branch(self.view(x)))

    def add(self, x: Tensor, output: Tensor) -> Tensor:
        """x with what the branch put out, gated."""
        return x + output if self.gate is None else torch.addcmul(x, self.gate, output)

    def residual(self, output: Tensor) -> Tensor:
        """What the branch's output adds to x."""
        return output if self.gate is None else self.gate * output


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
        for part in self.parts(grid, modulation, text, text_mask).values():
            x = part(x)  # (B, N, D)
        return x

    def parts(self, grid: Grid, modulation: Tensor, text: Tensor, text_mask: Tensor) -> dict[str, Part]:
        """The steps "mixer", "cross" and "mlp", in order, for arguments as ``forward`` takes them."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (modulation + self.table).chunk(6, dim=1)  # (B, 1, D) each
        seen = partial(modulate, shift=shift, scale=scale, eps=NORM_EPS)
        seen_by_mlp = partial(modulate, shift=mlp_shift, scale=mlp_scale, eps=NORM_EPS)
        cross = partial(self.cross_attention, text=text, text_mask=text_mask)
        return {
            "mixer": Part(seen, partial(self.mixer, grid=grid), gate),
            "cross": Part(self.norm_text, cross, None),
            "mlp": Part(seen_by_mlp, self.mlp, mlp_gate),
        }

    def mlp(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        out: Tensor = self.mlp_out(F.gelu(self.mlp_in(x), approximate="tanh"))  # (B, N, mlp_ratio*D) inside
        return out

    def flops(self, grid: Grid, text_tokens: int) -> int:
        """Forward FLOPs of one sample."""
        return sum(self.part_flops(grid, text_tokens).values())

    def part_flops(self, grid: Grid, text_tokens: int) -> dict[str, int]:
        """... by part."""
        tokens = grid[0] * grid[1] * grid[2]
        return {
            "mixer": self.mixer.flops(grid),
            "cross": self.cross_attention.flops(tokens, text_tokens),
            "mlp": 4 * tokens * self.mlp_in.in_features * self.mlp_in.out_features,
        }
