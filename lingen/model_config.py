"""The part of a run's schema that says what the model is, and what computes it. ``lingen.config`` holds the rest."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
Sides = tuple[PositiveInt, PositiveInt, PositiveInt]  # (T, H, W)
Scan = Literal["rotary", "fixed", "zigzag", "hilbert"]  # fixed: spatial row-major in every layer


def safe_name(name: str) -> str:
    """A relative path that stays below its folder, made of plain characters."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or any(p in ("..", ".") or p.startswith(".") for p in parts):
        raise ValueError("must be a relative name such as 'demo/lingen', without '..' and hidden parts")
    return name


Name = Annotated[str, AfterValidator(safe_name)]


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MateConfig(Section):
    """The MATE block of LinGen. What the paper does not publish is ours; docs/models.md gives the reasons.

    Each row of the published ablation (LinGen, ablation table) is a value here: ``te``, ``ma``, ``scan``,
    ``review_pool`` and ``ssm``.
    """

    ma: bool = True  # the MA-branch: the Mamba over the whole video
    te: bool = True  # the TE-branch: attention in windows
    scan: Scan = "rotary"
    ssm: Literal["mamba2", "mamba1"] = "mamba2"
    projections: Literal["shared", "separate"] = "shared"  # of the two directions
    window: Sides = (4, 8, 8)  # TESA window (T, H, W) in tokens: 256 tokens
    review_pool: Sides | None = (2, 2, 2)  # average pooling that makes the review tokens; null: none
    expand: PositiveInt = 2
    mamba_head_dim: PositiveInt = 64
    conv_kernel: Annotated[int, Field(ge=2, le=8)] = 4
    chunk_size: PositiveInt = 64

    @model_validator(mode="after")
    def _mixes_at_all(self) -> MateConfig:
        if not (self.ma or self.te):
            raise ValueError("model.mate.ma=false and model.mate.te=false leave no mixer; keep one of the branches")
        return self

    @model_validator(mode="after")
    def _choices_are_read(self) -> MateConfig:
        """Two rows of an ablation that differ in a branch which neither has are one model. Widths may stand there: they
        are set once for all rows."""
        for key in () if self.ma else ("scan", "ssm", "projections", "review_pool"):
            if getattr(self, key) != MateConfig.model_fields[key].default:
                raise ValueError(
                    f"model.mate.{key} is of the MA-branch, which model.mate.ma=false leaves out; set one of the two"
                )
        return self


class ModelConfig(Section):
    """Which mixer the backbone gets: that is the whole difference between LinGen and DiT."""

    name: Literal["lingen", "dit"]
    mate: MateConfig | None = None  # for LinGen alone

    @model_validator(mode="after")
    def _mate_for_lingen(self) -> ModelConfig:
        if (self.name == "lingen") != (self.mate is not None):
            raise ValueError("model.mate belongs to model=lingen, and model=dit has none")
        return self


class DepthConfig(Section):
    """Layers of each model, so that both have about the same parameter count."""

    lingen: PositiveInt
    dit: PositiveInt


class SizeConfig(Section):
    """Width and depth. ``patch`` is (T, H, W) in latent positions."""

    name: str
    d_model: PositiveInt
    depth: DepthConfig
    head_dim: PositiveInt = 64
    mlp_ratio: PositiveInt = 4
    d_state: PositiveInt = 64
    patch: Sides = (1, 2, 2)

    @model_validator(mode="after")
    def _heads_divide(self) -> SizeConfig:
        if self.d_model % self.head_dim or self.head_dim % 2:
            raise ValueError(f"d_model={self.d_model} must be a multiple of an even head_dim={self.head_dim}")
        return self


class KernelsConfig(Section):
    """Which form of each kernel computes it; auto is the fastest that the device has. A missing one is an error."""

    ssd: Literal["auto", "mamba-ssm", "torch"] = "auto"
    selective_scan: Literal["auto", "mamba-ssm", "torch"] = "auto"
    conv: Literal["auto", "triton", "torch"] = "auto"
    norm: Literal["auto", "triton", "torch"] = "auto"
    window: Literal["auto", "triton", "torch"] = "auto"
    attention: Literal["auto", "cudnn", "flash-attn", "flash", "sdpa", "torch"] = "auto"
