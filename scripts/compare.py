"""Compare runs: python scripts/compare.py runs=[DIR,DIR,...] out=DIR

Writes out/loss_curves.png, out/report.html and out/compare.json, and prints a summary. Further keys:
labels=[A,B], smoothing=STEPS (logged steps in the window of the training loss), axes=[samples,tokens,flops,hours]
(the first gets the large panels), log=true (logarithmic loss).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from lingen.comparison import plot, report, tables
from lingen.comparison.read import load_runs
from lingen.comparison.result import Result, as_json, measure
from lingen.compose import parse
from lingen.errors import UserError, run_main
from lingen.files import write_file
from lingen.output import make_folder, writing

AxisName = Literal["samples", "tokens", "flops", "hours"]


class CompareArgs(BaseModel):
    """The words of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: Annotated[list[str], Field(min_length=1)]
    out: str
    labels: list[str] | None = None  # default: the models' names, or the folders' where those repeat
    smoothing: PositiveInt | None = None  # logged steps; default: 2% of the longest stage, at least 15
    axes: Annotated[list[AxisName], Field(min_length=1)] = ["samples", "tokens", "flops", "hours"]
    log: bool = False


def main() -> None:
    args = parse(CompareArgs, sys.argv[1:])
    if len(set(args.axes)) < len(args.axes):
        raise UserError(f"axes=[{','.join(args.axes)}] names an axis twice")
    runs, out = load_runs(args.runs, args.labels), Path(args.out)
    make_folder(out, args.out)
    result = measure(runs, args.smoothing)
    axes = [str(axis) for axis in args.axes]
    figure = plot.loss_curves(result, axes, log=args.log)
    files = {
        "loss_curves.png": figure,
        "report.html": report.render(result, axes, figure, log=args.log).encode(),
        "compare.json": json.dumps(as_json(result), indent=1, allow_nan=False).encode() + b"\n",
    }
    write_all(out, files)
    print_summary(result)
    for name in files:
        print(out / name)


def write_all(out: Path, files: dict[str, bytes]) -> None:
    """Each file is either the old one or the whole new one."""
    with writing(out):
        for name, content in files.items():
            write_file(out / name, content)


def print_summary(result: Result) -> None:
    """How each run took each transfer, where each stage ended, and what to beware of."""
    print(tables.summary_table(result).as_text(), end="\n\n")
    for text in tables.leads(result):
        print(text)
    for text in result.warnings:
        print(f"warning: {text}")


if __name__ == "__main__":
    run_main(main)
