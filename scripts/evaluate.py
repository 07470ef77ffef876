"""Compare runs of the same prompts and seeds: python scripts/evaluate.py runs=[DIR,DIR,...] out=DIR

Writes out/index.html, quality.png, evaluate.json, evaluate.csv and evaluate.md, and prints the overview. Further keys:
labels=[A,B], baseline=NAME, reference=NAME, lpips=FILE, vbench={command: ..., dimensions: [...]}, shown=N, side=PIXELS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lingen.compose import parse
from lingen.errors import run_main
from lingen.evaluation import page, plot, tables
from lingen.evaluation.folder import SampledRun, read_runs
from lingen.evaluation.metrics import Lpips
from lingen.evaluation.result import Result, as_json, measure
from lingen.evaluation.settings import EvaluateWords
from lingen.evaluation.vbench import check, file_names, score_run
from lingen.files import write_file
from lingen.output import make_folder, writing


def main(given: list[str]) -> None:
    """Measure and write.

    Raises:
        UserError: the words or the runs cannot be used, or the output cannot be written.
    """
    words = parse(EvaluateWords, given)
    result = compare(read_runs(words.runs or [], words.labels), words)
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


def compare(runs: list[SampledRun], words: EvaluateWords) -> Result:
    """Measure the runs; what cannot be had is said before the first video is read."""
    lpips = Lpips(words.lpips) if words.lpips is not None else None
    out = Path(words.out)
    if words.vbench is not None:
        check(words.vbench)
        for run in runs:
            file_names(run)
    make_folder(out, words.out)
    scores = {run.name: score_run(run, words.vbench, out) for run in runs} if words.vbench is not None else None
    baseline = words.baseline or runs[0].name
    return measure(runs, baseline=baseline, reference=words.reference, lpips=lpips, vbench=scores, device=words.device)


def markdown(result: Result) -> str:
    """All tables, for a README."""
    parts = [*tables.overview(result), *(tables.details(result, key) for key in result.keys)]
    return "\n".join(map(tables.as_markdown, parts))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
