"""From a prompt to frames: an exported model with its autoencoder and text encoders.

Shapes: B videos, F frames, H x W pixels; latents (B, C, T, h, w).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress

from lingen.autoencoders import Autoencoder, load_autoencoder
from lingen.cache_config import CacheConfig, read_cache
from lingen.config import BucketConfig, Config, SamplerConfig, StageConfig, latent_shape, token_grid
from lingen.engine import DTYPES
from lingen.errors import UserError
from lingen.export import Origin, load_trained, trained_model
from lingen.flow import bucket_shift
from lingen.models import Backbone, make_model
from lingen.pipeline_folder import card, located, save
from lingen.pipeline_output import FORMATS, OutputType, VideoOutput
from lingen.sampling.cache import CacheRun, CacheSummary
from lingen.sampling.call import Forward
from lingen.sampling.guidance import contexts, forward_of, guided
from lingen.sampling.noise import Random, draw_noise, generators
from lingen.sampling.schedule import schedule
from lingen.sampling.solver import evaluations, solve
from lingen.sampling_memory import forms_here, free_memory, predict_cache, predict_decoding, predict_denoising
from lingen.sampling_plan import sampler_with, video_shape
from lingen.text.encoders import TextEncoders, load_text_encoders, refuse_other_text

# Pipeline, step from 0, sigma that it reached, {"latents": (B, C, T, h, w)} -> what replaces the latents, or None.
Callback = Callable[["LinGenPipeline", int, float, dict[str, torch.Tensor]], Mapping[str, torch.Tensor] | None]


@dataclass
class LinGenPipeline:
    """A trained LinGen or DiT, ready to sample."""

    config: Config
    stage: StageConfig  # the last stage that the weights were trained in
    model: Backbone
    autoencoder: Autoencoder
    text: TextEncoders
    device: torch.device
    origin: Origin  # of the weights
    cache: CacheConfig | None = field(default=None, init=False)
    cache_summary: CacheSummary | None = field(default=None, init=False)  # of the last generation, where it had one
    _needs: dict[str, dict[str, int]] = field(default_factory=dict, init=False, repr=False)  # bytes, by what was asked

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: Literal["fp32", "bf16"] | None = None,
        autoencoder: str | None = None,
        encoders: Mapping[str, str] | None = None,
        tile: Mapping[str, Any] | None = None,
    ) -> LinGenPipeline:
        """Load what ``save_pretrained`` saved; or the EMA weights of an export, of a run folder (its last finished
        stage), or of a checkpoint.

        Args:
            dtype: of the denoiser; None: that of the training on a GPU, fp32 on a CPU.
            autoencoder: its file or folder, where it is no longer where the run found it.
            encoders: the folders of text encoders, by their names in the configuration.
            tile: tiles that the autoencoder decodes in, as ``autoencoder.tile``; None: those of the training.

        Raises:
            UserError: there is no such device or precision; nothing that can be loaded is there, or it is incomplete;
                the autoencoder or a text encoder is not the one that the weights were trained with.
        """
        place, wanted = _device(device), _precision(dtype)
        trained = load_trained(Path(path))
        config = located(trained.folder, trained.config, autoencoder, encoders or {}, tile)
        latents = load_autoencoder(config.autoencoder, place)
        if latents.fingerprint != trained.origin.autoencoder_fingerprint:
            raise UserError(
                f"autoencoder.path={config.autoencoder.path} holds another autoencoder than the one that {path} was "
                "trained with; name that one's file (autoencoder=FILE)"
            )
        text = load_text_encoders(config.text, place)
        refuse_other_text(trained.origin.text_fingerprint, text.fingerprints, f"{path} was trained with")
        model = trained_model(trained)
        (stage,) = config.stages.values()
        precision = wanted or DTYPES[config.engine.dtype if place.type == "cuda" else "fp32"]
        return cls(config, stage, model.to(place, precision).eval(), latents, text, place, trained.origin)

    def save_pretrained(self, folder: str | Path, *, copy: bool = True) -> None:
        """Write a folder that ``from_pretrained`` reads back bit for bit: model.safetensors, config.yaml, where the
        weights come from, and a model card.

        Args:
            folder: a new one.
            copy: put the autoencoder and the text encoders into it, so that it can be moved to another machine;
                otherwise they stay where they are, and config.yaml says where.

        Raises:
            UserError: it exists, or cannot be written.
        """
        weights = self.model.state_dict()
        page = card(self.config, self.origin, sum(parameter.numel() for parameter in self.model.parameters()))
        save(Path(folder), self.config, weights, self.origin, page, copy=copy)

    def to(self, device: str | torch.device, dtype: Literal["fp32", "bf16"] | None = None) -> LinGenPipeline:
        """Move it there, in place, and return it; the autoencoder and the text encoders are read again.

        Raises:
            UserError: there is no such device or precision.
        """
        place, precision = _device(device), _precision(dtype)
        self.device = place
        self.model.to(place, precision)
        self.autoencoder = load_autoencoder(self.config.autoencoder, self.device)
        self.text = load_text_encoders(self.config.text, self.device)
        return self

    def enable_cache(self, cache: str | Path | Mapping[str, Any] | CacheConfig) -> None:
        """Reuse what earlier steps computed, in every generation from now on.

        Args:
            cache: a name in conf/cache, a YAML file, its keys, or a configuration.

        Raises:
            UserError: a cache is on already; there is no such cache, or a key or a value is wrong.
        """
        if self.cache is not None:
            raise UserError(f"cache={cache}: the cache {self.cache.policy} is on; call disable_cache() first")
        self.cache = read_cache(cache)

    def disable_cache(self) -> None:
        """Compute everything again."""
        self.cache = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the denoiser."""
        return next(self.model.parameters()).dtype

    def untrained(self) -> LinGenPipeline:
        """The same with freshly initialized weights: what training is measured against."""
        torch.manual_seed(self.config.seed)
        model = make_model(self.config)
        origin = self.origin.model_copy(update={"step": 0, "samples": 0, "tokens": 0, "lineage": []})
        return replace(self, model=model.to(self.device, self.dtype).eval(), origin=origin)

    def shape(self, frames: int | None = None, height: int | None = None, width: int | None = None) -> BucketConfig:
        """The shape of a video; what is None comes from the largest bucket of the last stage.

        Raises:
            UserError: the autoencoder or the patching cannot take it.
        """
        return video_shape(self.config, (frames, height, width))

    def sampler(self, **asked: Any) -> SamplerConfig:
        """The sampler of the configuration with other values where they are not None.

        Raises:
            UserError: a value is out of range.
        """
        return sampler_with(self.config, asked)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance: Literal["batch", "two_passes"] | None = None,
        solver: Literal["euler", "heun", "ab2"] | None = None,
        schedule: Literal["shifted", "linear_quadratic"] | None = None,
        shift: float | None = None,
        emulated_steps: int | None = None,
        generator: Random | None = None,
        seeds: int | Sequence[int] | None = None,
        output_type: OutputType = "uint8",
        callback_on_step_end: Callback | None = None,
        truncate: bool = False,
        progress: bool = True,
    ) -> VideoOutput:
        """Sample a video for each prompt. A video depends on its prompt and seed alone, not on its batch.

        Args:
            num_frames, height, width: of all videos; None: see ``shape``.
            num_inference_steps ... emulated_steps: the keys of ``sampler`` in the configuration; None: as it says.
            generator: one of each video's own, or one that all draw from in turn.
            seeds: instead of ``generator``: one a prompt, or one for all; 0 where there is neither.
            output_type: uint8 (B, 3, F, H, W); pt: fp32 in [0, 1], (B, F, 3, H, W); np: the same, (B, F, H, W, 3);
                pil: a list of frames a video; latent: fp32 (B, C, T, h, w), not decoded. All on the CPU.
            callback_on_step_end: called after each step; "latents" in what it returns replaces them.
            truncate: let the text encoders cut what is longer than they take.

        Raises:
            UserError: a shape, a number or a text that cannot be taken; not as many seeds as prompts; more memory than
                the device has.
        """
        shape = self.shape(num_frames, height, width)
        sampler = self.sampler(
            steps=num_inference_steps, guidance_scale=guidance_scale, guidance=guidance, solver=solver,
            schedule=schedule, shift=shift, emulated_steps=emulated_steps,
        )  # fmt: skip
        negative = sampler.negative_prompt if negative_prompt is None else negative_prompt
        prompts, negatives = self._texts(prompt, negative, truncate)
        if output_type not in FORMATS:
            raise UserError(f"output_type={output_type} is none of {', '.join(FORMATS)}")
        draws = generators(len(prompts), generator, seeds)
        run = self._cache_run(sampler)
        self.refuse_too_large(shape, sampler, len(prompts), decodes=output_type != "latent")
        size = latent_shape(self.config, shape.frames, shape.height, shape.width)
        noise = draw_noise((self.config.autoencoder.channels, *size), draws)
        forward = forward_of(self.model) if run is None else run.forward
        latents = self.denoise(forward, prompts, negatives, noise, shape, sampler, callback_on_step_end, progress)
        self.cache_summary = None if run is None else run.summary()
        if broken := [number for number, one in enumerate(latents) if not one.isfinite().all()]:
            said = ", ".join(f"'{prompts[number][:40]}'" for number in broken)
            warnings.warn(f"not all numbers are finite in the video of {said}: it will be broken", stacklevel=2)
        return VideoOutput(FORMATS[output_type](self.autoencoder, latents))

    def _cache_run(self, sampler: SamplerConfig) -> CacheRun | None:
        """What the cache knows in one generation; None where none is on.

        Raises:
            UserError: the model has not what the cache asks for.
        """
        self.cache_summary = None
        if self.cache is None:
            return None
        calls, named = evaluations(sampler.solver, sampler.steps), contexts(sampler.guidance_scale, sampler.guidance)
        return CacheRun(self.cache, self.model, calls=calls, contexts=named)

    def denoise(
        self,
        forward: Forward,
        prompts: Sequence[str],
        negatives: Sequence[str],
        noise: torch.Tensor,
        shape: BucketConfig,
        sampler: SamplerConfig,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """From noise to latents, (B, C, T, h, w) fp32; ``forward`` stands for the model's own."""
        text, unwanted = self.text.encode(prompts), self.text.encode(negatives)
        tokens = prod(token_grid(self.config, shape.frames, shape.height, shape.width))
        sigmas = schedule(sampler, self.stage.timestep_shift or bucket_shift(tokens, self.config.flow))
        denoise = guided(
            forward, text, unwanted, sampler.guidance_scale,
            device=self.device, dtype=self.dtype, mode=sampler.guidance,
        )  # fmt: skip
        with Progress(disable=not (progress and sys.stdout.isatty())) as bar:
            task = bar.add_task("sampling", total=sampler.steps)

            def after(step: int, sigma: float, x: torch.Tensor) -> torch.Tensor:
                bar.advance(task)
                changed = callback(self, step, sigma, {"latents": x}) if callback else None
                return x if changed is None else changed.get("latents", x)

            return solve(denoise, noise.to(self.device), sigmas, sampler.solver, after)

    def _texts(
        self, prompt: str | Sequence[str], negative: str | Sequence[str], truncate: bool
    ) -> tuple[list[str], list[str]]:
        """The prompts, and as many negative ones.

        Raises:
            UserError: there is none, not as many, or one is longer than an encoder takes.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if wrong := [text for text in (*prompts, *negatives) if not isinstance(text, str)]:
            raise UserError(f"prompt: {wrong[0]!r} is no text")
        if not prompts:
            raise UserError("prompt: give one at least")
        if len(negatives) != len(prompts):
            raise UserError(f"negative_prompt: {len(negatives)} for {len(prompts)} prompts; give one, or one a prompt")
        for key, texts in (("prompt", prompts), ("negative_prompt", negatives)):
            self.refuse_long(() if truncate else texts, key)
        return prompts, negatives

    def refuse_long(self, texts: Sequence[str], key: str = "prompt") -> None:
        """Raises:
        UserError: one of ``texts``, a value of ``key``, has more tokens than a text encoder takes.
        """
        for text in dict.fromkeys(texts):
            for name, count in self.text.counts(text).items():
                if count > self.text.lengths[name]:
                    raise UserError(
                        f"{key}='{text[:40]}...' has {count} tokens, and text.encoders.{name} takes "
                        f"{self.text.lengths[name]}; shorten it, or have it cut with truncate=true"
                    )

    def refuse_too_large(self, shape: BucketConfig, sampler: SamplerConfig, batch: int, *, decodes: bool) -> None:
        """Raises:
        UserError: the generation needs more memory than is free on the device.
        """
        kernels = forms_here(self.device, self.dtype)
        asked = repr((shape, sampler, batch, decodes, self.cache, self.device, self.dtype, kernels))
        if asked not in self._needs:  # a tenth of a second, which many small videos would feel
            dtype = self.dtype
            denoising = predict_denoising(self.config, shape, sampler, batch=batch, dtype=dtype, kernels=kernels)
            if self.cache is not None:
                denoising += predict_cache(self.config, self.cache, shape, sampler, batch=batch, dtype=dtype)
            decoding = predict_decoding(self.config, self.autoencoder, shape, self.device) if decodes else 0
            self._needs[asked] = {"denoising": denoising, "decoding": decoding}
        there = free_memory(self.device)
        ways = {
            "denoising": "guidance=two_passes, fewer videos at once, another cache or none",
            "decoding": "smaller tiles (tile=)",
        }
        for what, bytes_ in self._needs[asked].items():
            if bytes_ > there:
                raise UserError(
                    f"frames={shape.frames} height={shape.height} width={shape.width}: {what} {batch} such videos "
                    f"needs {bytes_ / 1e9:.3g} GB, and {self.device} has {there / 1e9:.3g} GB free; try {ways[what]} "
                    "or a smaller video"
                )


def _precision(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"dtype={name} is none of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def _device(name: str | torch.device) -> torch.device:
    gpus = torch.cuda.device_count()
    here = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    if str(name) not in here:
        raise UserError(f"device={name} is not to be seen here; give one of {', '.join(here)}")
    return torch.device(name)
