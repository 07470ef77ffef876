"""The MA-branch: a bidirectional Mamba2 with review tokens, both directions in one scan (LinGen, "MA-branch").

Shapes: B batch, N tokens of the grid (T, H, W) in natural order, R review tokens, M = R + N scan positions, D d_model,
d projections (1: both directions share one; 2: forwards, backwards), E = expand*D inner channels, h = E/P heads of P
channels a direction, S state channels.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from lingen.kernels.conv import scan_conv, scan_steps
from lingen.kernels.index import Grid
from lingen.kernels.ssd import ssd, ssd_flops
from lingen.models.mixers.scan import ScanOrder, overview, scan_index, scan_length
from lingen.models.parallel import ALONE, norm_of_slice

NORM_EPS = 1e-6
DT_RANGE = (1e-3, 1e-1)  # time steps at the start (Mamba2's reference values)
A_RANGE = (1.0, 16.0)  # decay rates at the start


class AroundScan(Protocol):
    """The parameters around a scan, of both directions."""

    conv_weight: nn.Parameter  # (channels, k)
    conv_bias: nn.Parameter  # (channels,)
    D: nn.Parameter
    norm_weight: nn.Parameter


class BidirectionalMamba2(nn.Module):
    """Mamba2 (Dao and Gu 2024, section 7.1) read forwards and backwards, so that the whole token map is filled.

    The directions share both projections, unless ``separate``; each has its own convolution, decay, time steps and
    skip. They run as one scan of 2h heads in two groups, the backward half mirrored. The directions are added before
    the gated norm, not after it: their sum is one mixing matrix (lower plus upper triangle, as in Hydra, Hwang et al.
    2024), the norm makes sum and mean the same, and one norm reads half of what two would. Separate projections have
    a gate a direction, hence two norms, and the output projection adds them.

    Review tokens go ahead of the tokens in both directions, so that each starts from an overview of the whole video.
    Pooling commutes with the bias-free input projection: it is done behind it, and costs no projection of its own.

    Args:
        separate: each direction has its own projections.
        order: the order in which this layer scans the grid.
        review_pool: (T, H, W) tokens that a review token averages; None: no review tokens.
    """

    sequence = ALONE

    def __init__(
        self,
        d_model: int,
        *,
        expand: int,
        head_dim: int,
        d_state: int,
        conv_kernel: int,
        chunk_size: int,
        separate: bool,
        order: ScanOrder,
        review_pool: Grid | None,
    ) -> None:
        super().__init__()
        inner = expand * d_model
        if inner % head_dim:
            raise ValueError(f"head_dim={head_dim} must divide expand*d_model={inner}")
        self.inner, self.heads, self.head_dim, self.d_state = inner, inner // head_dim, head_dim, d_state
        self.conv_kernel, self.chunk_size = conv_kernel, chunk_size
        self.projections, self.order, self.review_pool = 1 + separate, order, review_pool
        gates, mixed = self.projections * inner, inner + 2 * d_state  # channels of z; of x, B and C
        # z of each projection; then x, B, C, dt of each.
        self.in_proj = nn.Linear(d_model, gates + self.projections * (mixed + self.heads), bias=False)
        # Both directions; channels as in scan_conv: x forwards, x backwards, BC forwards, BC backwards.
        self.conv_weight = nn.Parameter(torch.empty(2 * mixed, conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(2 * mixed))
        self.dt_bias = nn.Parameter(torch.empty(2 * self.heads))
        self.A_log = nn.Parameter(torch.empty(2 * self.heads))
        self.D = nn.Parameter(torch.empty(2 * self.heads))
        self.norm_weight = nn.Parameter(torch.empty(gates))
        self.out_proj = nn.Linear(gates, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in Mamba2: time steps log-uniform in ``DT_RANGE``, decay rates uniform in ``A_RANGE``, unit skips."""
        reset_around_scan(self)
        with torch.no_grad():
            self.A_log.uniform_(*A_RANGE).log_()
        draw_steps(self.dt_bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        index = scan_index(self.order, grid, self.review_pool, x.device)
        gates, projected = self.out_proj.in_features, self.in_proj(x)
        z, mixed = torch.split(projected, [gates, projected.shape[-1] - gates], dim=-1)  # (B, N, d*E), ...
        mixed = self._all_tokens(torch.unflatten(mixed, -1, (self.projections, -1)), math.prod(grid))
        inner, heads = self.inner // self.sequence.size, self.heads // self.sequence.size  # E and h of this rank
        parts = [inner + 2 * self.d_state, heads]
        xbc, dt = torch.split(mixed, parts, dim=-1)  # (B, N, d, E + 2S), (B, N, d, h)
        reviews_xbc, reviews_dt = torch.split(overview(mixed, grid, self.review_pool), parts, dim=-1)  # (B, R, d, ...)
        weight, bias = self._own_channels(self.conv_weight), self._own_channels(self.conv_bias)
        xbc = scan_conv(xbc, reviews_xbc, weight, bias, index, inner=inner)
        values, groups = torch.split(xbc, [2 * inner, 4 * self.d_state], dim=-1)  # (B, M, 2E), (B, M, 4S)
        b, c = torch.unflatten(groups, -1, (2, 2, self.d_state)).unbind(3)  # (B, M, 2, S) each
        y = ssd(
            torch.unflatten(values, -1, (-1, self.head_dim)),  # (B, M, 2h, P)
            scan_steps(dt, reviews_dt, self.sequence.share_of_both(self.dt_bias), index),  # (B, M, 2h)
            -self.sequence.share_of_both(self.A_log).float().exp(),  # (2h,)
            b,
            c,
            chunk_size=self.chunk_size,
            D=self.sequence.share_of_both(self.D).float(),
        )  # (B, M, 2h, P)
        out: Tensor = self.out_proj(
            norm_of_slice(y, z, self.norm_weight, index, self.sequence, eps=NORM_EPS)
        )  # (B, N, D)
        return out

    def _all_tokens(self, mixed: Tensor, tokens: int) -> Tensor:
        """A slice of the tokens to all of them: this rank's channels of x and dt, and B and C, which all heads share.

        (B, n, d, E + 2S + h) -> (B, N, d, E/K + 2S + h/K) for K ranks.
        """
        group = self.sequence
        if group.size == 1:
            return mixed
        x, bc, dt = torch.split(mixed, [self.inner, 2 * self.d_state, self.heads], dim=-1)
        blocks = torch.cat((group.cut(x, -1), group.copies(bc), group.cut(dt, -1)), dim=-1)
        return group.to_sequence(blocks, tokens)

    def _own_channels(self, weight: Tensor) -> Tensor:
        """The convolution's weight (2(E + 2S), ...) for what this rank has: (2(E/K + 2S), ...)."""
        if self.sequence.size == 1:
            return weight
        x, bc = torch.split(weight, [2 * self.inner, 4 * self.d_state])
        return torch.cat((self.sequence.share_of_both(x), bc))

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample: projections, convolution, scan."""
        tokens, length = math.prod(grid), scan_length(grid, self.review_pool)
        projections = 2 * tokens * self.in_proj.in_features * (self.in_proj.out_features + self.out_proj.in_features)
        conv = 2 * length * 2 * (self.inner + 2 * self.d_state) * self.conv_kernel
        scan = ssd_flops(length, 2 * self.heads, self.head_dim, 2, self.d_state, self.chunk_size)
        return projections + conv + scan


def reset_around_scan(mamba: AroundScan) -> None:
    """What begins alike in Mamba and Mamba2: the convolution's weights, unit skips, a plain norm."""
    bound = mamba.conv_weight.shape[1] ** -0.5
    nn.init.uniform_(mamba.conv_weight, -bound, bound)
    nn.init.zeros_(mamba.conv_bias)
    nn.init.ones_(mamba.D)
    nn.init.ones_(mamba.norm_weight)


def draw_steps(dt_bias: Tensor) -> None:
    """Fill ``dt_bias`` with what the softplus turns into time steps log-uniform in ``DT_RANGE``."""
    with torch.no_grad():
        dt = dt_bias.uniform_(math.log(DT_RANGE[0]), math.log(DT_RANGE[1])).exp()
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of the softplus
