"""What a cache saves: FLOPs, time and quality of a guided generation with it, beside the same without any.

Three generations from one noise go side by side, call by call, so that a slow minute of the machine meets them all:
without a cache, with one that decides but never skips, and with the cache. The model is trained (``checkpoint``), or
has random weights: then its schedules mean nothing, but what a skip costs and saves is as it will be.

Shapes: B samples, latents (B, C, T', H', W').
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lingen.adacache_config import AdaCacheConfig
from lingen.bench.device import clock_of, dtype_of, find_device, name_of
from lingen.bench.tables import markdown
from lingen.bench.timing import Clock
from lingen.bench.workload import TEXT_LENGTH, Inputs, Subject, bench_config, grid_of
from lingen.cache_config import (
    CacheConfig,
    DeltaDitConfig,
    FirstBlockConfig,
    FixedConfig,
    MagCacheConfig,
    NeverConfig,
    PabConfig,
    ScheduleConfig,
    TeaCacheConfig,
    TGateConfig,
    read_cache,
)
from lingen.config import token_grid
from lingen.engine import DTYPES, choose_forms
from lingen.flow import bucket_shift, generator
from lingen.models import Backbone
from lingen.pipeline import LinGenPipeline
from lingen.sampling.cache import CacheRun, CacheSummary
from lingen.sampling.call import Call, Context, Forward
from lingen.sampling.guidance import forward_of, guided
from lingen.sampling.schedule import shifted
from lingen.text.join import Text

PAIR: tuple[Context, ...] = ("pair",)
NONE, NEVER, CACHED = "no cache", "never skips", "cache"
LITTLE = 1e-9  # a threshold that everything comes to


class CacheWords(BaseModel):
    """``size``, ``tokens``, ``frame``, ``text_tokens`` and ``model`` make a model of random weights; ``checkpoint``
    brings its own, and its largest videos."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = "fixed"  # a name in conf/cache, a YAML file, or keys
    checkpoint: str | None = None
    prompt: str = "a red circle moving left"  # with checkpoint
    model: Literal["dit", "lingen"] = "dit"
    size: str = "tiny"
    tokens: PositiveInt = 1024
    frame: tuple[PositiveInt, PositiveInt] | None = None  # (H, W) in tokens
    text_tokens: PositiveInt = 64
    batch: PositiveInt = 1  # videos at once, each of its own noise
    steps: PositiveInt = 30
    guidance_scale: Annotated[float, Field(gt=1.0)] = 5.0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: dict[str, str] = {}
    rounds: PositiveInt = 3


@dataclass(frozen=True)
class Trial:
    """What is generated."""

    name: str
    model: Backbone
    text: Text
    negative: Text
    noise: Tensor  # (B, C, T', H', W')
    sigmas: list[float]
    decode: Callable[[Tensor], Tensor] | None  # latents -> pixels in [-1, 1]; None: there is no autoencoder


def run(words: CacheWords) -> dict[str, Any]:
    """FLOPs and time with the cache over those without, the PSNR between their videos, and what deciding costs."""
    config = read_cache(words.policy)
    device = find_device(words.device)
    dtype = dtype_of(words.dtype, device)
    kernels = choose_forms(words.kernels, device, DTYPES[dtype])
    trial = _untrained(words, device, dtype) if words.checkpoint is None else _trained(words, device, dtype)
    seconds, latents, summary = _race(trial, config, words, clock_of(device))
    calls = range(words.steps)
    wall = {name: sum(statistics.median(rounds[n] for rounds in seconds[name]) for n in calls) for name in seconds}
    pairs = [
        never / none
        for with_, without in zip(seconds[NEVER], seconds[NONE], strict=True)
        for never, none in zip(with_, without, strict=True)
    ]
    flops, time = summary.flops_ratio, wall[CACHED] / wall[NONE]
    result = {
        "bench": "cache",
        **words.model_dump(),
        "model": trial.name,
        "policy": words.policy,
        "cache": config.model_dump(),
        "device": name_of(device),
        "dtype": dtype,
        "kernels": kernels,
        "torch": torch.__version__,
        "clock": "CUDA events" if device.type == "cuda" else "process CPU time, 1 thread",
        "tokens": math.prod(trial.noise.shape[2:]) // math.prod(trial.model.patch),
        "seconds": {name: round(value, 4) for name, value in wall.items()},
        "executed_flops": summary.executed_flops,
        "executed_flops_ratio": flops,
        "wall_ratio": time,
        "speed_up_kept": flops / time,  # wall-clock speed-up over that in FLOPs
        "psnr": _psnr(trial, latents[CACHED], latents[NONE]),
        "psnr_of": "pixels" if trial.decode is not None else "latents",
        "never_skip_overhead": statistics.median(pairs) - 1,
        "never_skips_is_no_cache": torch.equal(latents[NEVER], latents[NONE]),
        "summary": str(summary),
    }
    figures = ("executed_flops_ratio", "wall_ratio", "speed_up_kept", "psnr", "never_skip_overhead")
    shown = ("equal" if result[figure] is None else f"{result[figure]:.4g}" for figure in figures)
    print(markdown(("model", "policy", *figures), [(trial.name, words.policy, *shown)]))
    return result


