"""How much memory a generation will take on one device, worked out before anything is allocated.

The denoiser runs on the meta device through some of its layers and two steps of the solver, and the autoencoder's
decoder on fake tensors for one tile; every tensor counts from its first use to its end, as in ``lingen.memory``. What
is beyond torch is not counted: the device's context, its allocator's gaps, what a library's convolution works in.
Nor is the autoencoder's encoder.

Shapes: B videos of F frames of H x W pixels; latents (B, C, T, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lingen.adacache_config import AdaCacheConfig
from lingen.autoencoders import Autoencoder
from lingen.cache_config import CacheConfig, FirstBlockConfig, TeaCacheConfig
from lingen.config import BucketConfig, Config, SamplerConfig, latent_shape, token_grid
from lingen.kernels import forms
from lingen.memory import Live, model_on_meta, peak
from lingen.reuse_config import Reusing
from lingen.sampling.cache import CacheRun
from lingen.sampling.cache.make import policies_of
from lingen.sampling.cache.policy import SitePolicy
from lingen.sampling.guidance import contexts, forward_of, guided
from lingen.sampling.solver import evaluations, solve

LAYERS = 4  # that are run: LinGen's scan orders repeat after so many, and without gradients no layer keeps anything
COMPARING = (AdaCacheConfig, TeaCacheConfig, FirstBlockConfig)  # caches that keep what they compare with
FLOAT, RGB = 4, 3  # bytes; channels


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes at the fullest moments of a generation, by what holds them. The weights stay; denoising and decoding come
    one after the other."""

    weights: int  # of the denoiser
    text: int  # weights of the text encoders
    denoising: int  # latents, velocities and activations
    cache: int  # what it stores
    decoding: int  # pixels, activations of a tile, and the decoder

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.weights + self.text + max(self.denoising + self.cache, self.decoding)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in asdict(self).items() if size)
        return f"{self.total / 1e9:.3g} GB ({parts})"


def predict_weights(config: Config, dtype: torch.dtype) -> int:
    """Bytes of the denoiser."""
    return sum(parameter.numel() for parameter in model_on_meta(config).parameters()) * dtype.itemsize


def predict_denoising(
    config: Config,
    shape: BucketConfig,
    sampler: SamplerConfig,
    *,
    batch: int,
    dtype: torch.dtype,
    kernels: Mapping[str, str],
) -> int:
    """Bytes from noise to latents, the model's weights left out.

    Args:
        kernels: the form of each kernel, as ``lingen.memory.planned_forms`` gives it.
    """
    depth = config.size.depth.model_copy(update={config.model.name: min(LAYERS, config.depth)})
    model = model_on_meta(config.model_copy(update={"size": config.size.model_copy(update={"depth": depth})}))
    model = model.to(dtype)
    meta = torch.device("meta")
    size = latent_shape(config, shape.frames, shape.height, shape.width)
    noise = torch.empty(batch, config.autoencoder.channels, *size, device=meta)
    encoders = config.text.encoders
    states = {name: torch.empty(batch, e.length, e.dim, device=meta) for name, e in encoders.items()}
    text = states, torch.ones(batch, sum(config.text.lengths.values()), device=meta, dtype=torch.bool)

    @torch.no_grad()
    def two_steps() -> None:
        scale, mode = sampler.guidance_scale, sampler.guidance
        denoise = guided(forward_of(model), text, text, scale, device=meta, dtype=dtype, mode=mode)
        solve(denoise, noise, torch.tensor([1.0, 0.5, 0.0]), sampler.solver, lambda step, sigma, x: x)

    return peak(model, two_steps, kernels)


def predict_cache(
    config: Config,
    cache: CacheConfig,
    shape: BucketConfig,
    sampler: SamplerConfig,
    *,
    batch: int,
    dtype: torch.dtype,
) -> int:
    """Bytes of what a cache stores at most: the sum over a range of blocks, or an output of each block for each site;
    and what it compares with.

    Raises:
        UserError: the model has not what the cache asks for.
    """
    model, calls = model_on_meta(config), evaluations(sampler.solver, sampler.steps)
    named = contexts(sampler.guidance_scale, sampler.guidance)
    CacheRun(cache, model, calls=calls, contexts=named)  # refuses what the model has not
    policies = policies_of(cache, model, calls)
    kept = cache.kept if isinstance(cache, Reusing) else 1
    tokens = math.prod(token_grid(config, shape.frames, shape.height, shape.width))
    one = batch * tokens * config.size.d_model * dtype.itemsize
    stored = 0
    for context in named:
        policy = policies(context)
        if policy is not None:
            outputs = len(policy.sites) * config.depth if isinstance(policy, SitePolicy) else 1
            stored += (outputs * kept + isinstance(cache, COMPARING)) * one * (2 if context == "pair" else 1)
    return stored


def predict_decoding(config: Config, autoencoder: Autoencoder, shape: BucketConfig, device: torch.device) -> int:
    """Bytes from the latents of one video to its pixels.

    Args:
        autoencoder: of ``config.autoencoder``, on ``device``; it is not run.
    """
    tiles = config.autoencoder.tile
    limits = (None, None, None) if tiles is None else (tiles.frames, tiles.height, tiles.width)
    whole = shape.frames, shape.height, shape.width
    frames, height, width = (min(size, limit or size) for size, limit in zip(whole, limits, strict=True))
    latents = 1, config.autoencoder.channels, *latent_shape(config, frames, height, width)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Live(device.type) as live:
        autoencoder.decode(torch.empty(latents, device=device))
    cut = [whole, (frames, *whole[1:]), (frames, height, whole[2]), (frames, height, width)]  # axis by axis
    volumes = [math.prod(box) for box in cut]
    # Where an axis is cut, what its tiles are put into is held, and the tile before while the next is made.
    pixels = sum(into + tile for into, tile in pairwise(volumes) if tile < into)
    return int(live.peak) + FLOAT * RGB * pixels


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def forms_here(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The form that each kernel takes in this process."""
    return {kernel: forms.chosen(kernel, device, dtype) for kernel in forms.FORMS}
