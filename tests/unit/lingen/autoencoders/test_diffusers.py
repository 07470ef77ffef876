"""The adapter to the VAEs of diffusers: each class's ratios, numbers and habits, on small random instances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.autoencoders import to_float
from lingen.autoencoders.diffusers import DiffusersVae
from lingen.autoencoders.rules import RULES, Rule
from tests.vaes import RATIOS, SETTINGS, VIDEO, clip, load, make, save

Saved = Callable[[str], Path]
CAUSAL = ["AutoencoderKLWan", "AutoencoderKLHunyuanVideo15", "AutoencoderKLMochi", "AutoencoderKLCosmos"]
MEAN, STD = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1, 1), torch.tensor([2, 1, 0.5, 0.25]).view(1, 4, 1, 1, 1)


def by_hand(name: str, z: torch.Tensor) -> torch.Tensor:
    """What the pipelines of a class make of its latents (B, C, 3, h, w), written out."""
    if name == "AutoencoderKLWan":
        return (z - MEAN) / STD
    if name == "AutoencoderKLMochi":
        return (z - MEAN) * 0.5 / STD
    if name == "AutoencoderKLLTXVideo":
        mean, std = torch.linspace(-0.5, 0.5, 8), torch.linspace(0.5, 2, 8)
        return (z - mean.view(1, 8, 1, 1, 1)) * 0.5 / std.view(1, 8, 1, 1, 1)
    if name == "AutoencoderKLCosmos":
        index = torch.arange(12.0).view(1, 4, 3, 1, 1)  # a channel's three latent frames are neighbours in the list
        return (z - 0.1 * index) / (1 + 0.1 * index)
    if name == "AutoencoderKL":
        return (z - 0.2) * 0.5
    if name == "AutoencoderKLCogVideoX":
        return z * 1.15258426
    if name == "AutoencoderKLHunyuanVideo":
        return z * 0.476986
    if name == "AutoencoderKLHunyuanVideo15":
        return z * 1.03682
    assert name == "AutoencoderDC"
    return z * 0.5


def raw(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The class's own latents; images one by one."""
    with torch.no_grad():
        if pixels.ndim == 5 and type(vae).__name__ in ("AutoencoderKL", "AutoencoderDC"):
            return torch.stack([raw(vae, frame) for frame in pixels.unbind(2)], dim=2)
        encoded = vae.encode(pixels)
        mode: torch.Tensor = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        return mode


def test_every_rule_has_an_instance_here() -> None:
    assert set(RULES) == set(RATIOS) == set(SETTINGS)


