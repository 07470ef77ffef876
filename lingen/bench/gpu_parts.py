"""The parts of scripts/gpu_check.py, each a process: ``python -m lingen.bench.gpu_parts PART FILE small|full``.

Each line that is written to FILE is one finding, as JSON, as soon as it is there: a part that is cut off loses no more
than the one in hand. A case that fails is a finding with an ``error``, and the next one goes on.
"""

from __future__ import annotations

import gc
import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat

from lingen.bench import ablation, latency, memory, numerics, profile
from lingen.bench.device import find_device, name_of
from lingen.bench.workload import bench_config, ladder, largest_bucket
from lingen.config import token_grid
from lingen.engine import DTYPES, choose_forms
from lingen.kernels.index import Grid

Finding = dict[str, Any]
Model = Literal["lingen", "dit"]
BOTH: tuple[Model, ...] = ("lingen", "dit")
FORWARDS = 3  # timed, where a forward takes a second or a few


class CheckWords(BaseModel):
    """The words of scripts/gpu_check.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str = "runs/gpu_check"
    minutes: PositiveFloat = 8.5
    small: bool = False


@dataclass(frozen=True)
class Scale:
    """What is measured: the published pair, or a tiny one to try the check itself."""

    size: str
    grids: dict[str, Grid]  # by length and frame, "17s 512x896"
    text_tokens: int
    device: str
    dtype: Literal["fp32", "bf16"]
    small_grid: Grid  # of the numerics
    channels: int
    blocks: int  # of a model that is trained

    def of(self, length: str) -> dict[str, Grid]:
        """The grids of a length, wide frames first."""
        return {name: grid for name, grid in self.grids.items() if name.startswith(length)}


def full() -> Scale:
    """LinGen-4B and DiT-4B at 512p, wide as conf/stage has it, and square."""
    config = bench_config("lingen", "4b")
    grids: dict[str, Grid] = {}
    for stage in (stage for stage in ladder("4b") if stage.name.startswith("t2v_512")):
        bucket = largest_bucket(stage)
        for width in (bucket.width, bucket.height):
            name = f"{bucket.frames / stage.fps:.0f}s {bucket.height}x{width}"
            grids[name] = token_grid(config, bucket.frames, bucket.height, width)
    return Scale("4b", grids, sum(config.text.lengths.values()), "cuda", "bf16", (5, 9, 10), 64, 4)


def small() -> Scale:
    """Seconds on a CPU."""
    grids: dict[str, Grid] = {"17s 512x896": (3, 4, 7), "34s 512x896": (6, 4, 7), "68s 512x896": (12, 4, 7)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Scale("tiny", grids, 16, device, "bf16" if device == "cuda" else "fp32", (3, 4, 5), 16, 1)


def check_numerics(scale: Scale) -> Iterator[Finding]:
    """Every kernel in every form."""
    device = find_device(scale.device)
    yield from numerics.run(device, DTYPES[scale.dtype], grid=scale.small_grid, heads=2, channels=scale.channels)


def time_forwards(scale: Scale, models: tuple[Model, ...], lengths: tuple[str, ...], **words: Any) -> Iterator[Finding]:
    """One denoising forward of each model and grid, of one sample unless ``words`` say so."""
    for length in lengths:
        for name, grid in scale.of(length).items():
            for model in models:
                yield from _each({"case": f"{model} {name}"}, partial(_latency, scale, model, grid, words))


def _latency(scale: Scale, model: Model, grid: Grid, words: dict[str, Any]) -> list[Finding]:
    common = {"models": [model], **_of_grid(scale, grid), "text_tokens": scale.text_tokens}
    chosen = {"guidance": False, "compile": False, "rounds": FORWARDS} | words
    return latency.run(latency.LatencyWords.model_validate(common | chosen | {"tokens": [prod(grid)]}))


def _of_grid(scale: Scale, grid: Grid) -> dict[str, Any]:
    """The words that all benchmarks share."""
    return {"size": scale.size, "dtype": scale.dtype, "device": scale.device, "frame": grid[1:]}


def time_ablation(scale: Scale, names: Sequence[str]) -> Iterator[Finding]:
    """Rows of the ablation at 17 s, after the whole model."""
    device, (case, grid) = find_device(scale.device), next(iter(scale.of("17s").items()))
    shape = {"tokens": prod(grid), "text_tokens": scale.text_tokens}
    words = ablation.AblationWords.model_validate(_of_grid(scale, grid) | shape)
    choose_forms({}, device, DTYPES[scale.dtype])
    whole: list[float] = []

    def row(name: str) -> list[Finding]:
        seconds, facts = ablation.time_row(words, name, device)
        whole.extend([seconds] if not whole else [])
        return [ablation.finish(name, [seconds], whole, facts)]

    for name in (ablation.FULL, *names):
        yield from _each({"case": f"{name}, {case}"}, partial(row, name))


def measure_memory(scale: Scale) -> Iterator[Finding]:
    """A training step of a few blocks at 17 s, predicted and measured; and how long it takes."""
    case, grid = next(iter(scale.of("17s").items()))
    shape = _of_grid(scale, grid) | {"tokens": [prod(grid)], "blocks": scale.blocks, "measure": True}

    def measured(model: Model, checkpointing: bool) -> list[Finding]:
        choice = {"models": [model], "activation_checkpointing": checkpointing}
        rows: list[Finding] = memory.measured(memory.MemoryWords.model_validate(shape | choice))["rows"]
        return rows

    for model in BOTH:
        for checkpointing in (False, True):
            yield from _each({"case": f"{model} {case}"}, partial(measured, model, checkpointing))
        step = {"mode": "train", "blocks": scale.blocks}
        yield from _each({"case": f"{model} {case}"}, partial(_latency, scale, model, grid, step))


def profile_block(scale: Scale) -> Iterator[Finding]:
    """One LinGen block at 17 s."""
    device, grid = find_device(scale.device), next(iter(scale.of("17s").values()))
    choose_forms({}, device, DTYPES[scale.dtype])
    yield from _each({}, partial(profile.run, scale.size, grid, device, scale.dtype, scale.text_tokens))


def _each(facts: Finding, measure: Callable[[], list[Finding]]) -> Iterator[Finding]:
    """What ``measure`` finds, or how it failed."""
    try:
        found = measure()
    except Exception as error:  # out of memory, a kernel that does not compile: the next case goes on
        found = [{"error": f"{type(error).__name__}: {error}"[:1000]}]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    yield from (facts | finding for finding in found)


@dataclass(frozen=True)
class Part:
    """What runs in a process of its own, and the seconds that it may take."""

    name: str
    limit: int
    run: Callable[[Scale], Iterator[Finding]]


# Mamba1 has no fused form without mamba-ssm's CUDA extension, and may take long.
QUICK_ROWS = tuple(name for name in ablation.ROWS if name not in (ablation.FULL, "Mamba1"))
PARTS = (  # what matters most comes first
    Part("numerics", 120, check_numerics),
    Part("LinGen, one forward", 120, lambda s: time_forwards(s, ("lingen",), ("17s", "34s", "68s"))),
    Part("DiT, one forward, 17 s", 60, lambda s: time_forwards(s, ("dit",), ("17s",))),
    Part("profile of a LinGen block", 45, profile_block),
    Part("memory, and training steps", 90, measure_memory),
    Part("guided forward, 17 s", 60, lambda s: time_forwards(s, BOTH, ("17s",), guidance=True)),
    Part("ablation", 90, lambda s: time_ablation(s, QUICK_ROWS)),
    Part("DiT, one forward, 34 s", 60, lambda s: time_forwards(s, ("dit",), ("34s",), rounds=2, warm_up=False)),
    Part("compiled, 17 s", 100, lambda s: time_forwards(s, BOTH, ("17s",), compile=True)),
    Part("DiT, one forward, 68 s", 180, lambda s: time_forwards(s, ("dit",), ("68s",), rounds=1, warm_up=False)),
    Part("ablation, Mamba1", 120, lambda s: time_ablation(s, ["Mamba1"])),
)  # fmt: skip


def environment(scale: Scale) -> Finding:
    """What it all ran on."""
    import triton

    device = find_device(scale.device)
    facts: Finding = {"device": name_of(device), "python": platform.python_version(), "torch": torch.__version__}
    facts |= {"triton": triton.__version__, "cuda": torch.version.cuda, "size": scale.size, "dtype": scale.dtype}
    if device.type == "cuda":
        facts |= {"memory_bytes": torch.cuda.get_device_properties(device).total_memory}
        facts |= {"capability": ".".join(map(str, torch.cuda.get_device_capability(device)))}
    return facts | {"kernels": choose_forms({}, device, DTYPES[scale.dtype])}


def main() -> None:
    """Run one part."""
    name, path, how = sys.argv[1:]
    scale = small() if how == "small" else full()
    part = next(part for part in PARTS if part.name == name)
    with Path(path).open("w", encoding="utf-8") as file:
        for finding in itertools.chain([{"environment": environment(scale)}], part.run(scale)):
            print(json.dumps(finding), file=file, flush=True)


if __name__ == "__main__":
    main()
