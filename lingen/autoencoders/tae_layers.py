"""The layers of our own autoencoder: those of an image autoencoder, and after each one of them its like along time.

Shapes: B clips, F frames, C channels, H x W positions. Inside a frame everything is as in an image: convolutions,
norms and attention see frames one by one, (B*F, C, H, W).

Along time everything looks back only, and nothing is there before the first frame: a convolution finds zeros, attention
an empty place. So an image, a clip of one frame, passes as if there were no layers along time, and what is trained on
images leaves their weights as they are: such a model is inflated whenever videos come.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

TAPS = 3  # frames that a convolution along time sees: its own and those before


def by_frame(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``layer``, which knows images (N, C, H, W), on the frames of clips: (B, F, C, H, W) -> (B, F, C', H', W')."""
    out = layer(x.flatten(0, 1))
    return out.view(*x.shape[:2], *out.shape[1:])


class TimeConv(nn.Module):
    """A convolution along time; at first the identity, or with a ``stride`` the choice of each so many-th frame."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.zeros(channels, channels, TAPS, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.eye_(self.weight[:, :, -1, 0, 0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) -> (B, (F - 1) / stride + 1, C, H, W)."""
        if x.shape[1] == 1:
            return by_frame(lambda frame: functional.conv2d(frame, self.weight[:, :, -1], self.bias), x)
        x = functional.pad(x.transpose(1, 2), (0, 0, 0, 0, TAPS - 1, 0))  # (B, C, 2 + F, H, W)
        return functional.conv3d(x, self.weight, self.bias, stride=(self.stride, 1, 1)).transpose(1, 2)


class Conv(nn.Module):
    """A convolution in space, then one in time. A stride divides the sides; ``time_stride`` the frames."""

    def __init__(self, into: int, out: int, *, kernel: int = 3, stride: int = 1, time_stride: int = 1) -> None:
        super().__init__()
        self.space = nn.Conv2d(into, out, kernel, stride, padding=kernel // 2)
        self.time = TimeConv(out, time_stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) -> (B, F', C', H', W')."""
        y: torch.Tensor = self.time(by_frame(self.space, x))
        return y


class Upsample(nn.Module):
    """Each position becomes 2 x 2; where ``time``, each frame but the first becomes two."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = TimeConv(channels)
        self.doubles = time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) -> (B, F or 2F - 1, C, 2H, 2W)."""
        x = by_frame(lambda frame: self.space(functional.interpolate(frame, scale_factor=2.0)), x)
        if self.doubles:
            x = x.repeat_interleave(2, dim=1)[:, 1:]
        y: torch.Tensor = self.time(x)
        return y


def norm(channels: int) -> nn.GroupNorm:
    """Over four channels or more of one frame."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(into), Conv(into, out)
        self.norm2, self.conv2 = norm(out), Conv(out, out)
        self.shortcut = nn.Identity() if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) -> (B, F, C', H, W)."""
        y = self.conv1(by_frame(lambda frame: functional.silu(self.norm1(frame)), x))
        y = self.conv2(by_frame(lambda frame: functional.silu(self.norm2(frame)), y))
        out: torch.Tensor = by_frame(self.shortcut, x) + y
        return out


class SpaceAttention(nn.Module):
    """Attention among the positions of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) -> the same."""
        return x + by_frame(self._attend, x)

    def _attend(self, frame: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.flatten(2).transpose(1, 2)[:, None] for part in self.qkv(self.norm(frame)).chunk(3, dim=1))
        seen = functional.scaled_dot_product_attention(q, k, v)  # (N, 1, H*W, C)
        y: torch.Tensor = self.out(seen[:, 0].transpose(1, 2).reshape(frame.shape))
        return y


class TimeAttention(nn.Module):
    """Attention of a position among the frames *before* its own, and an empty place; at first it adds nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels, bias=False)  # of nothing seen it makes nothing
        nn.init.zeros_(self.out.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) -> the same."""
        frames = x.shape[1]
        tokens = by_frame(self.norm, x).permute(0, 3, 4, 1, 2)  # (B, H, W, F, C)
        q, k, v = self.qkv(tokens.flatten(0, 2)).chunk(3, dim=-1)  # (B*H*W, F, C)
        k, v = (functional.pad(part, (0, 0, 1, 0)) for part in (k, v))  # the empty place first: (B*H*W, 1 + F, C)
        before = torch.ones(frames, frames + 1, dtype=torch.bool, device=x.device).tril()  # frame f: places 0 to f
        seen = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=before)[:, 0]
        y: torch.Tensor = self.out(seen).view(tokens.shape).permute(0, 3, 4, 1, 2)
        return x + y


class Middle(nn.Sequential):
    """Where all positions and frames see each other."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            ResBlock(channels, channels),
            SpaceAttention(channels),
            TimeAttention(channels),
            ResBlock(channels, channels),
        )


class Out(nn.Module):
    """norm, SiLU, convolution."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm, self.conv = norm(into), Conv(into, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) -> (B, F, C', H, W)."""
        y: torch.Tensor = self.conv(by_frame(lambda frame: functional.silu(self.norm(frame)), x))
        return y


class Stack(nn.ModuleList):
    """Layers one after the other; ``recompute`` keeps their inputs alone for the backward."""

    recompute = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) -> (B, F', C', H', W')."""
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else layer(x)
        return x