def _untrained(words: CacheWords, device: torch.device, dtype: str) -> Trial:
    config = bench_config(words.model, words.size, f"engine.dtype={dtype}", f"{TEXT_LENGTH}={words.text_tokens}")
    subject = Subject(config, device, train=False)
    inputs = Inputs.draw(config, grid_of(words.tokens, words.frame), device)
    rows, mask = words.batch, inputs.mask.expand(words.batch, -1)
    text = ({name: states.expand(rows, -1, -1) for name, states in inputs.states.items()}, mask)
    negative = ({name: torch.randn_like(states) for name, states in text[0].items()}, mask)
    noise = torch.randn(rows, *inputs.noise.shape[1:], device=device)
    sigmas = shifted(words.steps, bucket_shift(words.tokens, config.flow)).tolist()
    return Trial(words.model, subject.model, text, negative, noise, sigmas, None)


def _trained(words: CacheWords, device: torch.device, dtype: str) -> Trial:
    assert words.checkpoint is not None
    pipe = LinGenPipeline.from_pretrained(words.checkpoint, device=device.type, dtype=dtype)  # type: ignore[arg-type]
    shape, config = pipe.shape(None, None, None), pipe.config
    grid = token_grid(config, shape.frames, shape.height, shape.width)
    shift = pipe.stage.timestep_shift or bucket_shift(math.prod(grid), config.flow)
    sides = (n * side for n, side in zip(grid, config.size.patch, strict=True))
    noise = torch.randn(words.batch, config.autoencoder.channels, *sides, generator=generator("cpu", "bench"))
    text, negative = (
        pipe.text.encode([asked] * words.batch) for asked in (words.prompt, config.sampler.negative_prompt)
    )
    sigmas = shifted(words.steps, shift).tolist()
    name = config.model.name
    return Trial(name, pipe.model, text, negative, noise.to(device), sigmas, pipe.autoencoder.decode)


@torch.no_grad()
def _race(
    trial: Trial, config: CacheConfig, words: CacheWords, clock: Clock
) -> tuple[dict[str, list[list[float]]], dict[str, Tensor], CacheSummary]:
    """Seconds of each call by lane and round, the latents at the end, and what the cache did.

    A first generation goes ahead unmeasured: it fills torch's pools and compiles.
    """
    seconds: dict[str, list[list[float]]] = {NONE: [], NEVER: [], CACHED: []}
    console = Console(stderr=True)
    for number in track(range(words.rounds + 1), "generations", console=console, transient=True):
        runs = {
            name: CacheRun(each, trial.model, calls=words.steps, contexts=PAIR)
            for name, each in ((NEVER, never_skips(config)), (CACHED, config))
        }
        forwards = {NONE: forward_of(trial.model)} | {name: each.forward for name, each in runs.items()}
        took, latents = _generate(trial, forwards, words.guidance_scale, clock)
        for name in seconds if number else ():
            seconds[name].append(took[name])
    return seconds, latents, runs[CACHED].summary()


def _generate(
    trial: Trial, forwards: dict[str, Forward], scale: float, clock: Clock
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Euler's method in every lane at once; the lanes take turns at who is first."""
    weight = trial.model.patch_in.weight
    denoise = {
        name: guided(forward, trial.text, trial.negative, scale, device=weight.device, dtype=weight.dtype)
        for name, forward in forwards.items()
    }
    x = dict.fromkeys(forwards, trial.noise)
    seconds: dict[str, list[float]] = {name: [] for name in forwards}

    def step(name: str, call: Call, there: float) -> None:
        sigma = torch.full((len(trial.noise),), call.sigma, device=weight.device)
        x[name] = x[name] + (there - call.sigma) * denoise[name](x[name], sigma, call)

    order = list(forwards)
    for n, (here, there) in enumerate(pairwise(trial.sigmas)):
        call = Call(n, len(trial.sigmas) - 1, here, n)
        for name in order:
            seconds[name].append(clock(partial(step, name, call, there)))
        order = [*order[1:], order[0]]
    return seconds, x


def never_skips(config: CacheConfig) -> CacheConfig:
    """The same cache with its sharpest setting: it measures, decides and stores, and computes everything."""
    match config:
        case AdaCacheConfig():
            changed: dict[str, Any] = {"codebook": tuple((at, 1) for at, _ in config.codebook), "last": 1}
        case FixedConfig(period=None):
            changed = {"sites": dict.fromkeys(config.sites, 1)}
        case ScheduleConfig():
            changed = {"schedules": tuple("1" * len(schedule) for schedule in config.schedules)}
        case FixedConfig() | DeltaDitConfig():
            changed = {"period": 1}
        case PabConfig():
            changed = {"spatial": 1, "temporal": 1, "cross": 1}
        case TGateConfig():
            changed = {"gate": 1.0, "period": 1}
        case TeaCacheConfig():
            changed = {"threshold": LITTLE, "coefficients": (1.0, 0.0)}
        case FirstBlockConfig():
            changed = {"threshold": LITTLE}
        case MagCacheConfig():
            changed = {"retention": 1.0}
        case NeverConfig():
            changed = {}
    return config.model_copy(update=changed)


def _psnr(trial: Trial, found: Tensor, truth: Tensor) -> float | None:
    """In dB; of pixels, whose range is 2, or of latents, whose range is that of the truth. None: they are equal."""
    if trial.decode is not None:
        found, truth = (trial.decode(latents).clamp(-1, 1) for latents in (found, truth))
        span = 2.0
    else:
        span = float(truth.max() - truth.min())
    error = float((found - truth).square().mean())
    return 10 * math.log10(span**2 / error) if error else None
