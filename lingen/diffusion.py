"""What train.py trains, as the stage loop sees it: a video model by flow matching, in the latents of an autoencoder.

Shapes: B samples of a micro-batch, F frames, C channels, T x H x W latent positions; S sigmas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from data.batch import Batch
from data.latents import read_empty, refuse_other_latents
from data.shards import Index, load_index
from lingen import checkpoint
from lingen.autoencoders import Autoencoder, load_autoencoder
from lingen.checkpoint import Checkpoint
from lingen.config import BucketConfig, Config, FlowConfig, StageConfig, ValidationConfig, token_grid
from lingen.dist import Dist
from lingen.engine import DTYPES, Engine, choose_forms, make_engine
from lingen.errors import UserError
from lingen.export import of_stage
from lingen.flow import bucket_shift, draw, draw_left_out, generator, interpolate, sample_losses
from lingen.kernels import forms
from lingen.memory import Memory, model_on_meta, planned_forms, predict
from lingen.models import Backbone, make_model
from lingen.models.parallel import SequenceGroup, parallelise
from lingen.text.encoders import TextEncoder, load_text_encoders, refuse_other_text, stored_encoders
from lingen.text.join import Text, moved


@dataclass(frozen=True)
class Networks:
    """The trained model inside its engine, and the two frozen networks before it; see ``Trainee``."""

    engine: Engine
    autoencoder: Autoencoder
    text: TextEncoder
    device: torch.device
    dtype: torch.dtype  # of the model's activations
    config: Config
    terms: tuple[str, ...] = ()

    @torch.no_grad()
    def latents(self, batch: Batch) -> torch.Tensor:
        """A batch's latents (B, C, T, H, W) fp32: as they were stored, or encoded from its pixels."""
        if batch.latents is not None:
            return batch.latents.to(self.device).float()
        return self.autoencoder.encode(batch.pixels.to(self.device))

    def read(self, batch: Batch, captions: list[str], left_out: list[set[str]]) -> Text:
        """The states of a batch's captions, some of which may have become empty: stored ones, or encoded now."""
        return self.text.encode(captions, left_out, batch.states.rows() if batch.states else None)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        """The model's velocity at ``x`` (B, C, T, H, W) and ``sigma`` (B,), in fp32."""
        states, mask = moved(text, self.device, self.dtype)
        velocity: torch.Tensor = self.engine.model(x.to(self.dtype), sigma, states, mask)
        return velocity.float()

    def losses(self, batch: Batch, stage: StageConfig, samples_seen: int) -> torch.Tensor:
        """The mean squared error of the velocity, (1, B)."""
        bucket, config = batch.bucket, self.config
        shift = stage.timestep_shift
        if shift is None:
            grid = token_grid(config, bucket.frames, bucket.height, bucket.width)
            shift = bucket_shift(prod(grid), config.flow)
        found = batch_losses(self, batch, seed=config.seed, samples_seen=samples_seen, shift=shift, flow=config.flow)
        return found[None]

    def measure(self, batch: Batch) -> torch.Tensor:
        """The same at each of ``validation.sigmas`` sigmas, (S, B), with noise that depends on nothing but the sample's
        number in the held-out set and the sigma's number."""
        latents = self.latents(batch)  # (B, C, T, H, W)
        text = self.read(batch, batch.captions, [])
        found = []
        for i, sigma in enumerate(fixed_sigmas(self.config.validation).tolist()):
            noise = torch.stack(
                [
                    torch.randn(latents.shape[1:], generator=generator("cpu", "validation", int(n), i))
                    for n in batch.positions
                ]
            ).to(self.device)
            sigma_each = torch.full((len(latents),), sigma, device=self.device)
            velocity = self.velocity(interpolate(latents, noise, sigma_each), sigma_each, text)
            found.append(sample_losses(velocity, latents, noise))
        return torch.stack(found)

    def summary(self, measured: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, Any]:
        """``loss`` (mean over the buckets by their share), ``bucket_loss``, and ``bin_loss`` (mean over bins of
        neighbouring sigmas, from the data to the noise)."""
        mixed = shares @ torch.stack(list(measured.values()))  # (S,)
        return {
            "loss": mixed.mean().item(),
            "bucket_loss": {name: loss.mean().item() for name, loss in measured.items()},
            "bin_loss": mixed.view(self.config.validation.bins, -1).mean(1).tolist(),
        }


def batch_losses(
    networks: Networks, batch: Batch, *, seed: int, samples_seen: int, shift: float, flow: FlowConfig
) -> torch.Tensor:
    """The loss (B,) of each sample of a micro-batch, holes included, with the graph behind it."""
    latents = networks.latents(batch)  # (B, C, T, H, W)
    drawn = draw(
        batch.positions.tolist(),
        tuple(latents.shape[1:]),  # type: ignore[arg-type]
        seed=seed,
        samples_seen=samples_seen,
        shift=shift,
        flow=flow,
        device=networks.device,
    )
    captions = ["" if drop else text for text, drop in zip(batch.captions, drawn.drop_caption, strict=True)]
    left_out = draw_left_out(batch.positions.tolist(), networks.text.dropout, seed=seed, samples_seen=samples_seen)
    x = interpolate(latents, drawn.noise, drawn.sigma)
    velocity = networks.velocity(x, drawn.sigma, networks.read(batch, captions, left_out))
    return sample_losses(velocity, latents, drawn.noise)


