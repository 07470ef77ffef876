"""Metrics against independent references, and what they say of equal and of bad videos."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data.synthetic import render_clip
from lingen.errors import UserError
from lingen.evaluation.metrics import SAME_DB, Lpips, attributes, psnr, ssim, steadiness


def videos(seed: int = 0, frames: int = 20, height: int = 24, width: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (3, F, H, W) uint8 that resemble each other."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (3, frames, height, width)).astype(np.float64)
    smooth = np.stack([[cv2.GaussianBlur(f, (5, 5), 2) for f in channel] for channel in base])
    other = np.clip(smooth + rng.normal(0, 9, smooth.shape), 0, 255)
    return torch.from_numpy(smooth.astype(np.uint8)), torch.from_numpy(other.astype(np.uint8))


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One picture (H, W), by OpenCV's filter in float64."""
    window = cv2.getGaussianKernel(11, 1.5)
    window = window @ window.T

    def mean(z: np.ndarray) -> np.ndarray:
        return cv2.filter2D(z, -1, window)[5:-5, 5:-5]

    x, y = x.astype(np.float64), y.astype(np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 6.5025, 58.5225
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_psnr_is_the_mean_over_frames() -> None:
    a, b = videos()
    by_frame = [cv2.PSNR(x.numpy(), y.numpy()) for x, y in zip(a.unbind(1), b.unbind(1), strict=True)]
    assert psnr(a, b) == pytest.approx(np.mean(by_frame), abs=1e-6)
    half = a.clone()
    half[:, :10] = b[:, :10]
    assert psnr(a, half) == pytest.approx((np.mean(by_frame[:10]) + SAME_DB) / 2, abs=1e-6)
    assert psnr(a, a) == SAME_DB


def test_ssim_agrees_with_opencv() -> None:
    a, b = videos()
    expected = np.mean(
        [reference_ssim(x, y) for x, y in zip(a.flatten(0, 1).numpy(), b.flatten(0, 1).numpy(), strict=True)]
    )
    assert 0.3 < expected < 0.99
    assert ssim(a, b) == pytest.approx(expected, abs=2e-5)
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)
    flat = torch.full_like(a, 255)
    assert ssim(flat, flat) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(a[..., :10], b[..., :10])


def test_steadiness_is_vbenchs() -> None:
    video, _ = videos(frames=40)
    frames = video.permute(1, 2, 3, 0).numpy().astype(np.float32)
    differences = [np.mean(cv2.absdiff(x, y)) for x, y in pairwise(frames)]
    assert steadiness(video) == pytest.approx((255.0 - np.mean(differences)) / 255.0, abs=1e-6)
    assert steadiness(video[:, :1].expand(-1, 5, -1, -1)) == 1
    flash = torch.zeros(3, 7, 12, 12, dtype=torch.uint8)
    flash[:, ::2] = 255
    assert steadiness(flash) == 0
    with pytest.raises(ValueError, match="flicker"):
        steadiness(video[:, :1])


def test_attributes_are_all_there_on_rendered_clips_and_none_in_noise() -> None:
    rng = np.random.default_rng(0)
    for n in range(20):
        pixels, caption = render_clip(11, n, frames=17, size=64)
        video = torch.from_numpy(pixels).permute(3, 0, 1, 2)
        assert attributes(video, caption) == {"colour": 1, "shape": 1, "motion": 1, "attributes": 1}
        noise = torch.from_numpy(rng.integers(0, 256, video.shape, dtype=np.uint8))
        assert attributes(noise, caption)["attributes"] == 0
    other = "a yellow circle rising" if "yellow" not in caption else "a red circle rising"
    assert attributes(video, other)["colour"] == 0 and attributes(video, other)["attributes"] == 0
    assert attributes(video, "two dogs") == {}
    assert set(attributes(video[:, :1], caption)) == {"colour", "shape", "attributes"}


def lpips_weights(seed: int, *, lins: bool = True) -> dict[str, torch.Tensor]:
    """A VGG of three small levels, one convolution each."""
    rng = torch.Generator().manual_seed(seed)
    weights, channels = {}, 3
    for level, place in enumerate((0, 3, 6)):
        weights[f"net.features.{place}.weight"] = torch.randn(4, channels, 3, 3, generator=rng)
        weights[f"net.features.{place}.bias"] = torch.randn(4, generator=rng)
        channels = 4
        if lins:
            weights[f"lin{level}.model.1.weight"] = torch.rand(1, 4, 1, 1, generator=rng)
    return weights


def test_lpips_does_not_depend_on_how_frames_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(lpips_weights(0), tmp_path / "lpips.safetensors")
    distance = Lpips(str(tmp_path / "lpips.safetensors"))
    a, b = videos(frames=20)
    together = distance(a, b)
    assert together > 0 and distance(a, a) == 0
    monkeypatch.setattr("lingen.evaluation.metrics.FRAMES", 3)
    assert distance(a, b) == pytest.approx(together, rel=1e-5)
    alone = [distance(x[:, None], y[:, None]) for x, y in zip(a.unbind(1), b.unbind(1), strict=True)]
    assert together == pytest.approx(np.mean(alone), rel=1e-5)


def test_lpips_is_computed_where_the_videos_are(tmp_path: Path) -> None:
    save_file(lpips_weights(0), tmp_path / "lpips.safetensors")
    distance = Lpips(str(tmp_path / "lpips.safetensors"))
    a, b = (video.to("meta") for video in videos())
    with pytest.raises(RuntimeError, match="meta tensors"):  # there are no numbers there
        distance(a, b)
    assert {part.device.type for pair in distance._distance._convs.values() for part in pair} == {"meta"}


def test_what_is_no_lpips_is_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("none", None, "cannot be read"),
        ("text", b"not tensors", "cannot be read"),
        ("other", {"a": torch.zeros(2)}, "no VGG"),
        ("vgg", lpips_weights(0, lins=False), "without LPIPS' own weights"),
    ):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            save_file(content, path)
        with pytest.raises(UserError, match=f"lpips=.*{name}.*{message}"):
            Lpips(str(path))


def test_videos_of_other_shapes_or_types_are_refused() -> None:
    a, b = videos()
    for distance in (psnr, ssim):
        with pytest.raises(ValueError, match="of one shape"):
            distance(a, b[:, :5])
        with pytest.raises(ValueError, match="uint8"):
            distance(a.float(), b.float())
