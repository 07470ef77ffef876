"""Compare ways to sample, on the same prompts and seeds.

    python scripts/evaluate.py checkpoint=DIR prompts=FILE|synthetic seeds=N out=DIR \\
        variants="[{name: uncached}, {name: fast, cache: adacache_fast}, {name: many, steps: 200}]" [reference=many]
    python scripts/evaluate.py runs=[DIR,DIR,...] out=DIR [labels=[A,B]]

The first samples every variant into out/runs/NAME and goes on where it was interrupted; the second compares folders
that the first has written. Both write out/index.html, quality.png, evaluate.json, evaluate.csv and evaluate.md, and
print the overview. Further keys: baseline=NAME (default: the first), reference=NAME, lpips=FILE, shown=N, side=PIXELS,
vbench={command: ..., dimensions: [...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lingen.cache_config import read_cache
from lingen.compose import parse
from lingen.errors import run_main
from lingen.evaluation import page, plot, tables
from lingen.evaluation.folder import read_runs
from lingen.evaluation.metrics import Lpips
from lingen.evaluation.result import Result, as_json, measure
from lingen.evaluation.settings import EvaluateWords
from lingen.evaluation.vbench import check, file_names, score_run
from lingen.files import write_file
from lingen.output import make_folder, writing


def main(given: list[str]) -> None:
    """Sample, measure, write.

    Raises:
        UserError: the words, the checkpoint or the runs cannot be used, or the output cannot be written.
    """
    words = parse(EvaluateWords, given)
    lpips = Lpips(words.lpips) if words.lpips is not None else None
    if words.vbench is not None:
        check(words.vbench)
    result = compare(sampled(words) if words.runs is None else words.runs, words, lpips)
    figure = plot.quality_against_flops(result)
    files = {
        "quality.png": figure,
        "index.html": page.render(result, figure, shown=words.shown, side=words.side, words=given),
        "evaluate.json": json.dumps(as_json(result), indent=1, allow_nan=False).encode() + b"\n",
        "evaluate.csv": tables.as_csv(result).encode(),
        "evaluate.md": markdown(result).encode(),
    }
    with writing(words.out):
        for name, content in files.items():
            write_file(Path(words.out) / name, content)
    for table in tables.overview(result):
        print(table.as_text(), end="\n\n")
    for text in result.warnings:
        print(f"warning: {text}")
    for name in files:
        print(Path(words.out) / name)


def sampled(words: EvaluateWords) -> list[str]:
    """Sample the variants; returns their folders."""
    for variant in words.variants:
        if variant.cache is not None:
            read_cache(variant.cache)  # a wrong name is said before the weights are read
    from lingen.engine import choose_forms
    from lingen.evaluation.generate import sample_runs
    from lingen.pipeline import LinGenPipeline

    pipeline = LinGenPipeline.from_pretrained(
        words.checkpoint or "",
        device=words.device,
        dtype=words.dtype,
        autoencoder=words.autoencoder,
        encoders=words.encoders,
        tile=words.tile.model_dump() if words.tile else None,
    )
    choose_forms(words.kernels.model_dump(), pipeline.device, pipeline.dtype)
    shape = pipeline.shape(words.frames, words.height, words.width)
    asked, runs = words.asked(shape.frames), Path(words.out) / "runs"
    make_folder(runs, words.out)
    folders = sample_runs(pipeline, words.variants, asked, shape, runs, batch=words.batch, truncate=words.truncate)
    return [str(folder) for folder in folders]


def compare(folders: list[str], words: EvaluateWords, lpips: Lpips | None) -> Result:
    """Read the runs, refuse what cannot be compared, and measure."""
    runs, out = read_runs(folders, words.labels), Path(words.out)
    make_folder(out, words.out)
    scores = None
    if words.vbench is not None:
        for run in runs:
            file_names(run)
        scores = {run.name: score_run(run, words.vbench, out) for run in runs}
    baseline = words.baseline or runs[0].name
    return measure(runs, baseline=baseline, reference=words.reference, lpips=lpips, vbench=scores, device=words.device)


def markdown(result: Result) -> str:
    """All tables, for a README."""
    parts = [*tables.overview(result), *(tables.details(result, key) for key in result.keys)]
    return "\n".join(map(tables.as_markdown, parts))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
