"""Any video or image VAE of diffusers, by one adapter.

Shapes: B clips, F = t*k + 1 frames, H height, W width in pixels; C channels, T = k + 1 latent frames, h = H/s, w = W/s.

``DiffusersVae`` speaks the class's own latents; ``Normalised`` is what the class's pipelines do to them (rules.py).
Tiles come between the two, because a normalisation may depend on the place in the clip.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders.base import (
    DTYPES,
    Autoencoder,
    fingerprint,
    refuse_other_ratios,
    refuse_other_shapes,
    to_float,
)
from lingen.autoencoders.rules import RULES, Rule, Statistics
from lingen.autoencoders.tiles import tiled
from lingen.errors import UserError

PROBE_FRAMES = 25  # 24 is a multiple of all ratios in time that are known: 1, 2, 3, 4, 6, 8, 12
PROBE_SIDE = 128  # the largest known ratio in space


class DiffusersVae:
    """A frozen VAE of diffusers with its own latents: the mode of the posterior, nothing sampled.

    Its channels and ratios are those that it shows on small black clips; its attributes are not asked.
    """

    def __init__(
        self, model: Any, rule: Rule, fingerprint: str, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.fingerprint = fingerprint
        self._rule = rule
        self._device, self._dtype = torch.device(device), torch.float32
        if rule.first:
            model.get_submodule(rule.first).register_forward_hook(lambda layer, given, out: out.to(self._dtype))
        self._model = model.to(self._device).eval().requires_grad_(False)
        for own in ("use_tiling", "use_slicing", "use_framewise_encoding", "use_framewise_decoding"):
            if hasattr(model, own):  # tiles are ours; HunyuanVideo's own are on by default
                setattr(model, own, False)
        self._draws = any(model.config.get("decoder_inject_noise") or ())  # LTX: noise inside the decoder
        self.channels, self.time, self.space = self._probe()  # in fp32, which every device has
        self._model.to(dtype)
        self._dtype = dtype

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, F, H, W), uint8 or float in [-1, 1] -> (B, C, T, h, w) fp32, not normalised.

        Raises:
            ValueError: F is not t*k + 1, or H or W is not a multiple of s.
        """
        refuse_other_shapes(self, pixels)
        return self._encode(pixels)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, enabled=False):  # the same latents inside and outside of a bf16 step
            if self._rule.images:
                return torch.stack([self._mode(frame) for frame in pixels.unbind(2)], dim=2)
            return self._mode(pixels)

    def _mode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, F, H, W) or (B, 3, H, W) -> (B, C, T, h, w) or (B, C, h, w)."""
        pixels = to_float(pixels.to(self._device))
        encoded = self._model.encode(pixels if self._rule.first else pixels.to(self._dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return latents.float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, T, h, w), not normalised -> float pixels in [-1, 1], (B, 3, F, H, W)."""
        latents = latents.to(self._device, self._dtype)
        with torch.autocast(self._device.type, enabled=False), self._repeatable():
            if self._rule.images:
                frames = [self._model.decode(frame).sample for frame in latents.unbind(2)]
                return torch.stack(frames, dim=2).float().clamp_(-1, 1)
            steps = latents.shape[2]
            if self._rule.odd and steps % 2 == 0:  # one more at the end, which what comes before it hardly sees
                latents = torch.cat([latents, latents[:, :, -1:]], dim=2)
            pixels = self._model.decode(latents, *self._condition(latents)).sample.float()
            if self._rule.odd:
                pixels = pixels[:, :, : (steps - 1) * self.time + 1]
        return pixels.clamp_(-1, 1)  # type: ignore[no-any-return]

    def _condition(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """What a decoder wants besides: that of later LTX the noise level of the latents, which here is 0."""
        return [latents.new_zeros(len(latents))] if self._model.config.get("timestep_conditioning") else []

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """A decoder that draws noise draws the same each time, and leaves torch's state as it was."""
        if not self._draws:
            yield
            return
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(0)
            yield

    @torch.no_grad()
    def _probe(self) -> tuple[int, int, int]:
        """(channels, time, space), from what comes of small black clips, there and back.

        Raises:
            ValueError: a first frame is no latent frame, or t*k + 1 frames are not k + 1 latent frames and back again.
        """
        first = self._encode(torch.zeros(1, 3, 1, PROBE_SIDE, PROBE_SIDE))  # (1, C, 1, h, w)
        channels, steps, height, width = first.shape[1:]
        if steps != 1 or height != width or PROBE_SIDE % height:
            raise ValueError(f"an image of {PROBE_SIDE}x{PROBE_SIDE} becomes latents of {steps}x{height}x{width}")
        space = PROBE_SIDE // height
        side = 2 * space
        steps = self._encode(torch.zeros(1, 3, PROBE_FRAMES, side, side)).shape[2]
        self.time = max(1, round((PROBE_FRAMES - 1) / max(steps - 1, 1)))
        for k in (0, 1, 2, 3):
            frames = self.time * k + 1
            latents = self._encode(torch.zeros(1, 3, frames, side, side))
            back = tuple(self.decode(latents).shape[2:])
            if latents.shape[2] != k + 1 or back != (frames, side, side):
                raise ValueError(
                    f"{frames} frames of {side}x{side} become {latents.shape[2]} latent frames, and these {back[0]} "
                    f"frames of {back[1]}x{back[2]}; a causal video VAE makes k + 1 of t*k + 1"
                )
        return channels, self.time, space


class Normalised:
    """``inner`` with latents (z - mean) / std; see ``Autoencoder``."""

    def __init__(self, inner: Autoencoder, statistics: Statistics, device: torch.device | str) -> None:
        self.channels, self.time, self.space = inner.channels, inner.time, inner.space
        self.fingerprint = inner.fingerprint
        self._inner = inner
        self._mean, self._std = (each.to(device)[None, :, :, None, None] for each in statistics)  # (1, C, N, 1, 1)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See ``Autoencoder.encode``."""
        latents = self._inner.encode(pixels)
        mean, std = self._for(latents)
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See ``Autoencoder.decode``."""
        mean, std = self._for(latents)
        return self._inner.decode(latents.float() * std + mean)

    def _for(self, latents: torch.Tensor) -> Statistics:
        """Mean and std of each latent frame; those after the Nth have the last one's."""
        frame = torch.arange(latents.shape[2], device=latents.device).clamp(max=self._mean.shape[2] - 1)  # (T,)
        return self._mean[:, :, frame], self._std[:, :, frame]


def load_diffusers(config: AutoencoderConfig, device: torch.device | str) -> Autoencoder:
    """The VAE that the folder or hub id ``config.path`` holds, on ``device``, in tiles where the configuration says so.

    Raises:
        UserError: diffusers is not installed; the VAE is not there, damaged, of a class that is not known, not causal,
            or its ratios or channels are not those of the configuration.
    """
    where = f"autoencoder.path={config.path}"
    folder = vae_folder(config)
    written = _read_config(folder, where)
    name = str(written.get("_class_name"))
    if name not in RULES:
        raise UserError(f"{where} holds a {name}; give a VAE of one of the classes {', '.join(RULES)}")
    rule = RULES[name]
    if config.tile is not None and config.tile.frames is not None and (rule.streams or rule.images):
        why = "goes through time in pieces by itself, exactly" if rule.streams else "sees one frame at a time"
        raise UserError(f"autoencoder.tile.frames={config.tile.frames}: {name} {why}; set it to null")
    model = _load(name, folder, where)
    try:
        statistics = rule.statistics(model)
        settings = {key: value for key, value in written.items() if not key.startswith("_")}
        weights = {**model.state_dict(), "lingen.mean": statistics[0], "lingen.std": statistics[1]}
        identity = fingerprint(weights, also=json.dumps([name, settings], sort_keys=True))
        vae = DiffusersVae(model, rule, identity, device, DTYPES[config.dtype])
        _refuse_statistics(*statistics, vae.channels)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{where} holds a {name} that cannot be used: {' '.join(str(error).split())[:240]}") from error
    refuse_other_ratios(config, vae.channels, vae.time, vae.space)
    return Normalised(tiled(vae, config.tile), statistics, device)


def _refuse_statistics(mean: torch.Tensor, std: torch.Tensor, channels: int) -> None:
    """Raises:
    ValueError: these are not ``channels`` means and positive deviations.
    """
    good = bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all())
    if not good or len(mean) != len(std) or len(mean) not in (1, channels):
        raise ValueError(f"its statistics are {len(mean)} means and {len(std)} deviations for {channels} channels")


