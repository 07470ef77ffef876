"""How long a guided denoising forward or a training step takes, what share of the device it uses, and what memory.

A grid of so many tokens has frames of 32x56 tokens (512x896 pixels), or the largest smaller ones that divide the count
and leave at least four latent frames; ``frame=[H,W]`` says otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from lingen.bench.device import (
    Meter,
    clock_of,
    dtype_of,
    find_device,
    fitting,
    meter_of,
    name_of,
    peak_flops,
)
from lingen.bench.plot import plot_costs
from lingen.bench.tables import gb, markdown, named
from lingen.bench.timing import Case, interleave
from lingen.bench.workload import TEXT_LENGTH, Subject, bench_config, grid_of
from lingen.engine import DTYPES, choose_forms
from lingen.output import make_folder

Row = dict[str, Any]


class LatencyWords(BaseModel):
    """``blocks`` builds models of so many layers, and reports those, not whole ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = "tiny"
    tokens: list[PositiveInt] = Field([1024, 4096, 16384], min_length=1)
    frame: tuple[PositiveInt, PositiveInt] | None = None  # (H, W) in tokens
    mode: Literal["forward", "train"] = "forward"
    guidance: bool = True  # a forward takes two samples, with and without the text; a training step takes one
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 on a GPU, fp32 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool | Literal["auto", "both"] = "auto"  # torch.compile of the blocks: both on a GPU, off on a CPU
    models: list[Literal["lingen", "dit"]] = Field(["lingen", "dit"], min_length=1)
    blocks: PositiveInt | None = None
    activation_checkpointing: bool = False
    text_tokens: PositiveInt = 512
    kernels: dict[str, str] = {}  # the form of a kernel, as train.py's kernels.KERNEL=FORM
    rounds: PositiveInt = 5
    warm_up: bool = True  # on a GPU, a call that nothing measures goes ahead: it compiles and tunes
    plot: str | None = None  # a PNG of cost against tokens

    @model_validator(mode="after")
    def _grids_exist(self) -> LatencyWords:
        for count in self.tokens:
            grid_of(count, self.frame)
        return self


def run(words: LatencyWords) -> list[Row]:
    """A row for each model and token count, and for compiled or not."""
    if words.plot is not None:
        make_folder(Path(words.plot).parent, words.plot, "plot")
    device = find_device(words.device)
    dtype = dtype_of(words.dtype, device)
    kernels = choose_forms(words.kernels, device, DTYPES[dtype])
    peak, peak_from = peak_flops(device, DTYPES[dtype])
    print(f"{name_of(device)}, {dtype}, peak {peak / 1e12:.4g} TFLOP/s ({peak_from}); kernels: {named(kernels)}")
    common: Row = {"size": words.size, "mode": words.mode, "dtype": dtype, "device": name_of(device)}
    common |= {"peak_flops_per_s": round(peak), "peak_from": peak_from, "torch": torch.__version__, "kernels": kernels}
    calls: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    meter = meter_of(device)
    for name in dict.fromkeys(words.models):
        with fitting(f"size={words.size}", device):
            subject, resident, _ = meter.run(lambda name=name: _subject(words, name, dtype, device))  # type: ignore[misc]
        for row, call in _cases(words, subject, device, meter, resident):
            key = f"{name} {row['tokens']} tokens{', compiled' if row['compiled'] else ''}"
            rows[key], calls[key] = {"model": name, **row, **common}, call
    seconds = interleave(
        {key: Case(call) for key, call in calls.items()}, words.rounds, clock_of(device), warm_up=False
    )
    result = [_timed(row, seconds[key], peak) for key, row in rows.items()]
    print(table(result))
    if words.plot is not None:
        plot_costs(result, Path(words.plot))
    return result


def _subject(words: LatencyWords, name: str, dtype: str, device: torch.device) -> Subject:
    depth = () if words.blocks is None else (f"size.depth.{name}={words.blocks}",)
    settings = (f"engine.dtype={dtype}", f"engine.activation_checkpointing={words.activation_checkpointing}")
    config = bench_config(name, words.size, *settings, f"{TEXT_LENGTH}={words.text_tokens}", *depth)
    return Subject(config, device, train=words.mode == "train")


def _cases(
    words: LatencyWords, subject: Subject, device: torch.device, meter: Meter, resident: int
) -> list[tuple[Row, Callable[[], object]]]:
    """Every case of a model, run once or twice: its memory is measured, and nothing is left to compile."""
    samples = 2 if words.guidance and words.mode == "forward" else 1
    compiled = {"auto": (False, True) if device.type == "cuda" else (False,), "both": (False, True)}
    choices = compiled[words.compile] if isinstance(words.compile, str) else (words.compile,)
    cases = []
    for tokens in dict.fromkeys(words.tokens):
        grid = grid_of(tokens, words.frame)
        for choice in choices:
            with fitting(f"tokens={tokens}", device):
                call = subject.call(grid, guidance=words.guidance, compiled=choice)
                if words.warm_up and device.type == "cuda":
                    call()
                _, _, more = meter.run(call)
            row = {"tokens": tokens, "grid": grid, "samples": samples, "compiled": choice}
            row |= {"layers": len(subject.model.blocks), "layers_of_size": subject.layers_of_size}
            row |= {"flops": subject.flops(grid, samples=samples), "peak_bytes": resident + more}
            cases.append((row, call))
    return cases


def _timed(row: Row, seconds: list[float], peak: float) -> Row:
    """``tokens_per_s`` counts a video's tokens once; ``flops`` are all, also those of guidance's second sample."""
    median = statistics.median(seconds)
    return row | {
        "median_s": median,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "rounds": len(seconds),
        "tokens_per_s": row["tokens"] / median,
        "flops_per_s": row["flops"] / median,
        "mfu": row["flops"] / median / peak,
    }


def table(rows: list[Row]) -> str:
    """For a terminal or a page."""
    headers = (
        "model",
        "mode",
        "tokens",
        "grid",
        "samples",
        "layers",
        "compiled",
        "median s",
        "min s",
        "max s",
        "tokens/s",
    )
    lines = [
        (
            row["model"],
            row["mode"],
            f"{row['tokens']:,}",
            "x".join(map(str, row["grid"])),
            row["samples"],
            row["layers"] if row["layers"] == row["layers_of_size"] else f"{row['layers']} of {row['layers_of_size']}",
            "yes" if row["compiled"] else "no",
            *(f"{row[key]:.4g}" for key in ("median_s", "min_s", "max_s", "tokens_per_s")),
            f"{row['flops_per_s'] / 1e12:.4g}",
            f"{row['mfu']:.1%}",
            gb(row["peak_bytes"]),
        )
        for row in rows
    ]
    return markdown((*headers, "TFLOP/s", "MFU", "peak GB"), lines)
