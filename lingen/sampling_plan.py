"""What is asked of a sampler, and how much memory that would take, from the configuration alone.

Shapes: B videos of F frames of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lingen.autoencoders import load_autoencoder
from lingen.cache_config import read_cache
from lingen.compose import validate
from lingen.config import BucketConfig, Config, SamplerConfig, geometry_problems
from lingen.engine import DTYPES
from lingen.errors import UserError
from lingen.export import find_trained
from lingen.memory import planned_forms
from lingen.pipeline_folder import located
from lingen.sampling_memory import (
    SamplingMemory,
    predict_cache,
    predict_decoding,
    predict_denoising,
    predict_weights,
)
from lingen.text.load import weight_bytes

Size = tuple[int | None, int | None, int | None]  # F, H, W


def video_shape(config: Config, size: Size = (None, None, None)) -> BucketConfig:
    """The shape of a video; what is None comes from the largest bucket of the one stage of ``config``.

    Raises:
        UserError: the autoencoder or the patching cannot take it.
    """
    (stage,) = config.stages.values()
    largest = max(stage.buckets, key=lambda b: b.frames * b.height * b.width)
    asked = zip(("frames", "height", "width"), size, strict=True)
    shape = validate(BucketConfig, largest.model_dump() | {key: value for key, value in asked if value is not None})
    for problem in geometry_problems(config, shape):
        raise UserError(problem)
    return shape


def sampler_with(config: Config, asked: Mapping[str, Any]) -> SamplerConfig:
    """The sampler of ``config`` with other values where they are not None.

    Raises:
        UserError: a value is out of range.
    """
    found = {key: value for key, value in asked.items() if value is not None}
    return validate(SamplerConfig, config.sampler.model_dump() | found)


def predict_memory(
    path: str | Path,
    *,
    batch: int,
    size: Size,
    sampler: Mapping[str, Any],
    device: str,
    dtype: str | None,
    kernels: Mapping[str, str],
    autoencoder: str | None,
    encoders: Mapping[str, str],
    tile: Mapping[str, Any] | None,
    cache: str | None = None,
) -> tuple[BucketConfig, SamplingMemory]:
    """What a pipeline of ``path`` would take for ``batch`` videos at once. The weights of the denoiser and of the
    text encoders are not loaded, and the device need not be here.

    Args:
        kernels: as ``kernels`` in the configuration.
        sampler, dtype, autoencoder, encoders, tile, cache: as ``LinGenPipeline`` takes them.

    Raises:
        UserError: what is asked cannot be made, or something is not there.
    """
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device={device} is no device that is planned for; give cpu or cuda")
    folder, config = find_trained(Path(path))
    config = located(folder, config, autoencoder, encoders, tile)
    config = config.model_copy(update={"kernels": config.kernels.model_validate(dict(kernels))})
    precision = DTYPES[dtype or (config.engine.dtype if kind == "cuda" else "fp32")]
    shape, how = video_shape(config, size), sampler_with(config, sampler)
    forms = planned_forms(config, kind)
    stored = 0
    if cache is not None:
        stored = predict_cache(config, read_cache(cache), shape, how, batch=batch, dtype=precision)
    cpu = torch.device("cpu")
    return shape, SamplingMemory(
        weights=predict_weights(config, precision),
        text=sum(weight_bytes(name, encoder) for name, encoder in config.text.encoders.items()),
        denoising=predict_denoising(config, shape, how, batch=batch, dtype=precision, kernels=forms),
        cache=stored,
        decoding=predict_decoding(config, load_autoencoder(config.autoencoder, cpu), shape, cpu),
    )
