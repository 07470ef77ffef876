"""What the benchmarks run: a model on a device, and a guided forward or a training step of it.

Shapes: token grid (T, H, W), C latent channels, L text tokens of width S of an encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lingen.compose import compose
from lingen.config import BucketConfig, Config, StageConfig
from lingen.curriculum import TRAIN_FLOPS
from lingen.dist import Dist
from lingen.engine import DTYPES, Engine, make_engine
from lingen.flow import interpolate, sample_losses
from lingen.kernels.index import Grid
from lingen.models import Backbone, make_model
from lingen.sampling.call import Call
from lingen.sampling.guidance import forward_of, guided

# Frames (H, W) of tokens that a grid of a given number of tokens may have: 512x896 and 512x512 at 16 pixels a token,
# then smaller ones.
FRAMES = ((32, 56), (32, 32), (16, 28), (16, 16), (8, 14), (8, 8), (4, 4), (2, 2), (1, 1))
TEXT_LENGTH = "text.encoders.minilm.length"  # the word for how many text tokens there are
FEWEST_FRAMES = 4  # latent ones, so that windows and reviews find neighbours in time


def bench_config(model: str, size: str, *words: str) -> Config:
    """The published run of a model (conf/experiment/paper_4b.yaml) at another size, with plain torch as its engine.

    ``words`` are those of train.py. Data and autoencoder are named, but never looked for.
    """
    unused = ("name=bench", "data.path=unused", "autoencoder.path=unused")
    engine = ("engine=cpu", "engine.activation_checkpointing=false")
    return compose([*unused, "experiment=paper_4b", f"model={model}", f"size={size}", *engine, *words])


def ladder(size: str) -> list[StageConfig]:
    """Every published stage (LinGen, training recipe): conf/curriculum/paper.yaml, and the two that it leaves aside."""
    configs = [bench_config("lingen", size, *words) for words in ((), ("stage=quality",), ("stage=t2v_768_17s",))]
    return [stage for config in configs for stage in config.stages.values()]


def largest_bucket(stage: StageConfig) -> BucketConfig:
    """The one of the most pixels: the stage's video."""
    return max(stage.buckets, key=lambda bucket: bucket.frames * bucket.height * bucket.width)


def grid_of(tokens: int, frame: tuple[int, int] | None = None) -> Grid:
    """A grid of just so many tokens: of ``frame`` (H, W), or the largest of ``FRAMES`` that leaves a few of them.

    Raises:
        ValueError: no whole number of ``frame`` has so many tokens.
    """
    if frame is not None:
        count, rest = divmod(tokens, prod(frame))
        if rest or not count:
            raise ValueError(f"tokens={tokens} is not a multiple of frame={list(frame)}, which has {prod(frame)}")
        return count, *frame
    fitting = (f for f in FRAMES if tokens % prod(f) == 0 and tokens // prod(f) >= FEWEST_FRAMES)
    height, width = next(fitting, (1, 1))
    return tokens // (height * width), height, width


@dataclass(frozen=True)
class Inputs:
    """One sample."""

    latents: Tensor  # (1, C, T', H', W') fp32
    noise: Tensor  # the same
    sigma: Tensor  # (1,)
    states: dict[str, Tensor]  # (1, L, S) by text encoder
    mask: Tensor  # (1, L) bool

    @staticmethod
    def draw(config: Config, grid: Grid, device: torch.device) -> Inputs:
        """Random ones, the same each time."""
        torch.manual_seed(0)
        sides = tuple(n * side for n, side in zip(grid, config.size.patch, strict=True))
        latents, noise = torch.randn(2, 1, config.autoencoder.channels, *sides, device=device)
        encoders = config.text.encoders
        states = {name: torch.randn(1, e.length, e.dim, device=device) for name, e in encoders.items()}
        mask = torch.ones(1, sum(config.text.lengths.values()), dtype=torch.bool, device=device)
        return Inputs(latents, noise, torch.full((1,), 0.5, device=device), states, mask)


@torch.no_grad()
def leave_no_zeros(model: nn.Module) -> None:
    """Make random what begins at zero (gates, outputs): a GPU multiplies zeros faster, and gates stop all gradients."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


class Subject:
    """A model on a device, to denoise or to train, with random weights."""

    def __init__(self, config: Config, device: torch.device, *, train: bool) -> None:
        self.config, self.device = config, device
        torch.manual_seed(0)
        with device:  # torch's default one inside
            self.model = make_model(config)
        leave_no_zeros(self.model)
        self.engine: Engine | None = None
        if train:
            self.engine = make_engine(self.model, config.engine, config.optim, Dist(0, 1, 0, device))
        else:
            self.model.to(DTYPES[config.engine.dtype])
        self._compiled: Backbone | None = None

    @property
    def layers_of_size(self) -> int:
        """How many layers the model of this size has, however many this one has."""
        return bench_config(self.config.model.name, self.config.size.name).depth

    def flops(self, grid: Grid, *, samples: int) -> int:
        """Of one call: a forward of so many samples, or a training step."""
        forward = samples * self.model.flops(grid, self.config.text.lengths)
        return TRAIN_FLOPS * forward if self.engine is not None else forward

    def call(self, grid: Grid, *, guidance: bool = True, compiled: bool = False) -> Callable[[], object]:
        """A training step, or one denoising forward: of two samples where there is guidance."""
        inputs = Inputs.draw(self.config, grid, self.device)
        model = self.compiled() if compiled else self.model
        if self.engine is not None:
            engine = self.engine
            return lambda: self._train(engine, model, inputs)
        scale = self.config.sampler.guidance_scale if guidance else 1.0
        text = (inputs.states, inputs.mask)
        dtype = model.patch_in.weight.dtype
        denoise = guided(forward_of(model), text, text, scale, device=self.device, dtype=dtype)
        only = Call(index=0, count=1, sigma=0.5, step=0)
        return lambda: torch.no_grad()(denoise)(inputs.latents, inputs.sigma, only)

    def compiled(self) -> Backbone:
        """The model with its blocks compiled, on the same weights."""
        if self._compiled is None:
            import torch._dynamo

            # Blocks differ in scan order, shift and length: each kind is compiled, and none falls back unseen.
            torch._dynamo.config.recompile_limit = 1024
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
            self._compiled = copy.deepcopy(self.model, shared)
            for block in self._compiled.blocks:
                block.compile(dynamic=False)
        return self._compiled

    def _train(self, engine: Engine, model: Backbone, inputs: Inputs) -> None:
        dtype = DTYPES[self.config.engine.dtype]
        x = interpolate(inputs.latents, inputs.noise, inputs.sigma)
        velocity = model(x.to(dtype), inputs.sigma, inputs.states, inputs.mask).float()
        engine.backward(sample_losses(velocity, inputs.latents, inputs.noise).sum())
        engine.step(1e-4)
