"""The rows of the published ablation, as configurations: what a guided forward of each takes, in the paper's order."""

from __future__ import annotations

import gc
import statistics
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from lingen.bench.device import clock_of, dtype_of, find_device, name_of
from lingen.bench.tables import markdown, named
from lingen.bench.workload import TEXT_LENGTH, Subject, bench_config, grid_of
from lingen.engine import DTYPES, choose_forms


class Row(NamedTuple):
    """What train.py is told, and the seconds of the paper."""

    word: str | None
    published: int | None


# Seconds: 50 guided steps of LinGen-4B, 17 s of 512p, on one H100 (LinGen, ablation table). Hilbert is not in it.
ROWS = {
    "LinGen": Row(None, 102),
    "without TESA": Row("model.mate.te=false", 94),
    "without RMS": Row("model.mate.scan=fixed", 99),
    "without review tokens": Row("model.mate.review_pool=null", 98),
    "without MA-branch": Row("model.mate.ma=false", 65),
    "zigzag scan": Row("model.mate.scan=zigzag", 144),
    "Mamba1": Row("model.mate.ssm=mamba1", 127),
    "Hilbert scan": Row("model.mate.scan=hilbert", None),
}
FULL = "LinGen"


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
    """Rows take turns, so that a slow minute of the machine meets them all."""
    device = find_device(words.device)
    words = words.model_copy(update={"dtype": dtype_of(words.dtype, device)})
    kernels = choose_forms(words.kernels, device, DTYPES[words.dtype])
    print(f"{name_of(device)}, {words.dtype}; kernels: {named(kernels)}")
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    facts: dict[str, dict[str, Any]] = {}
    for _ in range(words.rounds):
        for name in ROWS:
            took, facts[name] = time_row(words, name, device)
            seconds[name].append(took)
    rows = [finish(name, seconds[name], seconds[FULL], facts[name]) for name in ROWS]
    print(table(rows))
    facts_of_all = {"device": name_of(device), "torch": torch.__version__, "kernels": kernels}
    return {"bench": "ablation", **words.model_dump(), **facts_of_all, "rows": rows}


def time_row(words: AblationWords, name: str, device: torch.device) -> tuple[float, dict[str, Any]]:
    """(seconds of a guided forward, what the model is). The model is made for it, run once, timed, and gone."""
    settings = [f"engine.dtype={words.dtype}", f"{TEXT_LENGTH}={words.text_tokens}"]
    if words.blocks is not None:
        settings.append(f"size.depth.lingen={words.blocks}")
    if (word := ROWS[name].word) is not None:
        settings.append(word)
    subject = Subject(bench_config("lingen", words.size, *settings), device, train=False)
    grid = grid_of(words.tokens, words.frame)
    call = subject.call(grid)
    call()
    seconds = clock_of(device)(call)
    facts = {
        "params": sum(p.numel() for p in subject.model.parameters()),
        "flops": subject.flops(grid, samples=2),
        "layers": len(subject.model.blocks),
        "layers_of_size": subject.layers_of_size,
        "grid": grid,
    }
    del subject, call
    gc.collect()
    return seconds, facts


def finish(name: str, seconds: list[float], full: list[float], facts: dict[str, Any]) -> dict[str, Any]:
    """A row of the result; ``full`` are the seconds of the whole model, round by round."""
    published = ROWS[name].published
    whole = ROWS[FULL].published
    return {
        "row": name,
        "word": ROWS[name].word,
        **facts,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "relative": statistics.median(here / there for here, there in zip(seconds, full, strict=True)),
        "published_s": published,
        "published_relative": published / whole if published and whole else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For a terminal or a page."""
    headers = (
        "row",
        "parameters",
        "layers",
        "TFLOPs",
        "median s",
        "min s",
        "max s",
        "to LinGen",
        "paper: s",
        "to LinGen",
    )
    lines = [
        (
            row["row"],
            f"{row['params'] / 1e6:,.1f}M",
            row["layers"],
            f"{row['flops'] / 1e12:.4g}",
            *(f"{row[key]:.4g}" for key in ("median_s", "min_s", "max_s")),
            f"{row['relative']:.2f}",
            row["published_s"] or "",
            f"{row['published_relative']:.2f}" if row["published_relative"] else "",
        )
        for row in rows
    ]
    note = "paper: 50 guided steps of LinGen-4B, 17 s of 512p, on one H100, as published; all else: one, measured here"
    return f"{markdown(headers, lines)}\n\n{note}"
