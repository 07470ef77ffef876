"""What scripts/train_autoencoder.py trains, as the stage loop sees it: our own autoencoder, and its discriminator.

Shapes: B clips of a micro-batch, F = t*k + 1 frames, H x W pixels; C latent channels, T x h x w latent positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from data.batch import Batch
from data.shards import Index, load_index
from lingen.autoencoders import psnr, to_float
from lingen.autoencoders.tae_game import TERMS, TaeGame
from lingen.autoencoders.tae_losses import Perceptual, load_perceptual
from lingen.checkpoint import Checkpoint
from lingen.config import BucketConfig, StageConfig
from lingen.dist import Dist
from lingen.engine import DTYPES, Engine, make_engine
from lingen.errors import UserError
from lingen.flow import generator
from lingen.memory import Memory, Probe, lay_out, peak
from lingen.tae_config import TaeConfig, TaeRunConfig, sample_tokens
from lingen.tae_export import export_tae

SQUARED = 1 + TERMS.index("squared")  # where a game's result has the squared error


@dataclass(frozen=True)
class TaePlayers:
    """The game in its engine; see ``Trainee``."""

    config: TaeRunConfig
    engine: Engine
    device: torch.device
    terms: tuple[str, ...] = TERMS

    def losses(self, batch: Batch, stage: StageConfig, samples_seen: int) -> torch.Tensor:
        """(1 + terms, B). Of the discriminator's turn ``losses.adversarial.from_samples`` decides."""
        bucket = batch.bucket
        shape = latent_shape(self.config.tae, bucket.frames, bucket.height, bucket.width)
        noise = torch.stack(
            [
                torch.randn(
                    shape,
                    generator=generator(self.device, "noise", self.config.seed, samples_seen, at),
                    device=self.device,
                )
                for at in batch.positions.tolist()
            ]
        )
        opponent = self.config.losses.adversarial
        plays = opponent is not None and samples_seen >= opponent.from_samples
        found: torch.Tensor = self.engine.model(to_float(batch.pixels.to(self.device)), noise, plays=plays)
        return found.T

    def measure(self, batch: Batch) -> torch.Tensor:
        """The same without noise and without the game."""
        found: torch.Tensor = self.engine.model(to_float(batch.pixels.to(self.device)), None)
        return found.T

    def summary(self, measured: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, Any]:
        """``loss`` (mean over the buckets by their share), ``bucket_loss``, and ``bucket_psnr`` in dB, from the mean
        squared error over all pixels."""
        losses = {name: means[0].item() for name, means in measured.items()}
        return {
            "loss": sum(share * loss for share, loss in zip(shares.tolist(), losses.values(), strict=True)),
            "bucket_loss": losses,
            "bucket_psnr": {name: psnr(means[SQUARED].item()) for name, means in measured.items()},
        }


@dataclass(frozen=True)
class TaeInputs:
    """The clips, and the network that tells how alike pictures look; see ``Inputs``."""

    config: TaeRunConfig
    index: Index
    perceptual: Perceptual | None

    def choices(self, device: torch.device) -> str:
        """Which losses there are."""
        losses = self.config.losses
        looks = "off (losses.perceptual.path names no VGG)"
        if losses.perceptual and self.perceptual:
            kind = "LPIPS" if self.perceptual.is_lpips else "VGG without LPIPS' weights"
            looks = f"{losses.perceptual.weight:g} ({kind})"
        game = "off (losses.adversarial is not set)"
        if losses.adversarial:
            weight = f"{losses.adversarial.weight:g}{' adaptive' if losses.adversarial.adaptive else ''}"
            game = f"{weight} from sample {losses.adversarial.from_samples:,}"
        return (
            f"losses: l1 {losses.l1:g}, perceptual {looks}, adversarial {game}, kl {losses.kl:g}, "
            f"outlier {losses.outlier:g} beyond {losses.outlier_deviations:g} deviations"
        )

    def frozen(self) -> dict[str, str]:
        """The perceptual network, where there is one."""
        return {"losses.perceptual": self.perceptual.fingerprint} if self.perceptual else {}

    def fingerprints(self) -> dict[str, Any]:
        """Of the data and the perceptual network."""
        looks = self.perceptual.fingerprint if self.perceptual else None
        return {"data_fingerprint": self.index.fingerprint, "perceptual_fingerprint": looks}

    def refuse_others(self, there: Checkpoint) -> None:
        """Amid a run the loss may not become another; a stage that begins from elsewhere has its own.

        Raises:
            UserError: the checkpoint, which is not a stage's last, was trained with another perceptual network.
        """
        before, here = there.progress["perceptual_fingerprint"], self.fingerprints()["perceptual_fingerprint"]
        if before != here and not there.manifest.final:
            raise UserError(
                f"losses.perceptual.path holds another network (fingerprint {str(here)[:12]}) than {there.folder} was "
                f"trained with ({str(before)[:12]}); name that one"
            )

    def build(self, dist: Dist) -> TaePlayers:
        """The game in its engine. Collective."""
        config = self.config
        if self.perceptual:
            self.perceptual.to(dist.device, DTYPES[config.engine.dtype])
        game = make_game(config, self.perceptual)
        return TaePlayers(config, make_engine(game, config.engine, config.optim, dist), dist.device)

    def export(self, folder: Path, out: Path, stage: StageConfig, device: torch.device) -> None:
        """The autoencoder, its statistics and a page."""
        export_tae(self.config, self.index, folder, out, stage, device)


