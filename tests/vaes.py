"""Small random instances of the VAE classes of diffusers, saved as they are fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders import Autoencoder, load_autoencoder

FOUR = (8, 8, 8, 8)
ONES = (1, 1, 1, 1, 1)
SETTINGS: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0, 1.0, 0.5, 0.25],
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": FOUR, "layers_per_block": 1, "norm_num_groups": 1,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": (8, *FOUR), "layers_per_block": 1,
    },
    "AutoencoderKLCogVideoX": {
        "latent_channels": 4, "block_out_channels": FOUR, "layers_per_block": 1, "norm_num_groups": 1,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": FOUR, "decoder_block_out_channels": FOUR,
        "layers_per_block": ONES, "decoder_layers_per_block": ONES, "scaling_factor": 0.5,
    },
    "AutoencoderKLMochi": {
        "latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": ONES, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0, 1.0, 0.5, 0.25],
        "scaling_factor": 0.5,
    },
    "AutoencoderKLCosmos": {
        "latent_channels": 4, "encoder_block_out_channels": FOUR, "decode_block_out_channels": FOUR, "num_layers": 1,
        "attention_resolutions": (8,), "resolution": 64,
        "latents_mean": [0.1 * n for n in range(12)], "latents_std": [1 + 0.1 * n for n in range(12)],  # 3 frames each
    },
    "AutoencoderKL": {
        "latent_channels": 4, "block_out_channels": FOUR, "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 1, "shift_factor": 0.2, "scaling_factor": 0.5,
    },
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.5,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 1),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_out_channels": (8, 8),
        "decoder_qkv_multiscales": ((), (5,)), "decoder_layers_per_block": (1, 1),
    },
}  # fmt: skip
RATIOS = {  # channels, time, space
    "AutoencoderKLWan": (4, 4, 8),
    "AutoencoderKLHunyuanVideo": (4, 4, 8),
    "AutoencoderKLHunyuanVideo15": (4, 4, 16),
    "AutoencoderKLCogVideoX": (4, 4, 8),
    "AutoencoderKLLTXVideo": (8, 8, 32),
    "AutoencoderKLMochi": (4, 6, 8),
    "AutoencoderKLCosmos": (4, 8, 8),
    "AutoencoderKL": (4, 1, 8),
    "AutoencoderDC": (4, 1, 2),
}
VIDEO = [name for name, (_, time, _) in RATIOS.items() if time > 1]


def make(name: str, **more: Any) -> Any:
    """A random instance of a class, the same each time. LTX's statistics are buffers: they are not those of a fresh
    one."""
    import diffusers

    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**{**SETTINGS[name], **more}).eval()
    if name == "AutoencoderKLLTXVideo":
        vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
        vae.latents_std.copy_(torch.linspace(0.5, 2, 8))
    return vae


def save(folder: Path, name: str, **more: Any) -> Path:
    """``make`` in a folder of its own."""
    make(name, **more).save_pretrained(folder / name)
    return folder / name


def config(folder: Path, name: str, **more: Any) -> AutoencoderConfig:
    channels, time, space = RATIOS[name]
    words = {"kind": "diffusers", "path": str(folder), "channels": channels, "time": time, "space": space}
    return AutoencoderConfig.model_validate({**words, **more})


def load(folder: Path, name: str, **more: Any) -> Autoencoder:
    return load_autoencoder(config(folder, name, **more), "cpu")


def clip(frames: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """(1, 3, F, H, W) in [-1, 1]: soft blobs that move."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, max(2, frames // 4), max(2, height // 8), max(2, width // 8), generator=generator)
    return functional.interpolate(coarse, (frames, height, width), mode="trilinear").clamp(-2, 2) / 2
