"""The MA-branch with Mamba1 in place of Mamba2: a row of the ablation (LinGen, ablation table).

Shapes: B batch, N tokens of the grid (T, H, W) in natural order, R review tokens, M = R + N scan positions, D d_model,
d projections (1: both directions share one; 2: forwards, backwards), E = expand*D inner channels, S state channels,
r = ceil(D/16) channels that the time steps come from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingen.kernels.conv import scan_conv
from lingen.kernels.index import Grid
from lingen.kernels.selective_scan import selective_scan, selective_scan_flops
from lingen.models.mixers.mamba2 import NORM_EPS, draw_steps, reset_around_scan
from lingen.models.mixers.scan import ScanOrder, overview, scan_index, scan_length
from lingen.models.parallel import ALONE, norm_of_slice

STEP_RATIO = 16  # channels of d_model to one of r (Gu and Dao 2023, section 3.6)


class BidirectionalMamba1(nn.Module):
    """Mamba (Gu and Dao 2023, section 3.4) read forwards and backwards: what ``BidirectionalMamba2`` is, but for S6.

    Each channel has a time step and S decay rates of its own; time steps, B and C come from the convolved x, in each
    direction. All else is as in Mamba2's module, gated norm and sum of the directions included (Mamba has the gate
    without the norm), so that the row compares the scans and nothing else.

    Args:
        separate: each direction has its own input and output projections.
        order: the order in which this layer scans the grid.
        review_pool: (T, H, W) tokens that a review token averages; None: no review tokens.
    """

    sequence = ALONE

    def __init__(
        self,
        d_model: int,
        *,
        expand: int,
        d_state: int,
        conv_kernel: int,
        separate: bool,
        order: ScanOrder,
        review_pool: Grid | None,
    ) -> None:
        super().__init__()
        self.inner, self.d_state, self.conv_kernel = expand * d_model, d_state, conv_kernel
        self.rank = -(-d_model // STEP_RATIO)
        self.projections, self.order, self.review_pool = 1 + separate, order, review_pool
        gates = self.projections * self.inner
        self.in_proj = nn.Linear(d_model, 2 * gates, bias=False)  # z of each projection; then x of each
        # Both directions, forwards first.
        self.conv_weight = nn.Parameter(torch.empty(2 * self.inner, conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(2 * self.inner))
        self.x_proj = nn.Parameter(torch.empty(2, self.rank + 2 * d_state, self.inner))  # to r, B, C
        self.dt_proj = nn.Parameter(torch.empty(2, self.inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(2 * self.inner))
        self.A_log = nn.Parameter(torch.empty(2 * self.inner, d_state))
        self.D = nn.Parameter(torch.empty(2 * self.inner))
        self.norm_weight = nn.Parameter(torch.empty(gates))
        self.out_proj = nn.Linear(gates, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in Mamba: decay rates 1 to S in every channel, time steps as in Mamba2, unit skips."""
        reset_around_scan(self)
        with torch.no_grad():
            for direction in self.x_proj:
                nn.init.xavier_uniform_(direction)
            self.dt_proj.uniform_(-(self.rank**-0.5), self.rank**-0.5)
            self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
        draw_steps(self.dt_bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        index = scan_index(self.order, grid, self.review_pool, x.device)
        z, tokens = self.in_proj(x).chunk(2, dim=-1)  # (B, N, d*E) each
        tokens = torch.unflatten(tokens, -1, (self.projections, -1))  # (B, N, d, E)
        group = self.sequence
        tokens = group.to_heads(tokens, math.prod(grid), dim=-1)
        reviews = overview(tokens, grid, self.review_pool)  # (B, R, d, E)
        weight, bias = group.share_of_both(self.conv_weight), group.share_of_both(self.conv_bias)
        values = scan_conv(tokens, reviews, weight, bias, index, inner=tokens.shape[-1])  # (B, M, 2E)
        x_proj, dt_proj = group.share_of(self.x_proj, 2), group.share_of(self.dt_proj, 1)
        mixed = torch.einsum("bmde,dce->bmdc", torch.unflatten(values, -1, (2, -1)), x_proj)  # (B, M, 2, r + 2S)
        mixed = group.total(mixed)  # x_proj sums over all channels
        steps, b, c = torch.split(mixed, [self.rank, self.d_state, self.d_state], dim=-1)  # (B, M, 2, r or S)
        dt = torch.einsum("bmdr,der->bmde", steps, dt_proj).flatten(2)  # (B, M, 2E)
        dt_bias, A_log, D = (group.share_of_both(w).float() for w in (self.dt_bias, self.A_log, self.D))
        y = selective_scan(values, F.softplus(dt.float() + dt_bias), -A_log.exp(), b, c, D=D)  # (B, M, 2E)
        y = torch.unflatten(y, -1, (2, -1))  # (B, M, 2, E): to the norm, one head a direction
        out: Tensor = self.out_proj(norm_of_slice(y, z, self.norm_weight, index, group, eps=NORM_EPS))  # (B, N, D)
        return out

    def flops(self, grid: Grid) -> int:
        """Forward FLOPs of one sample: projections, convolution, scan."""
        tokens, length = math.prod(grid), scan_length(grid, self.review_pool)
        projections = 2 * tokens * self.in_proj.in_features * (self.in_proj.out_features + self.out_proj.in_features)
        conv = 2 * length * 2 * self.inner * self.conv_kernel
        steps = 2 * length * 2 * self.inner * (self.rank + 2 * self.d_state + self.rank)  # x_proj and dt_proj
        return projections + conv + steps + selective_scan_flops(length, 2 * self.inner, self.d_state)
