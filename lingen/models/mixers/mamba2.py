"""The MA-branch: a bidirectional Mamba2 with review tokens, both directions in one scan (LinGen, "MA-branch").

Shapes: B batch, (n1, n2, n3) token grid in scan order (n3 fastest) of N tokens, R review tokens, M = R + N,
D d_model, E = expand*D inner channels, h = E/P heads of P channels a direction, S state channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingen.kernels.index import Grid
from lingen.kernels.ssd import MAX_ELEMENTS, ssd, ssd_flops

NORM_EPS = 1e-6
DT_RANGE = (1e-3, 1e-1)  # time steps at the start (Mamba2's reference values)
A_RANGE = (1.0, 16.0)  # decay rates at the start


def review_tokens(x: Tensor, pool: Grid) -> Tensor:
    """An overview of the video: (B, n1, n2, n3, E) averaged over boxes of ``pool`` -> (B, R, E), in the same order.

    Boxes at the far edges may hold fewer tokens, and average those. Two 2D poolings on channels-last views: several
    times faster than one in 3D, and the same, since both the boxes and their sizes are products over the axes.
    """
    batch, n1, n2, n3, channels = x.shape
    x = x.reshape(batch, n1, n2 * n3, channels).permute(0, 3, 1, 2)  # (B, E, n1, n2*n3)
    x = F.avg_pool2d(x, (pool[0], 1), ceil_mode=True)  # (B, E, r1, n2*n3)
    x = x.permute(0, 2, 3, 1).reshape(-1, n2, n3, channels).permute(0, 3, 1, 2)  # (B*r1, E, n2, n3)
    x = F.avg_pool2d(x, pool[1:], ceil_mode=True)  # (B*r1, E, r2, r3)
    return x.permute(0, 2, 3, 1).reshape(batch, -1, channels)  # (B, R, E)


def review_count(grid: Grid, pool: Grid) -> int:
    """R: how many review tokens a grid has."""
    return math.prod(-(-n // side) for n, side in zip(grid, pool, strict=True))


class BidirectionalMamba2(nn.Module):
    """Mamba2 (Dao and Gu 2024, section 7.1) read forwards and backwards, so that the whole token map is filled.

    The directions share both projections; each has its own convolution, decay, time steps and skip. They run as one
    scan of 2h heads in two groups, the backward half mirrored. The directions are added before the gated norm, not
    after it: their sum is one mixing matrix (lower plus upper triangle, as in Hydra, Hwang et al. 2024), the norm makes
    sum and mean the same, and one norm reads half of what two would.

    Review tokens go ahead of the tokens in both directions, so that each starts from an overview of the whole video.
    Pooling commutes with the bias-free input projection: it is done behind it, and costs no projection of its own.
    """

    def __init__(
        self, d_model: int, *, expand: int, head_dim: int, d_state: int, conv_kernel: int, chunk_size: int
    ) -> None:
        super().__init__()
        inner = expand * d_model
        if inner % head_dim:
            raise ValueError(f"head_dim={head_dim} must divide expand*d_model={inner}")
        self.inner, self.heads, self.head_dim, self.d_state = inner, inner // head_dim, head_dim, d_state
        self.conv_kernel, self.chunk_size = conv_kernel, chunk_size
        mixed = inner + 2 * d_state  # channels of x, B and C
        self.in_proj = nn.Linear(d_model, inner + mixed + self.heads, bias=False)  # z, x, B, C, dt
        # Both directions; channels as in _both_directions: x forwards, x backwards, BC forwards, BC backwards.
        self.conv_weight = nn.Parameter(torch.empty(2 * mixed, conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(2 * mixed))
        self.dt_bias = nn.Parameter(torch.empty(2 * self.heads))
        self.A_log = nn.Parameter(torch.empty(2 * self.heads))
        self.D = nn.Parameter(torch.empty(2 * self.heads))
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in Mamba2: time steps log-uniform in ``DT_RANGE``, decay rates uniform in ``A_RANGE``, unit skips."""
        nn.init.uniform_(self.conv_weight, -(self.conv_kernel**-0.5), self.conv_kernel**-0.5)
        nn.init.zeros_(self.conv_bias)
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)
        with torch.no_grad():
            self.A_log.uniform_(*A_RANGE).log_()
            dt = self.dt_bias.uniform_(math.log(DT_RANGE[0]), math.log(DT_RANGE[1])).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of the softplus

    def forward(self, x: Tensor, review_pool: Grid) -> Tensor:
        """x (B, n1, n2, n3, D) in scan order, the pooling box in the same order -> (B, n1, n2, n3, D)."""
        projected = self.in_proj(x)  # (B, n1, n2, n3, 2E + 2S + h)
        z, xbc_dt = projected.split((self.inner, projected.shape[-1] - self.inner), dim=-1)
        reviews = review_tokens(xbc_dt, review_pool)  # (B, R, E + 2S + h)
        xbc, dt = self._both_directions(reviews, xbc_dt.flatten(1, 3))  # (B, M, 2(E + 2S)), (B, M, 2h)
        xbc = F.silu(self._causal_conv(xbc))
        values, groups = torch.split(xbc, [2 * self.inner, 4 * self.d_state], dim=-1)  # (B, M, 2E), (B, M, 4S)
        b, c = torch.unflatten(groups, -1, (2, 2, self.d_state)).unbind(3)  # (B, M, 2, S) each
        y = ssd(
            torch.unflatten(values, -1, (-1, self.head_dim)),  # (B, M, 2h, P)
            F.softplus(dt.float() + self.dt_bias.float()),  # (B, M, 2h)
            -self.A_log.float().exp(),  # (2h,)
            b,
            c,
            chunk_size=self.chunk_size,
            D=self.D.float(),
        )  # (B, M, 2h, P)
        y = y[:, reviews.shape[1] :]  # (B, N, 2h, P): the reviews have done their part
        y = (y[:, :, : self.heads] + y[:, :, self.heads :].flip(1)).reshape(z.shape)  # (B, n1, n2, n3, E)
        y = F.rms_norm(y * F.silu(z), (self.inner,), self.norm_weight, NORM_EPS)
        out: Tensor = self.out_proj(y)  # (B, n1, n2, n3, D)
        return out

    def _both_directions(self, reviews: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[reviews, tokens] and its mirror image [reviews mirrored, tokens mirrored], side by side.

        reviews (B, R, E + 2S + h), tokens (B, N, E + 2S + h) -> xbc (B, M, 2(E + 2S)), dt (B, M, 2h).
        """
        parts = [self.inner, 2 * self.d_state, self.heads]
        forward = torch.split(torch.cat((reviews, tokens), dim=1), parts, dim=-1)
        backward = torch.split(torch.cat((reviews.flip(1), tokens.flip(1)), dim=1), parts, dim=-1)
        xbc = torch.cat((forward[0], backward[0], forward[1], backward[1]), dim=-1)
        return xbc, torch.cat((forward[2], backward[2]), dim=-1)

    def _causal_conv(self, x: Tensor) -> Tensor:
        """Depthwise over the sequence: (B, M, channels) -> the same.

        In slices of the channels where one tensor would pass ``MAX_ELEMENTS`` (68 s of 512p at 4B does): beyond it
        torch's depthwise kernels refuse, and some of cuDNN's are wrong.
        """
        slices = x.numel() // MAX_ELEMENTS + 1
        parts = (x.chunk(slices, dim=-1), self.conv_weight.chunk(slices), self.conv_bias.chunk(slices))
        outputs = [self._convolve(*part) for part in zip(*parts, strict=True)]
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, M, channels), (channels, k), (channels,) -> (B, M, channels).

        As a 2D convolution on channels-last memory, and with the bias outside: on a CPU half the time of ``conv1d``.
        """
        padded = F.pad(x, (0, 0, self.conv_kernel - 1, 0)).transpose(1, 2).unsqueeze(2)  # (B, channels, 1, M + k - 1)
        y = F.conv2d(padded, weight[:, None, None], groups=x.shape[-1])  # (B, channels, 1, M)
        return y.squeeze(2).transpose(1, 2) + bias

    def flops(self, grid: Grid, review_pool: Grid) -> int:
        """Forward FLOPs of one sample; grid and pooling box in scan order. Projections, convolution, scan."""
        tokens = grid[0] * grid[1] * grid[2]
        length = tokens + review_count(grid, review_pool)
        projections = 2 * tokens * self.in_proj.in_features * (self.in_proj.out_features + self.inner)
        conv = 2 * length * 2 * (self.inner + 2 * self.d_state) * self.conv_kernel
        scan = ssd_flops(length, 2 * self.heads, self.head_dim, 2, self.d_state, self.chunk_size)
        return projections + conv + scan