def vae_folder(config: AutoencoderConfig) -> Path:
    """The folder of a VAE, from the disk alone: no rank of a run waits for, or trusts, a download.

    Raises:
        UserError: there is none.
    """
    where, folder = f"autoencoder.path={config.path}", Path(config.path)
    if not folder.is_dir():
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.path) is None:
            raise UserError(f"{where}: there is no such folder; give a VAE's folder, or a hub id such as OWNER/NAME")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        only = ["--include", f"{config.subfolder}/*"] if config.subfolder else []
        command = shlex.join(["hf", "download", config.path, *only])
        try:
            folder = Path(snapshot_download(config.path, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError) as error:
            raise UserError(f"{where} is neither a folder nor fetched; fetch it with: {command}") from error
        if not (folder / config.subfolder / "config.json").is_file() and config.subfolder:
            raise UserError(f"{where} was fetched without {config.subfolder}; fetch it with: {command}")
    return folder / config.subfolder


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    try:
        written = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        inside = sorted(path.parent.name for path in folder.glob("*vae*/config.json"))
        hint = f"; set autoencoder.subfolder={inside[0]}" if inside else ", which every VAE of diffusers has"
        raise UserError(f"{where}: {folder} has no config.json{hint}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(written, dict):
        raise UserError(f"{where}: {folder / 'config.json'} is not a diffusers config")
    return written


def _load(name: str, folder: Path, where: str) -> Any:
    """The model in fp32 on the CPU, with all its weights, from safetensors alone."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "autoencoder.kind=diffusers needs the package diffusers; install it with: pip install '.[diffusers]'"
        ) from error
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    if not hasattr(diffusers, name):
        raise UserError(f"{where} holds a {name}, which diffusers {diffusers.__version__} does not have; update it")
    try:
        model, info = getattr(diffusers, name).from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where} cannot be loaded; {folder} must hold the config.json and the safetensors of a {name}: {reason}"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(f"{where}: {len(info[kind])} {kind.replace('_', ' ')}, such as {sorted(info[kind])[0]}")
    return model