@pytest.mark.parametrize("name", RATIOS)
def test_a_class_is_what_its_pipelines_make_of_it(saved: Saved, name: str) -> None:
    channels, time, space = RATIOS[name]
    autoencoder = load(saved(name), name)
    assert (autoencoder.channels, autoencoder.time, autoencoder.space) == RATIOS[name]
    pixels = clip(2 * time + 1, 2 * space, 4 * space)
    vae = make(name)
    vae.use_framewise_encoding = False  # HunyuanVideo's own tiles
    latents = autoencoder.encode(pixels)
    assert latents.shape == (1, channels, 3, 2, 4) and latents.dtype == torch.float32 and not latents.requires_grad
    torch.testing.assert_close(latents, by_hand(name, raw(vae, pixels)), atol=1e-5, rtol=1e-4)
    decoded = autoencoder.decode(latents)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1 and decoded.dtype == torch.float32
    with torch.no_grad():
        z = raw(vae, pixels)
        images = [vae.decode(frame).sample for frame in z.unbind(2)] if time == 1 else []
        expected = torch.stack(images, dim=2) if images else vae.decode(z).sample
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKL"])
def test_bytes_batches_and_autocast_give_the_same_latents(saved: Saved, name: str) -> None:
    autoencoder = load(saved(name), name)
    pixels = ((torch.cat([clip(5, 16, 16, seed=s) for s in (0, 1)]) + 1) * 127.5).to(torch.uint8)
    latents = autoencoder.encode(pixels)
    assert torch.equal(latents, autoencoder.encode(to_float(pixels)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(latents, autoencoder.encode(pixels))
        assert torch.equal(autoencoder.decode(latents), autoencoder.decode(latents.clone()))
    torch.testing.assert_close(autoencoder.encode(pixels[1:]), latents[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*CAUSAL, "AutoencoderKLLTXVideo", "AutoencoderKL"])
def test_the_first_latent_frame_is_the_first_frame_alone(saved: Saved, name: str) -> None:
    _, time, space = RATIOS[name]
    autoencoder = load(saved(name), name)
    pixels = clip(2 * time + 1, 2 * space, 2 * space)
    latents = autoencoder.encode(pixels)
    torch.testing.assert_close(autoencoder.encode(pixels[:, :, :1]), latents[:, :, :1], atol=1e-5, rtol=1e-4)
    changed = pixels.clone()
    changed[:, :, time + 1 :] *= -1
    torch.testing.assert_close(autoencoder.encode(changed)[:, :, :2], latents[:, :, :2], atol=1e-5, rtol=1e-4)
    assert (autoencoder.encode(changed)[:, :, 2] - latents[:, :, 2]).abs().max() > 1e-4


@pytest.mark.parametrize("name", VIDEO)
def test_frames_that_would_be_dropped_are_refused(saved: Saved, name: str) -> None:
    _, time, space = RATIOS[name]
    autoencoder = load(saved(name), name)
    for shape in ((time, space, space), (2 * time, space, space), (1, space + 1, space), (1, space, space - 1)):
        with pytest.raises(ValueError, match=rf"is not \({time}\*k \+ 1\) x multiples of {space}"):
            autoencoder.encode(torch.zeros(1, 3, *shape))


def test_cogvideox_decodes_any_number_of_latent_frames(saved: Saved) -> None:
    name = "AutoencoderKLCogVideoX"
    autoencoder, vae = load(saved(name), name), make(name)
    latents = autoencoder.encode(clip(13, 16, 16))  # 4 latent frames, which the class alone makes 16 frames of
    with torch.no_grad():
        assert vae.decode(latents / 1.15258426).sample.shape[2] == 16
    decoded = autoencoder.decode(latents)
    assert decoded.shape[2] == 13
    five = autoencoder.decode(torch.cat([latents, latents[:, :, -1:]], dim=2))
    assert torch.equal(decoded, five[:, :, :13])
    three = autoencoder.decode(latents[:, :, :3])
    assert (decoded[:, :, :9] - three).abs().max() < 0.05  # what is appended does not reach back


def test_cosmos_has_its_last_statistics_for_all_later_frames(saved: Saved) -> None:
    name = "AutoencoderKLCosmos"
    pixels = clip(8 * 5 + 1, 16, 16)
    whole, z = load(saved(name), name), raw(make(name), pixels)
    index = torch.arange(12.0).view(1, 4, 3, 1, 1)[:, :, [0, 1, 2, 2, 2, 2]]
    latents = whole.encode(pixels)
    torch.testing.assert_close(latents, (z - 0.1 * index) / (1 + 0.1 * index), atol=1e-5, rtol=1e-4)
    tiles = load(saved(name), name, tile={"frames": 25, "overlap": 0.5}).encode(pixels)  # counted from the clip's start
    assert (tiles - latents).abs().max() < 0.2 * latents.std()


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLMochi", "AutoencoderKL"])
def test_latents_have_mean_0_and_variance_1_where_the_statistics_are_right(tmp_path: Path, name: str) -> None:
    _, time, space = RATIOS[name]
    pixels = torch.cat([clip(4 * time + 1, 4 * space, 4 * space, seed=s) for s in range(2)])
    z = raw(make(name), pixels).transpose(0, 1).flatten(1)  # (C, positions)
    measured = {"latents_mean": z.mean(1).tolist(), "latents_std": z.std(1).tolist()}
    scale = {} if name == "AutoencoderKLWan" else {"scaling_factor": 1.0}
    latents = load(save(tmp_path, name, **measured, **scale), name).encode(pixels).transpose(0, 1).flatten(1)
    assert latents.mean(1).abs().max() < 1e-3
    torch.testing.assert_close(latents.std(1), torch.ones(4), atol=1e-3, rtol=0)


def test_ltx_decodes_the_same_each_time_although_its_decoder_draws_noise(tmp_path: Path) -> None:
    name = "AutoencoderKLLTXVideo"
    later = {"timestep_conditioning": True, "decoder_inject_noise": (True,) * 5}
    vae = make(name, **later)
    for key, parameter in vae.named_parameters():
        if "per_channel_scale" in key:
            torch.nn.init.ones_(parameter)  # 0 in a fresh instance: noise would not show
    vae.save_pretrained(tmp_path / name)
    autoencoder = load(tmp_path / name, name)
    latents = autoencoder.encode(clip(9, 64, 64))
    state = torch.get_rng_state()
    decoded = autoencoder.decode(latents)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(autoencoder.decode(latents), decoded)


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLMochi"])
def test_bf16_is_close_and_gives_fp32_latents(saved: Saved, name: str) -> None:
    _, time, space = RATIOS[name]
    pixels = clip(time + 1, 2 * space, 2 * space)
    full, half = load(saved(name), name), load(saved(name), name, dtype="bf16")
    latents = full.encode(pixels)
    rounded = half.encode(pixels)
    assert rounded.dtype == half.decode(rounded).dtype == torch.float32
    assert 0 < (rounded - latents).square().mean().sqrt() < 0.05 * latents.std()  # measured: 0.02
    assert half.fingerprint == full.fingerprint  # the same latent space


def test_the_fingerprint_is_of_weights_config_and_statistics(saved: Saved, tmp_path: Path) -> None:
    name = "AutoencoderKLCosmos"
    first = load(saved(name), name).fingerprint
    assert len(first) == 64 and first == load(save(tmp_path / "a", name), name).fingerprint
    assert first == load(saved(name), name, tile={"frames": 25}).fingerprint
    other = [
        save(tmp_path / "b", name, patch_type="rearrange"),  # another function of the same weights
        save(tmp_path / "c", name, latents_mean=[0.0] * 12),
    ]
    vae = make(name)
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-3
    vae.save_pretrained(tmp_path / "d")
    prints = {load(folder, name).fingerprint for folder in (*other, tmp_path / "d")}
    assert len(prints | {first}) == 4


def test_attributes_that_lie_are_not_believed(tmp_path: Path) -> None:
    folder = save(tmp_path, "AutoencoderKLWan", scale_factor_spatial=99, scale_factor_temporal=99)
    assert load(folder, "AutoencoderKLWan").space == 8
    folder = save(tmp_path, "AutoencoderKLLTXVideo", temporal_compression_ratio=2)
    assert load(folder, "AutoencoderKLLTXVideo").time == 8


class NotCausal(torch.nn.Module):
    """Latents of every second frame, the first as the others."""

    config: dict[str, Any] = {}  # noqa: RUF012

    def encode(self, pixels: torch.Tensor) -> Any:
        frames = pixels[:, :, ::2, ::4, ::4]
        if pixels.shape[2] % 2 and pixels.shape[2] > 1:
            frames = frames[:, :, 1:]
        return type("Encoded", (), {"latent": frames})

    def decode(self, latents: torch.Tensor) -> Any:
        pixels = latents.repeat_interleave(4, 3).repeat_interleave(4, 4).repeat_interleave(2, 2)
        return type("Decoded", (), {"sample": pixels})


def test_a_vae_that_is_not_causal_is_refused() -> None:
    rule = Rule(lambda vae: (torch.zeros(1, 1), torch.ones(1, 1)))
    with pytest.raises(ValueError, match=r"1 frames of 8x8 become 1 latent frames, and these 2 frames"):
        DiffusersVae(NotCausal(), rule, "", "cpu", torch.float32)
