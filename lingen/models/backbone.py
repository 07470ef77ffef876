"""The diffusion transformer around the blocks. Knows no mixer: LinGen and DiT are this class with other blocks.

Shapes: B batch, C latent channels, latents (T', H', W'), token grid (T, H, W) of N tokens, D d_model; of a text
encoder: L tokens, S width of its states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lingen.kernels.index import Grid
from lingen.kernels.norm import modulate
from lingen.models.block import NORM_EPS, Block
from lingen.models.embed import SigmaEmbedding, TextEmbedding, patchify, position_embedding, token_grid, unpatchify
from lingen.models.parallel import ALONE


class Head(nn.Module):
    """The last norm, modulated, and the projection to patches: zero at the start, and so is the velocity."""

    def __init__(self, d_model: int, features: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero, as in DiT (section 3.2)."""
        for linear in (self.modulation, self.out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D), condition (B, D) -> (B, N, features)."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        out: Tensor = self.out(modulate(x, shift, scale, eps=NORM_EPS))
        return out

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of one sample."""
        return 2 * self.out.in_features * (2 * self.out.in_features + tokens * self.out.out_features)


@dataclass(frozen=True)
class Context:
    """What one forward knows beside the tokens: all that the blocks are given with them, and what the head needs."""

    grid: Grid
    modulation: Tensor  # (B, 6, D)
    text: Tensor  # (B, sum(L), D)
    text_mask: Tensor  # (B, sum(L)) bool
    condition: Tensor  # (B, D), the noise level
    dtype: torch.dtype  # of the latents

    @property
    def of_blocks(self) -> tuple[Grid, Tensor, Tensor, Tensor]:
        """A block's arguments behind x."""
        return self.grid, self.modulation, self.text, self.text_mask


class Backbone(nn.Module):
    """Latents, a noise level and a text to a velocity.

    Args:
        blocks: the layers, in order; each brings its mixer.
        text: from the text encoders' states to D.
        channels: latent channels C.
        patch: (T, H, W) latent positions of a token.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    sequence = ALONE  # the ranks that compute each sample together

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        d_model: int,
        text: TextEmbedding,
        channels: int,
        patch: Grid,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        self.activation_checkpointing = activation_checkpointing
        features = channels * patch[0] * patch[1] * patch[2]
        self.patch_in = nn.Linear(features, d_model)
        self.sigma = SigmaEmbedding(d_model)
        self.text = text
        self.modulation = nn.Linear(d_model, 6 * d_model)  # adaLN-single: one for all blocks
        self.blocks = nn.ModuleList(blocks)
        self.head = Head(d_model, features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Tokens of unit variance, the scale of their positions, at every width; adaLN-Zero (DiT, section 3.2)."""
        nn.init.normal_(self.patch_in.weight, std=self.patch_in.in_features**-0.5)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor], text_mask: Tensor) -> Tensor:
        """The velocity, in the shape and dtype of ``latents``; computed in the dtype of the weights.

        Args:
            latents: (B, C, T', H', W'), noisy.
            sigma: (B,) noise level in [0, 1].
            text: (B, L, S) states by text encoder.
            text_mask: (B, sum(L)) bool, in the encoders' order, True where there is text; at least one True a row.

        Raises:
            ValueError: an argument has another shape or dtype; the message names it.
        """
        x, context = self.enter(latents, sigma, text, text_mask)  # (B, N, D)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:  # no block draws random numbers
                x = checkpoint(block, x, *context.of_blocks, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *context.of_blocks)  # (B, N, D)
        return self.leave(x, context)

    def enter(
        self, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor], text_mask: Tensor
    ) -> tuple[Tensor, Context]:
        """What lies before the blocks: their input x (B, N, D), a tensor of its own, and all else that they are given.

        Takes and raises what ``forward`` does. Where ranks compute each sample together, N is this rank's slice of the
        tokens from here to ``leave``.
        """
        self._check(latents, sigma, text, text_mask)
        dtype = self.patch_in.weight.dtype
        grid = token_grid(tuple(latents.shape[2:]), self.patch)  # type: ignore[arg-type]
        ranks = self.sequence
        x = self.patch_in(ranks.slice_of(patchify(latents.to(dtype), self.patch)))  # (B, N, D)
        x = x + ranks.slice_of(position_embedding(grid, x.shape[-1], dtype, x.device), 0)  # (B, N, D)
        condition = F.silu(self.sigma(sigma))  # (B, D)
        modulation = self.modulation(condition).unflatten(-1, (6, -1))  # (B, 6, D)
        states = self.text(text, dtype)  # (B, sum(L), D)
        return x, Context(grid, modulation, states, text_mask, condition, latents.dtype)

    def leave(self, x: Tensor, context: Context) -> Tensor:
        """What lies behind the blocks: x (B, N, D) to the velocity (B, C, T', H', W')."""
        grid = context.grid
        velocity = self.sequence.gather(
            self.head(x, context.condition), math.prod(grid)
        )  # (B, N, features), all tokens
        return unpatchify(velocity, grid, self.patch).to(context.dtype)  # (B, C, T', H', W')

    def flops(self, grid: Grid, text_tokens: Mapping[str, int]) -> int:
        """Forward FLOPs of one sample of a token grid (T, H, W) with so many tokens of each text encoder: a
        multiplication and an addition are two.

        Counts what ``torch.utils.flop_counter`` counts: matrix products, convolutions and attention.
        """
        tokens, d_model = grid[0] * grid[1] * grid[2], self.modulation.in_features
        linears = tokens * self.patch_in.in_features * d_model + 6 * d_model**2
        blocks = sum(block.flops(grid, sum(text_tokens.values())) for block in self.blocks if isinstance(block, Block))
        return 2 * linears + self.sigma.flops() + self.text.flops(text_tokens) + blocks + self.head.flops(tokens)

    def _check(self, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor], text_mask: Tensor) -> None:
        """Raise a ValueError that names the first argument of a wrong shape."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be (B, {self.channels}, T, H, W), got {tuple(latents.shape)}")
        batch = latents.shape[0]
        if sigma.shape != (batch,):
            raise ValueError(f"sigma must be ({batch},), one a sample of latents, got {tuple(sigma.shape)}")
        self.text.check(text, text_mask, batch)