def fixed_sigmas(config: ValidationConfig) -> torch.Tensor:
    """The centres of ``config.sigmas`` equal parts of (0, 1), rising: (S,)."""
    return (torch.arange(config.sigmas) + 0.5) / config.sigmas


@dataclass(frozen=True)
class DiffusionInputs:
    """The clips, and the frozen networks that read them; see ``Inputs``."""

    config: Config
    index: Index
    autoencoder: Autoencoder  # on the CPU where latents are read: nothing is encoded then
    text: TextEncoder

    def choices(self, device: torch.device) -> str:
        """The form of each kernel."""
        return f"kernels: {forms.describe(device, DTYPES[self.config.engine.dtype])}"

    def frozen(self) -> dict[str, str]:
        """The autoencoder, which defines the latents, and the text encoders."""
        encoders = {f"text.encoders.{name}": found for name, found in self.text.fingerprints.items()}
        return {"autoencoder": self.autoencoder.fingerprint, **encoders}

    def fingerprints(self) -> dict[str, Any]:
        """Of the data, the autoencoder and each text encoder."""
        return {
            "data_fingerprint": self.index.fingerprint,
            "autoencoder_fingerprint": self.autoencoder.fingerprint,
            "text_fingerprint": self.text.fingerprints,
        }

    def refuse_others(self, there: Checkpoint) -> None:
        """Weights are worth nothing in another latent space, nor with another text encoder's states.

        Raises:
            UserError: the autoencoder or a text encoder is not the one that the checkpoint was trained with.
        """
        before, fingerprint = there.progress["autoencoder_fingerprint"], self.autoencoder.fingerprint
        if before != fingerprint:
            raise UserError(
                f"autoencoder.path holds another autoencoder (fingerprint {fingerprint[:12]}) than {there.folder} was "
                f"trained with ({before[:12]}); name that one"
            )
        refuse_other_text(
            there.progress["text_fingerprint"], self.text.fingerprints, f"{there.folder} was trained with"
        )

    def build(self, dist: Dist) -> Networks:
        """The model in its engine. Collective."""
        model = make_model(self.config)
        parallelise(model, SequenceGroup(dist.sequence_group, dist.sequence_rank, dist.sequence))
        engine = make_engine(model, self.config.engine, self.config.optim, dist)
        dtype = DTYPES[self.config.engine.dtype]
        return Networks(engine, self.autoencoder, self.text, dist.device, dtype, self.config)

    def export(self, folder: Path, out: Path, stage: StageConfig, device: torch.device) -> None:
        """The weights and the configuration that rebuilds the model."""
        checkpoint.export(folder, out, of_stage(self.config, stage.name).model_dump(mode="json"))


class DiffusionTask:
    """See ``Task``."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._flops: dict[tuple[int, int, int], int] = {}

    @property
    def name(self) -> str:
        """The model and its size."""
        return f"{self._config.model.name} {self._config.size.name}"

    @property
    def shape(self) -> str:
        """Its depth and width."""
        return f"{self._config.depth} layers of width {self._config.size.d_model}"

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self._model.parameters())

    def tokens(self, bucket: BucketConfig) -> int:
        """That the model sees of a sample."""
        return prod(self._grid(bucket))

    def forward_flops(self, bucket: BucketConfig) -> int:
        """FLOPs of the model's forward for a sample."""
        grid = self._grid(bucket)
        if grid not in self._flops:  # counted layer by layer, which takes half a millisecond
            self._flops[grid] = int(self._model.flops(grid, self._config.text.lengths))
        return self._flops[grid]

    def memory(self, bucket: BucketConfig, *, batch: int, world: int, device: str) -> Memory:
        """What one rank of ``world`` needs for micro-batches of ``batch`` samples."""
        kernels = planned_forms(self._config, device)
        return predict(self._config, self._grid(bucket), batch=batch, world=world, kernels=kernels)

    def choose_forms(self, device: torch.device) -> None:
        """Raises:
        UserError: a form of a kernel was asked for that this machine does not have.
        """
        choose_forms(self._config.kernels.model_dump(), device, DTYPES[self._config.engine.dtype])

    def load_inputs(self, dist: Dist) -> DiffusionInputs:
        """Raises:
        UserError: the shards, the autoencoder or a text encoder are not there, or not what the configuration says; or
            the shards hold what another autoencoder or text encoder made.
        """
        config = self._config
        index = load_index(config.data.path)
        stored = index.latents
        autoencoder = load_autoencoder(config.autoencoder, "cpu" if stored else dist.device)
        if stored:
            refuse_other_latents(index, autoencoder.fingerprint, config.autoencoder.path, config.data.holdout_share)
        if stored is None or not stored.text:
            return DiffusionInputs(config, index, autoencoder, load_text_encoders(config.text, dist.device))
        before = {name: states.fingerprint for name, states in stored.text.items()}
        where = f"data.path={index.path}"
        text = stored_encoders(config.text, before, read_empty(index), where, dist.device)
        return DiffusionInputs(config, index, autoencoder, text)

    @cached_property
    def _model(self) -> Backbone:
        return model_on_meta(self._config)

    def _grid(self, bucket: BucketConfig) -> tuple[int, int, int]:
        return token_grid(self._config, bucket.frames, bucket.height, bucket.width)