class TaeTask:
    """See ``Task``."""

    def __init__(self, config: TaeRunConfig) -> None:
        self._config = config
        self._flops: dict[str, int] = {}

    @property
    def name(self) -> str:
        """What it is."""
        tae = self._config.tae
        return f"tae {tae.time}x{tae.space}x{tae.space}"

    @property
    def shape(self) -> str:
        """Its latents and widths."""
        tae = self._config.tae
        widths = ", ".join(str(tae.width * m) for m in tae.multipliers)
        return f"{tae.channels} channels, {tae.blocks} blocks a level of widths {widths}"

    @property
    def parameters(self) -> int:
        """The discriminator's are among them."""
        return sum(p.numel() for p in self._game.parameters())

    def tokens(self, bucket: BucketConfig) -> int:
        """What its cost grows with."""
        return sample_tokens(self._config.tae, bucket)

    def forward_flops(self, bucket: BucketConfig) -> int:
        """Of encoder and decoder, by torch's counter."""
        if str(bucket) not in self._flops:
            model = self._game.autoencoder
            pixels = torch.empty(1, 3, bucket.frames, bucket.height, bucket.width, device="meta")
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model.decode(model.encode(pixels)[0])
            self._flops[str(bucket)] = counter.get_total_flops()
        return self._flops[str(bucket)]

    def memory(self, bucket: BucketConfig, *, batch: int, world: int, device: str) -> Memory:
        """By a forward and a backward on the meta device; the perceptual network is not counted."""
        config = self._config
        game = self._on_meta().to(DTYPES[config.engine.dtype])
        shape = latent_shape(config.tae, bucket.frames, bucket.height, bucket.width)
        pixels = torch.empty(batch, 3, bucket.frames, bucket.height, bucket.width, device="meta")
        noise = torch.empty(batch, *shape, device="meta")

        def step() -> None:
            game(pixels, noise, plays=config.losses.adversarial is not None)[:, 0].sum().backward()

        return lay_out(config.engine, Probe(self.parameters, peak(game, step, {}), 0), world)

    def choose_forms(self, device: torch.device) -> None:
        """It has none to choose."""

    def load_inputs(self, dist: Dist) -> TaeInputs:
        """Raises:
        UserError: the shards or the perceptual network are not there; or the shards hold latents.
        """
        config = self._config
        index = load_index(config.data.path)
        if index.latents is not None:
            raise UserError(f"data.path={config.data.path} holds latents; an autoencoder is trained on clips")
        looks = config.losses.perceptual
        return TaeInputs(config, index, load_perceptual(looks.path) if looks else None)

    @cached_property
    def _game(self) -> TaeGame:
        return self._on_meta()

    def _on_meta(self) -> TaeGame:
        with torch.device("meta"):
            return make_game(self._config, None)


def make_game(config: TaeRunConfig, perceptual: Perceptual | None) -> TaeGame:
    """The model that the engine trains."""
    game = TaeGame(config.tae, config.losses, perceptual)
    game.autoencoder.recompute(config.engine.activation_checkpointing)
    return game


def latent_shape(tae: TaeConfig, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(C, T, h, w)."""
    return tae.channels, (frames - 1) // tae.time + 1, height // tae.space, width // tae.space
