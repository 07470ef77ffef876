"""How long imports take, each in a fresh process."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from lingen.errors import UserError

TIMED_IMPORT = """
import importlib, sys, time
start = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - start)
"""


class ImportWords(BaseModel):
    """``lingen.loop`` is the training loop with all that it imports, torch first of all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    modules: Annotated[list[str], Field(min_length=1)] = ["lingen", "lingen.loop"]
    rounds: PositiveInt = 3


def run(words: ImportWords) -> dict[str, Any]:
    """Wall seconds of each import: the first, when files may not be in the page cache yet, and the median."""
    result: dict[str, Any] = {"bench": "import", "clock": "wall, fresh process", **words.model_dump(), "seconds": {}}
    for module in words.modules:
        seconds = [_import_seconds(module) for _ in range(words.rounds)]
        result["seconds"][module] = round(statistics.median(seconds), 3)
        print(f"{module:16} first {seconds[0]:.2f} s, median {statistics.median(seconds):.2f} s")
    return result


def _import_seconds(module: str) -> float:
    done = subprocess.run([sys.executable, "-c", TIMED_IMPORT, module], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"modules={module} cannot be imported: {reason}")
    return float(done.stdout.splitlines()[-1])
