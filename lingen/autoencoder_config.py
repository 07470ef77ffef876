"""The part of a run's schema that says what the latent space is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from lingen.model_config import PathText, Section, safe_name


class TileConfig(Section):
    """Tiles that an autoencoder works in, in pixels; null leaves an axis whole."""

    frames: Annotated[int, Field(gt=1)] | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    overlap: Annotated[float, Field(ge=0.0, le=0.5)] = 0.25  # of a tile, that its neighbour has too


class AutoencoderConfig(Section):
    """The latent space. ``time`` and ``space`` are its ratios: r*k + 1 frames become k + 1 latent frames."""

    kind: Literal["pca", "diffusers", "tae"]
    path: PathText  # pca: a file; tae: an export; diffusers: a folder, or a hub id that was fetched before
    subfolder: Annotated[str, AfterValidator(lambda name: safe_name(name) if name else name)] = ""  # of path
    channels: PositiveInt = 16
    time: PositiveInt = 8
    space: PositiveInt = 8
    dtype: Literal["fp32", "bf16"] = "fp32"  # of its weights and activations; latents are always fp32
    tile: TileConfig | None = None  # None: whole clips at once

    @model_validator(mode="after")
    def _kinds_take_what_they_have(self) -> AutoencoderConfig:
        if self.kind == "pca" and (self.subfolder or self.dtype != "fp32"):
            raise ValueError("autoencoder.kind=pca is one file in fp32: it takes neither subfolder nor dtype")
        if self.kind == "tae" and self.subfolder:
            raise ValueError("autoencoder.kind=tae takes no subfolder: name the export itself in autoencoder.path")
        return self

    @model_validator(mode="after")
    def _tiles_are_latents(self) -> AutoencoderConfig:
        if self.tile is None:
            return self
        if self.tile.frames is not None and (self.tile.frames - 1) % self.time:
            near = (self.tile.frames - 1) // self.time * self.time + 1 + self.time
            raise ValueError(f"autoencoder.tile.frames={self.tile.frames} is not {self.time}*k + 1, such as {near}")
        for side in ("height", "width"):
            size = getattr(self.tile, side)
            if size is not None and size % self.space:
                raise ValueError(f"autoencoder.tile.{side}={size} is not a multiple of autoencoder.space={self.space}")
        return self
