"""From a prompt to frames: an exported model with its autoencoder and text encoders.

Shapes: B videos, F frames, H x W pixels; latents (B, C, T, h, w).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

import torch
from rich.progress import track

from lingen.autoencoders import Autoencoder, load_autoencoder
from lingen.config import BucketConfig, Config, StageConfig, geometry_problems, latent_shape, token_grid
from lingen.engine import DTYPES
from lingen.errors import UserError, nearest
from lingen.export import load_trained
from lingen.flow import bucket_shift, generator
from lingen.models import Backbone, make_model
from lingen.sampling.guidance import guided
from lingen.sampling.solver import euler, sigma_schedule
from lingen.text.encoders import TextEncoder, load_text_encoders, refuse_other_text
from lingen.text_config import TextConfig


@dataclass(frozen=True)
class LinGenPipeline:
    """A trained LinGen or DiT, ready to sample."""

    config: Config
    stage: StageConfig  # the last stage that the weights were trained in
    model: Backbone
    autoencoder: Autoencoder
    text: TextEncoder
    device: torch.device

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: Literal["fp32", "bf16"] | None = None,
        autoencoder: str | None = None,
        encoders: Mapping[str, str] | None = None,
    ) -> LinGenPipeline:
        """Load the EMA weights of an export, of a run folder (its last finished stage), or of a checkpoint.

        ``dtype`` is the denoiser's precision: by default that of the training on a GPU, fp32 on a CPU.
        ``autoencoder`` names the autoencoder's file where it is no longer where the run found it, ``encoders`` the
        folders of text encoders by their names in the configuration.

        Raises:
            UserError: there is no such device; nothing that can be loaded is there, or it is incomplete; the
                autoencoder or a text encoder is not the one that the weights were trained with.
        """
        place = _device(device)
        trained = load_trained(Path(path))
        config = trained.config
        if autoencoder is not None:
            moved = config.autoencoder.model_copy(update={"path": autoencoder})
            config = config.model_copy(update={"autoencoder": moved})
        latents = load_autoencoder(config.autoencoder, place)
        if latents.fingerprint != trained.autoencoder_fingerprint:
            raise UserError(
                f"autoencoder.path={config.autoencoder.path} holds another autoencoder than the one that {path} was "
                "trained with; name that one's file (autoencoder=FILE)"
            )
        config = config.model_copy(update={"text": _text_at(config.text, encoders or {})})
        text = load_text_encoders(config.text, place)
        refuse_other_text(trained.text_fingerprint, text.fingerprints, f"{path} was trained with")
        with torch.device("meta"):
            model = make_model(config)
        try:
            model.load_state_dict(trained.weights, assign=True)
        except RuntimeError as error:
            raise UserError(f"{path}: the weights do not fit the config beside them: {error}") from error
        (stage,) = config.stages.values()
        precision = DTYPES[dtype or (config.engine.dtype if place.type == "cuda" else "fp32")]
        return cls(config, stage, model.to(place, precision).eval(), latents, text, place)

    def untrained(self) -> LinGenPipeline:
        """The same with freshly initialized weights: what training is measured against."""
        torch.manual_seed(self.config.seed)
        model = make_model(self.config)
        return replace(self, model=model.to(self.device, next(self.model.parameters()).dtype).eval())

    def shape(self, frames: int | None = None, height: int | None = None, width: int | None = None) -> BucketConfig:
        """The shape of a video; what is None comes from the largest bucket of the last stage.

        Raises:
            UserError: the autoencoder or the patching cannot take it.
        """
        largest = max(self.stage.buckets, key=lambda b: b.frames * b.height * b.width)
        asked = {"frames": frames, "height": height, "width": width}
        shape = largest.model_copy(update={key: value for key, value in asked.items() if value is not None})
        for problem in geometry_problems(self.config, shape):
            raise UserError(problem)
        return shape

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        seeds: Sequence[int] = (0,),
        progress: bool = True,
    ) -> torch.Tensor:
        """Sample one video of ``shape(frames, height, width)`` a prompt; the video of a prompt depends on its seed
        alone, not on its batch.

        ``seeds`` has one seed a prompt, or one for all. Returns (B, 3, F, H, W) uint8 on the CPU.

        Raises:
            UserError: a shape that the autoencoder or the patching cannot take; not as many seeds as prompts.
        """
        shape = self.shape(frames, height, width)
        if len(seeds) not in (1, len(prompts)):
            raise UserError(f"seeds: {len(seeds)} for {len(prompts)} prompts; give one a prompt, or one for all")
        sampler = self.config.sampler
        scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
        negative = sampler.negative_prompt if negative_prompt is None else negative_prompt
        each = list(seeds) * len(prompts) if len(seeds) == 1 else list(seeds)
        size = shape.frames, shape.height, shape.width
        latent = (self.config.autoencoder.channels, *latent_shape(self.config, *size))  # (C, T, h, w)
        noise = torch.stack([torch.randn(latent, generator=generator("cpu", "sample", s)) for s in each])
        text, unwanted = self.text.encode(prompts), self.text.encode([negative] * len(prompts))
        denoise = guided(self.model, text, unwanted, scale)
        tokens = prod(token_grid(self.config, *size))
        shift = self.stage.timestep_shift or bucket_shift(tokens, self.config.flow)
        sigmas = sigma_schedule(sampler.steps if steps is None else steps, shift)
        walk = euler(denoise, noise.to(self.device), sigmas)
        *_, latents = track(walk, "sampling", total=len(sigmas) - 1, disable=not (progress and sys.stdout.isatty()))
        pixels = self.autoencoder.decode(latents)  # (B, 3, F, H, W) in [-1, 1]
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def _text_at(text: TextConfig, folders: Mapping[str, str]) -> TextConfig:
    """``text`` with these encoders in these folders."""
    for name in folders:
        if name not in text.encoders:
            raise UserError(f"encoders.{name}: this model has no such text encoder{nearest(name, text.encoders)}")
    moved = {name: text.encoders[name].model_copy(update={"path": folder}) for name, folder in folders.items()}
    return text.model_copy(update={"encoders": text.encoders | moved})


def _device(name: str) -> torch.device:
    gpus = torch.cuda.device_count()
    here = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    if name not in here:
        raise UserError(f"device={name} is not to be seen here; give one of {', '.join(here)}")
    return torch.device(name)
