"""The memory of training, predicted for every published stage; and, where a step fits, measured beside it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from lingen.bench.device import find_device, meter_of, name_of
from lingen.bench.tables import gb, markdown, named
from lingen.bench.workload import Subject, bench_config, grid_of, ladder, largest_bucket
from lingen.config import Config, EngineConfig, token_grid
from lingen.engine import DTYPES, choose_forms
from lingen.kernels.index import Grid
from lingen.memory import Probe, lay_out, planned_forms, probe

Level = Literal[0, 1, 2, 3]


class MemoryWords(BaseModel):
    """A table of predictions; or with ``measure=true`` one training step, predicted and measured on this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = "4b"
    models: list[Literal["lingen", "dit"]] = Field(["lingen", "dit"], min_length=1)
    world: list[PositiveInt] = Field([1, 8, 64], min_length=1)  # ranks
    levels: list[Level] = Field([0, 1, 2, 3], min_length=1)  # of ZeRO
    sequence_parallel: list[PositiveInt] = Field([1, 8], min_length=1)  # ranks that compute a sample together
    activation_checkpointing: bool = True
    batch: PositiveInt = 1  # samples of a micro-batch
    device_gb: PositiveFloat = 80.0  # of 1e9 bytes
    measure: bool = False
    tokens: list[PositiveInt] = Field([1024, 4096], min_length=1)  # of what is measured
    frame: tuple[PositiveInt, PositiveInt] | None = None  # likewise, as in latency
    dtype: Literal["fp32", "bf16"] = "bf16"  # likewise
    device: Literal["auto", "cpu", "cuda"] = "auto"  # likewise
    blocks: PositiveInt | None = None  # likewise; None: all
    kernels: dict[str, str] = {}  # likewise

    @model_validator(mode="after")
    def _grids_and_groups_exist(self) -> MemoryWords:
        for count in self.tokens:
            grid_of(count, self.frame)
        if all(world % together for world, together in product(self.world, self.sequence_parallel)):
            raise ValueError(f"world={self.world} has no multiple of sequence_parallel={self.sequence_parallel}")
        return self


def run(words: MemoryWords) -> dict[str, Any]:
    """Predictions for the largest bucket of each published stage, or measurements."""
    return measured(words) if words.measure else predicted(words)


def predicted(words: MemoryWords) -> dict[str, Any]:
    """On GPUs, in bf16 under DeepSpeed: what ``engine=zeroN`` does."""
    for model, together in product(words.models, words.sequence_parallel):
        _config(words, model, f"engine.sequence_parallel={together}")  # which refuses what does not divide the heads
    rows = []
    kernels: dict[str, str] = {}
    for stage in ladder(words.size):
        bucket = largest_bucket(stage)
        for model in words.models:
            config = _config(words, model, "engine=zero2")
            grid = token_grid(config, bucket.frames, bucket.height, bucket.width)
            kernels = planned_forms(config, "cuda")
            facts = {"stage": stage.name, "bucket": str(bucket), "model": model, "tokens": prod(grid)}
            found = probe(config, grid, batch=words.batch, kernels=kernels)
            rows += [facts | row for row in _layouts(words, config.engine, found)]
    print(f"one of N ranks in bf16 under DeepSpeed, {words.batch} samples at a time; kernels: {named(kernels)}")
    _print_predicted(words, rows)
    return {"bench": "memory", **words.model_dump(), "torch": torch.__version__, "kernels": kernels, "rows": rows}


def _layouts(words: MemoryWords, engine: EngineConfig, found: Probe) -> Iterator[dict[str, Any]]:
    """Over ranks, over those of them that share a sample, and over levels.

    ``activations`` are those of the fullest moment, which may come when some of ``all_activations`` have gone.
    """
    for world, together in product(words.world, words.sequence_parallel):
        if world % together:
            continue
        for level in words.levels:
            choice = {"zero_stage": level, "sequence_parallel": together}
            memory = lay_out(engine.model_copy(update=choice), found, world)
            facts = {"all_activations": found.activations // together, "fits": memory.total <= words.device_gb * 1e9}
            yield {"world": world, **choice, **memory.as_dict(), **facts}


def measured(words: MemoryWords) -> dict[str, Any]:
    """Training steps of plain torch, one sample each."""
    device = find_device(words.device)
    kernels = choose_forms(words.kernels, device, DTYPES[words.dtype])
    rows: list[dict[str, Any]] = []
    for model, tokens in product(words.models, words.tokens):
        depth = () if words.blocks is None else (f"size.depth.{model}={words.blocks}",)
        config = _config(words, model, f"engine.dtype={words.dtype}", *depth)
        grid = grid_of(tokens, words.frame)
        memory = lay_out(config.engine, probe(config, grid, batch=1, kernels=kernels), 1)
        predicted = memory.step - memory.average  # a step keeps no average
        found = measure_step(config, grid, device)
        rows.append(
            {"model": model, "tokens": tokens, "grid": grid, "layers": config.depth, "predicted": predicted}
            | {
                "activation_checkpointing": words.activation_checkpointing,
                "measured": found,
                "ratio": round(predicted / found, 3),
                **memory.as_dict(),
            }
        )
    print(f"{name_of(device)}, {words.dtype}, plain torch, one sample; kernels: {named(kernels)}")
    print(measured_table(rows))
    return {
        "bench": "memory",
        **words.model_dump(),
        "device": name_of(device),
        "torch": torch.__version__,
        "rows": rows,
    }


def measured_table(rows: list[dict[str, Any]]) -> str:
    """For a terminal or a page."""
    headers = ("model", "tokens", "layers", "checkpointing", "predicted GB", "measured GB", "ratio")
    keys = ("model", "tokens", "layers", "activation_checkpointing")
    return markdown(headers, [(*(r[k] for k in keys), gb(r["predicted"]), gb(r["measured"]), r["ratio"]) for r in rows])


def measure_step(config: Config, grid: Grid, device: torch.device) -> int:
    """The most bytes that a training step of plain torch holds at once, the model and its engine included."""
    meter = meter_of(device)
    subject, resident, _ = meter.run(lambda: Subject(config, device, train=True))
    _, _, more = meter.run(subject.call(grid))
    return resident + more


def _config(words: MemoryWords, model: str, *more: str) -> Config:
    return bench_config(model, words.size, *more, f"engine.activation_checkpointing={words.activation_checkpointing}")


def _print_predicted(words: MemoryWords, rows: list[dict[str, Any]]) -> None:
    """A line for a stage, a model and a number of ranks; its levels side by side, those that do not fit in brackets."""
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        key = (row["stage"], row["model"], f"{row['tokens']:,}", row["world"], row["sequence_parallel"])
        cells = lines.setdefault(key, [gb(row["all_activations"])])
        cells.append(gb(row["total"]) if row["fits"] else f"({gb(row['total'])})")
    headers = ("stage", "model", "tokens", "ranks", "a sample", "activations", *(f"ZeRO-{n}" for n in words.levels))
    print(markdown(headers, [(*key, *cells) for key, cells in lines.items()]))
    print(f"GB of 1e9 bytes a rank; in brackets what passes {words.device_gb:g} GB; 'a sample': ranks that share one")
