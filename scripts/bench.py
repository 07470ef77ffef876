"""Measure: ``python scripts/bench.py NAME key=value ...``; the last line on stdout is JSON.

scan    the scan's CPU time per token at 1k to 64k tokens, against full attention of the same width, and against the
        torch scans of mamba-ssm and transformers
import  the wall time of ``import lingen`` and of importing the training loop
demo    the wall time and the peak memory of ``make demo``, without installation
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from lingen.bench import demo, imports, scan
from lingen.compose import parse
from lingen.errors import UserError, nearest, run_main

BENCHES: dict[str, tuple[type[BaseModel], Callable[[Any], dict[str, Any]]]] = {
    "scan": (scan.ScanWords, scan.run),
    "import": (imports.ImportWords, imports.run),
    "demo": (demo.DemoWords, demo.run),
}


def main() -> None:
    """Parse, measure, print."""
    name, *words = sys.argv[1:] or [""]
    if name not in BENCHES:
        raise UserError(f"'{name}' is no benchmark{nearest(name, BENCHES)}; python scripts/bench.py NAME key=value ...")
    schema, run = BENCHES[name]
    print(json.dumps(run(parse(schema, words))))


if __name__ == "__main__":
    run_main(main)
