"""The rows of the published ablation, as configurations: what a guided forward of each takes, in the paper's order."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from lingen.bench.device import choose_forms, clock_of, dtype_of, find_device, name_of
from lingen.bench.tables import markdown, named
from lingen.bench.workload import Subject, bench_config, grid_of
from lingen.engine import DTYPES

# Row, what it sets, and the seconds of the paper: 50 guided steps of LinGen-4B, 17 s of 512p, on one H100 (LinGen,
# ablation table). The Hilbert scan is not in it.
ROWS: tuple[tuple[str, str | None, int | None], ...] = (
    ("LinGen", None, 102),
    ("without TESA", "model.mate.te=false", 94),
    ("without RMS", "model.mate.scan=fixed", 99),
    ("without review tokens", "model.mate.review_pool=null", 98),
    ("without MA-branch", "model.mate.ma=false", 65),
    ("zigzag scan", "model.mate.scan=zigzag", 144),
    ("Mamba1", "model.mate.ssm=mamba1", 127),
    ("Hilbert scan", "model.mate.scan=hilbert", None),
)


class AblationWords(BaseModel):
    """As in ``latency``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = "tiny"
    tokens: PositiveInt = 4096
    frame: tuple[PositiveInt, PositiveInt] | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    blocks: PositiveInt | None = None
    text_tokens: PositiveInt = 512
    kernels: dict[str, str] = {}
    rounds: PositiveInt = 3

    @model_validator(mode="after")
    def _grid_exists(self) -> AblationWords:
        grid_of(self.tokens, self.frame)
        return self


def run(words: AblationWords) -> dict[str, Any]:
    """Rows take turns, and only one model is in memory at a time: each is made anew, and run once before the clock."""
    device = find_device(words.device)
    words = words.model_copy(update={"dtype": dtype_of(words.dtype, device)})
    kernels = choose_forms(words.kernels, device, DTYPES[words.dtype])
    print(f"{name_of(device)}, {words.dtype}; kernels: {named(kernels)}")
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in ROWS}
    facts: dict[str, dict[str, Any]] = {}
    clock = clock_of(device)
    for _ in range(words.rounds):
        for name, subject in _subjects(words, device):
            grid = grid_of(words.tokens, words.frame)
            call = subject.call(grid)
            call()
            seconds[name].append(clock(call))
            facts[name] = {
                "params": sum(p.numel() for p in subject.model.parameters()),
                "flops": subject.flops(grid, samples=2),
                "layers": len(subject.model.blocks),
                "layers_of_size": subject.layers_of_size,
            }
    result = {
        "bench": "ablation",
        **words.model_dump(),
        "device": name_of(device),
        "torch": torch.__version__,
        "kernels": kernels,
        "grid": grid_of(words.tokens, words.frame),
        "rows": [_row(name, word, paper, seconds, facts[name]) for name, word, paper in ROWS],
    }
    _print(result["rows"])
    return result


def _subjects(words: AblationWords, device: torch.device) -> Iterator[tuple[str, Subject]]:
    settings = [f"engine.dtype={words.dtype}", f"text.length={words.text_tokens}"]
    if words.blocks is not None:
        settings.append(f"size.depth.lingen={words.blocks}")
    for name, word, _ in ROWS:
        config = bench_config("lingen", words.size, *settings, *([] if word is None else [word]))
        yield name, Subject(config, device, train=False)
        gc.collect()  # before the next one is made


def _row(
    name: str, word: str | None, paper: int | None, seconds: dict[str, list[float]], facts: dict[str, Any]
) -> dict[str, Any]:
    relative = [here / full for here, full in zip(seconds[name], seconds["LinGen"], strict=True)]
    return {
        "row": name,
        "word": word,
        **facts,
        "median_s": statistics.median(seconds[name]),
        "min_s": min(seconds[name]),
        "max_s": max(seconds[name]),
        "relative": statistics.median(relative),
        "published_s": paper,
        "published_relative": None if paper is None else paper / 102,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    headers = ("row", "parameters", "TFLOPs", "median s", "min s", "max s", "to LinGen", "paper: s", "paper: to LinGen")
    table = [
        (
            row["row"],
            f"{row['params'] / 1e6:,.1f}M",
            f"{row['flops'] / 1e12:.4g}",
            *(f"{row[key]:.4g}" for key in ("median_s", "min_s", "max_s")),
            f"{row['relative']:.2f}",
            row["published_s"] or "",
            f"{row['published_relative']:.2f}" if row["published_relative"] else "",
        )
        for row in rows
    ]
    print(markdown(headers, table))
    print("paper: 50 guided steps of LinGen-4B, 17 s of 512p, on one H100, as published; all else measured here")
