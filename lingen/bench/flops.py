"""Forward and training FLOPs of both models on the published ladder, from the formulas beside each mixer."""

from __future__ import annotations

from math import prod
from typing import Any

from pydantic import BaseModel, ConfigDict

from lingen.bench.tables import markdown
from lingen.bench.workload import bench_config, ladder, largest_bucket
from lingen.config import BucketConfig, StageConfig, token_grid
from lingen.curriculum import TRAIN_FLOPS
from lingen.memory import model_on_meta

PUBLISHED = {"17s": 5, "34s": 8, "68s": 15}  # DiT over LinGen at 512p (LinGen, FLOPs)
PUBLISHED_STAGES = "t2v_512"  # what the names of the stages begin with that train on 512p video


class FlopWords(BaseModel):
    """``lingen`` and ``dit`` are more words of train.py for that model, as in lingen=[size.d_state=128]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = "4b"
    lingen: list[str] = []
    dit: list[str] = []


def run(words: FlopWords) -> dict[str, Any]:
    """A row a stage, for its largest bucket: FLOPs of one sample; then 512p again with square frames."""
    more = {"lingen": words.lingen, "dit": words.dit}
    configs = {name: bench_config(name, words.size, *more[name]) for name in more}
    models = {name: model_on_meta(config) for name, config in configs.items()}

    def row(stage: StageConfig, bucket: BucketConfig) -> dict[str, Any]:
        grid = token_grid(configs["dit"], bucket.frames, bucket.height, bucket.width)
        forward = {name: model.flops(grid, configs[name].text.lengths) for name, model in models.items()}
        return {
            "stage": stage.name,
            "bucket": str(bucket),
            "length": f"{bucket.frames / stage.fps:.0f}s" if bucket.frames > 1 else "image",
            "grid": grid,
            "tokens": prod(grid),
            "forward_flops": forward,
            "train_flops": {name: TRAIN_FLOPS * flops for name, flops in forward.items()},
            "ratio": round(forward["dit"] / forward["lingen"], 3),
        }

    stages = ladder(words.size)
    at_512 = [(stage, largest_bucket(stage)) for stage in stages if stage.name.startswith(PUBLISHED_STAGES)]
    result = {
        "bench": "flops",
        **words.model_dump(),
        "params": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "forward_ratio": {line["length"]: line["ratio"] for line in (row(*pair) for pair in at_512)},
        "published_ratio": PUBLISHED,
        "stages": [row(stage, largest_bucket(stage)) for stage in stages],
        "square": [row(stage, wide.model_copy(update={"width": wide.height})) for stage, wide in at_512],
    }
    _print(result)
    return result


def _print(result: dict[str, Any]) -> None:
    print(", ".join(f"{name} {count:,} parameters" for name, count in result["params"].items()))
    headers = ("stage", "bucket", "tokens", "LinGen fwd", "DiT fwd", "LinGen train", "DiT train", "DiT/LinGen", "paper")
    rows = [
        (
            line["stage"],
            line["bucket"],
            f"{line['tokens']:,}",
            *map(_tera, (*line["forward_flops"].values(), *line["train_flops"].values())),
            f"{line['ratio']:.2f}",
            PUBLISHED.get(line["length"], "") if line["stage"].startswith(PUBLISHED_STAGES) else "",
        )
        for line in (*result["stages"], *result["square"])
    ]
    print("TFLOPs of one sample; training is forward and backward; the last rows have square frames")
    print(markdown(headers, rows))


def _tera(flops: int) -> str:
    return f"{flops / 1e12:,.1f}" if flops >= 1e13 else f"{flops / 1e12:.3g}"
