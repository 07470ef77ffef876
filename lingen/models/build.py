"""From a configuration to a model: the one place where LinGen and DiT differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from lingen.models.backbone import Backbone
from lingen.models.block import Block, Mixer
from lingen.models.embed import TextEmbedding, TextProjection
from lingen.models.mixers.attention import FullAttention
from lingen.models.mixers.mamba1 import BidirectionalMamba1
from lingen.models.mixers.mamba2 import BidirectionalMamba2
from lingen.models.mixers.mate import Mate
from lingen.models.mixers.scan import scan_order
from lingen.models.mixers.window import WindowAttention

if TYPE_CHECKING:
    from lingen.config import Config
    from lingen.model_config import MateConfig, SizeConfig


def _full_attention(config: Config, layer: int) -> Mixer:
    return FullAttention(config.size.d_model, config.size.head_dim)


def _mate(config: Config, layer: int) -> Mixer:
    size, mate = config.size, config.model.mate
    assert mate is not None  # the schema sees to it
    te = WindowAttention(size.d_model, size.head_dim, window=mate.window, shifted=layer % 2 == 1) if mate.te else None
    return Mate(_mamba(size, mate, layer) if mate.ma else None, te)


def _mamba(size: SizeConfig, mate: MateConfig, layer: int) -> Mixer:
    order, separate = scan_order(mate.scan, layer), mate.projections == "separate"
    if mate.ssm == "mamba1":
        return BidirectionalMamba1(
            size.d_model,
            expand=mate.expand,
            d_state=size.d_state,
            conv_kernel=mate.conv_kernel,
            separate=separate,
            order=order,
            review_pool=mate.review_pool,
        )
    return BidirectionalMamba2(
        size.d_model,
        expand=mate.expand,
        head_dim=mate.mamba_head_dim,
        d_state=size.d_state,
        conv_kernel=mate.conv_kernel,
        chunk_size=mate.chunk_size,
        separate=separate,
        order=order,
        review_pool=mate.review_pool,
    )


MIXERS: dict[str, Callable[[Config, int], Mixer]] = {"lingen": _mate, "dit": _full_attention}


def make_model(config: Config) -> Backbone:
    """The model of a run, in fp32 on torch's default device, initialised from torch's generator.

    Under ``torch.device("meta")`` nothing is allocated.

    Args:
        config: its sections model, size, autoencoder, text and engine are read.
    """
    device = torch.get_default_device()
    size, make_mixer = config.size, MIXERS[config.model.name]
    with torch.device("meta"):  # so that each weight is written once, by initialise
        projections = {
            name: TextProjection(encoder.dim, size.d_model, encoder.projection)
            for name, encoder in config.text.encoders.items()
        }
        model = Backbone(
            [
                Block(make_mixer(config, layer), size.d_model, size.head_dim, size.mlp_ratio)
                for layer in range(config.depth)
            ],
            d_model=size.d_model,
            text=TextEmbedding(projections),
            channels=config.autoencoder.channels,
            patch=size.patch,
            activation_checkpointing=config.engine.activation_checkpointing,
        )
    model.to_empty(device=device)
    initialise(model)
    return model


def initialise(model: nn.Module) -> None:
    """Xavier for every linear layer; then what a module does to its own weights and to its children's."""
    for module in reversed(list(model.modules())):  # children first
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
