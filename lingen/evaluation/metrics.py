"""How near a video is to another, how it flickers, and whether it shows what its caption says.

Shapes: F frames, H x W pixels; videos are (3, F, H, W) uint8.
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from data.checks import check_colour, check_motion, check_shape
from data.synthetic import parse_caption
from lingen.autoencoders.tae_losses import Perceptual
from lingen.errors import UserError

SAME_DB = 100.0  # the PSNR of equal frames, and the most that a frame can have
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian (Wang et al. 2004, section III-C)
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # SSIM's constants, K1 and K2 of the same section
FRAMES = 16  # that are compared at once: what bounds the memory


def psnr(video: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: the mean over frames, at most 100 each.

    So do the evaluations of PAB and AdaCache (VideoSys, eval/pab); the PSNR of a whole video's error would be lower.
    """
    _check(video, other)
    errors = [
        (a.double() - b.double()).square().mean((0, 2, 3))  # (frames,)
        for a, b in zip(torch.split(video, FRAMES, 1), torch.split(other, FRAMES, 1), strict=True)
    ]
    decibels = 10 * torch.log10(255.0**2 / torch.cat(errors))  # infinite where frames are equal
    return float(decibels.clamp(max=SAME_DB).mean())


def ssim(video: Tensor, other: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13) in [-1, 1]: the mean over colours, frames and the windows of
    11 x 11 pixels that lie inside.

    Raises:
        ValueError: frames smaller than a window, or of different shapes.
    """
    _check(video, other)
    if min(video.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} pixels a side, got {tuple(video.shape[2:])}")
    parts = zip(torch.split(video, FRAMES, 1), torch.split(other, FRAMES, 1), strict=True)
    total = sum((_ssim(a.float().flatten(0, 1), b.float().flatten(0, 1)).double().sum().item() for a, b in parts), 0.0)
    return total / (video.shape[0] * video.shape[1])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """(N, H, W) pictures of one colour -> (N,)."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()

    def mean(z: Tensor) -> Tensor:
        across = functional.conv2d(z[:, None], weights.view(1, 1, 1, -1))  # (N, 1, H, W - 10)
        return functional.conv2d(across, weights.view(1, 1, -1, 1))  # (N, 1, H - 10, W - 10)

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    similarity = (2 * mu_x * mu_y + C1) * (2 * cov + C2) / ((mu_x**2 + mu_y**2 + C1) * (var_x + var_y + C2))
    return similarity.mean((1, 2, 3))


def steadiness(video: Tensor) -> float:
    """VBench's temporal flickering: 1 - |neighbouring frames' difference| / 255, in [0, 1], 1 where nothing changes.

    VBench measures it on still scenes alone: motion lowers it too, so compare videos of the same prompts.

    Raises:
        ValueError: one frame has no neighbour.
    """
    if video.shape[1] < 2:
        raise ValueError("one frame cannot flicker")
    pairs = zip(torch.split(video[:, :-1], FRAMES, 1), torch.split(video[:, 1:], FRAMES, 1), strict=True)
    total = sum((a.double() - b.double()).abs().sum().item() for a, b in pairs)
    return 1 - total / video[:, 1:].numel() / 255


def attributes(video: Tensor, caption: str) -> dict[str, float]:
    """For each of colour, shape and motion that a caption of the rendered world names, 1 where the video shows it and
    0 where not; "attributes" is 1 where it shows all of them. Empty for other captions."""
    scene, pixels = parse_caption(caption), video.cpu().numpy()
    found = {}
    if scene.colour is not None:
        found["colour"] = float(check_colour(pixels, scene.colour))
    if scene.shape is not None:
        found["shape"] = float(check_shape(pixels, scene.shape))
    if scene.motion is not None and video.shape[1] > 1:
        found["motion"] = float(check_motion(pixels, scene.motion))
    return found | ({"attributes": min(found.values())} if found else {})


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018) of two videos, the mean over frames; 0 where they are equal."""

    def __init__(self, path: str) -> None:
        """Raises:
        UserError: ``path`` is no safetensors file with LPIPS' weights for VGG.
        """
        try:
            self._distance = Perceptual(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"lpips={path} cannot be read as safetensors: {error}") from error
        except (ValueError, KeyError) as error:
            raise UserError(f"lpips={path} holds no VGG that is known here: {error}") from error
        if not self._distance.is_lpips:
            raise UserError(f"lpips={path} holds a VGG without LPIPS' own weights (lin0 to lin4)")

    @torch.no_grad()
    def __call__(self, video: Tensor, other: Tensor) -> float:
        """The distance of two videos, computed where they are."""
        _check(video, other)
        self._distance.to(video.device, torch.float32)
        total = 0.0
        for a, b in zip(torch.split(video, FRAMES, 1), torch.split(other, FRAMES, 1), strict=True):
            one, two = (part[None].float() / 127.5 - 1 for part in (a, b))  # (1, 3, frames, H, W) in [-1, 1]
            total += self._distance(one, two).item() * a.shape[1]
        return total / video.shape[1]


def _check(video: Tensor, other: Tensor) -> None:
    if video.shape != other.shape or video.dtype != torch.uint8 or other.dtype != torch.uint8:
        raise ValueError(f"two uint8 videos of one shape, got {tuple(video.shape)} and {tuple(other.shape)}")
