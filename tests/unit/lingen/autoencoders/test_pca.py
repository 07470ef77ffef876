"""The PCA autoencoder: its definition, causality, whitening, and how well it keeps the rendered world."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.synthetic import render_clip
from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders import load_autoencoder, to_float
from lingen.autoencoders.pca import PcaAutoencoder, fit_pca
from lingen.errors import UserError

T, S, C = 4, 4, 10  # a small one, for all but the rendered world


def _noise(clips: int, frames: int, height: int = 16, width: int = 24, *, seed: int = 0) -> torch.Tensor:
    """(B, 3, F, H, W) uint8: smooth in time, so that few channels hold much."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(clips, 3, frames, height, width, generator=generator)
    return (128 + 20 * steps.cumsum(2)).clamp(0, 255).to(torch.uint8)


def _fit(clips: torch.Tensor, channels: int = C, time: int = T, space: int = S) -> dict[str, torch.Tensor]:
    return fit_pca(clips, channels=channels, time=time, space=space, image_share=0.5)


def _make(tensors: dict[str, torch.Tensor]) -> PcaAutoencoder:
    return PcaAutoencoder(tensors["basis"], tensors["mean"], tensors["std"], "cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The eigenvectors of a 1536 x 1536 matrix take two threads many times longer where another process runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return _fit(_noise(20, 9))


@pytest.fixture(scope="module")
def autoencoder(tensors: dict[str, torch.Tensor]) -> PcaAutoencoder:
    return _make(tensors)


def _psnr(autoencoder: PcaAutoencoder, pixels: torch.Tensor) -> float:
    error = (autoencoder.decode(autoencoder.encode(pixels)) - to_float(pixels)).square().mean()
    return 10 * math.log10(4 / float(error))


def _world(seed: int, clips: int, *, frames: int, size: int) -> torch.Tensor:
    """(B, 3, F, S, S) uint8."""
    rendered = [torch.from_numpy(render_clip(seed, i, frames=frames, size=size)[0]) for i in range(clips)]
    return torch.stack(rendered).permute(0, 4, 1, 2, 3).contiguous()


def test_the_rendered_world_is_kept_at_26_decibels() -> None:
    seen = [*_world(0, 64, frames=17, size=64), *_world(0, 64, frames=1, size=64)]
    autoencoder = _make(fit_pca(seen, channels=16, time=8, space=8, image_share=0.5))
    assert _psnr(autoencoder, _world(1, 24, frames=17, size=64)) > 26  # measured: 27.5
    assert _psnr(autoencoder, _world(2, 32, frames=1, size=64)) > 28  # 29.4
    assert _psnr(autoencoder, _world(3, 4, frames=33, size=128)) > 28  # 30


def test_encode_is_the_whitened_projection(autoencoder: PcaAutoencoder, tensors: dict[str, torch.Tensor]) -> None:
    pixels = _noise(2, 9, seed=1)
    latents = autoencoder.encode(pixels)
    assert latents.shape == (2, C, 3, 4, 6) and latents.dtype == torch.float32
    patch = to_float(pixels)[1, :, 5:9, 8:12, 12:16]  # of latent frame 2, row 2, column 3
    expected = torch.einsum("ctuvw,tuvw->c", tensors["basis"], patch - tensors["mean"]) / tensors["std"]
    torch.testing.assert_close(latents[1, :, 2, 2, 3], expected, atol=1e-4, rtol=1e-4)
    first = to_float(pixels)[0, :, :1, 4:8, :4].expand(3, T, S, S)  # the first frame stands for t equal ones
    expected = torch.einsum("ctuvw,tuvw->c", tensors["basis"], first - tensors["mean"]) / tensors["std"]
    torch.testing.assert_close(latents[0, :, 0, 1, 0], expected, atol=1e-4, rtol=1e-4)


def test_all_channels_keep_everything() -> None:
    clips = _noise(40, 5, 8, 8)
    autoencoder = _make(_fit(clips, channels=3 * 2 * 2 * 2, time=2, space=2))
    pixels = _noise(3, 5, 6, 10, seed=2)
    restored = autoencoder.decode(autoencoder.encode(pixels))
    torch.testing.assert_close(restored, to_float(pixels), atol=1e-4, rtol=0)


def test_latents_are_whitened_over_what_was_fitted() -> None:
    clips = _noise(30, 9)
    latents = _make(_fit(clips)).encode(clips).double()
    images, videos = latents[:, :, :1].transpose(0, 1).flatten(1), latents[:, :, 1:].transpose(0, 1).flatten(1)
    mean = (images.mean(1) + videos.mean(1)) / 2  # image_share is a half
    second = (images @ images.T / images.shape[1] + videos @ videos.T / videos.shape[1]) / 2
    assert mean.abs().max() < 1e-3
    torch.testing.assert_close(second, torch.eye(C, dtype=torch.float64), atol=1e-3, rtol=0)


def test_it_is_causal_and_an_image_is_a_first_frame(autoencoder: PcaAutoencoder) -> None:
    pixels = _noise(2, 9, seed=3)
    latents = autoencoder.encode(pixels)
    changed = pixels.clone()
    changed[:, :, 5:] = 0
    assert torch.equal(autoencoder.encode(changed)[:, :, :2], latents[:, :, :2])
    assert not torch.equal(autoencoder.encode(changed)[:, :, 2], latents[:, :, 2])
    assert torch.equal(autoencoder.encode(pixels[:, :, :1]), latents[:, :, :1])
    decoded = autoencoder.decode(latents)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1
    assert torch.equal(autoencoder.decode(latents[:, :, :1]), decoded[:, :, :1])
    assert torch.equal(autoencoder.decode(latents[:, :, :2]), decoded[:, :, :5])


def test_the_first_frame_is_the_average_of_the_repeated_ones(autoencoder: PcaAutoencoder) -> None:
    latents = 0.1 * torch.randn(1, C, 1, 2, 2, generator=torch.Generator().manual_seed(0))  # small: nothing is clamped
    as_a_clip = autoencoder.decode(latents.repeat(1, 1, 2, 1, 1))[:, :, 1:]  # (1, 3, t, H, W)
    assert as_a_clip.abs().max() < 1
    torch.testing.assert_close(autoencoder.decode(latents), as_a_clip.mean(2, keepdim=True), atol=1e-5, rtol=0)


def test_bytes_and_floats_give_the_same_latents_also_under_autocast(autoencoder: PcaAutoencoder) -> None:
    pixels = _noise(2, 5, seed=4)
    latents = autoencoder.encode(pixels)
    assert torch.equal(autoencoder.encode(to_float(pixels)), latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(autoencoder.encode(pixels), latents)
        assert torch.equal(autoencoder.decode(latents), autoencoder.decode(latents.clone()))
        assert autoencoder.decode(latents.bfloat16()).dtype == torch.float32
    assert not autoencoder.encode(to_float(pixels).requires_grad_()).requires_grad


def test_the_fit_is_deterministic_and_signs_are_fixed(tensors: dict[str, torch.Tensor]) -> None:
    again = _fit(_noise(20, 9))
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    flat = tensors["basis"].flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(C), atol=1e-5, rtol=0)
    assert (flat.gather(1, flat.abs().argmax(1, keepdim=True)) > 0).all()
    assert (tensors["std"].diff() <= 0).all()


def test_images_alone_can_be_fitted() -> None:
    images = _noise(40, 1)
    latents = _make(_fit(images)).encode(images)
    assert latents.shape == (40, C, 1, 4, 6)
    assert _psnr(_make(_fit(images, channels=3 * S * S)), images) > 60  # images have no more directions


def test_too_few_directions_are_refused() -> None:
    with pytest.raises(UserError, match="channels=49: these clips vary in 48 directions only"):
        _fit(_noise(40, 1), channels=3 * S * S + 1)


@pytest.mark.parametrize("shape", [(8, 16, 16), (9, 15, 16), (9, 16, 18)])
def test_shapes_that_would_be_cut_are_refused(autoencoder: PcaAutoencoder, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"\(4\*k \+ 1\) x multiples of 4"):
        autoencoder.encode(torch.zeros(1, 3, *shape))


def _config(path: Path, **more: int) -> AutoencoderConfig:
    return AutoencoderConfig.model_validate(
        {"kind": "pca", "path": str(path), "channels": C, "time": T, "space": S, **more}
    )


def test_a_file_gives_back_the_same_autoencoder(
    tmp_path: Path, autoencoder: PcaAutoencoder, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, tmp_path / "ae.safetensors", metadata={"kind": "pca"})
    loaded = load_autoencoder(_config(tmp_path / "ae.safetensors"), "cpu")
    assert (loaded.channels, loaded.time, loaded.space) == (C, T, S)
    assert loaded.fingerprint == autoencoder.fingerprint and len(loaded.fingerprint) == 64
    pixels = _noise(1, 5)
    assert torch.equal(loaded.encode(pixels), autoencoder.encode(pixels))
    assert _make(tensors | {"std": tensors["std"] * 1.0001}).fingerprint != autoencoder.fingerprint


def test_bad_files_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "ae.safetensors"
    with pytest.raises(UserError, match=r"autoencoder.path=.* fit one with: python scripts/fit_autoencoder.py"):
        load_autoencoder(_config(file), "cpu")
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_autoencoder(_config(file), "cpu")
    save_file({"weight": torch.zeros(3)}, file, metadata={"kind": "pca"})
    with pytest.raises(UserError, match="does not hold a 'pca' autoencoder"):
        load_autoencoder(_config(file), "cpu")
    save_file(tensors, file, metadata={"kind": "pca"})
    for key in ("channels", "time", "space"):
        with pytest.raises(UserError, match=rf"autoencoder.{key}=2, but .* has (10|4); set autoencoder.{key}="):
            load_autoencoder(_config(file, **{key: 2}), "cpu")
