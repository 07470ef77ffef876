"""The whole demo, from nothing: wall time and peak memory."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

from lingen.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"
POLL_S = 0.5


class DemoWords(BaseModel):
    """``words`` go to the demo, as one text: words="clips=40 images=40"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: str = ""


def run(words: DemoWords) -> dict[str, Any]:
    """Wall seconds of the demo in an empty folder, and the most memory that its processes held together.

    Memory is proportional (PSS on Linux), so that what processes share counts once.
    """
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        began = time.perf_counter()
        process = psutil.Popen([sys.executable, str(SCRIPT), f"out={folder}/demo", *shlex.split(words.words)])
        peak = 0
        while process.poll() is None:
            peak = max(peak, _held(process))
            time.sleep(POLL_S)
        seconds = time.perf_counter() - began
    if process.returncode:
        raise UserError(f"the demo ended with code {process.returncode}; its last lines above say why")
    return {"bench": "demo", "cores": psutil.cpu_count(), "seconds": round(seconds, 1), "peak_bytes": peak}


def _held(process: psutil.Process) -> int:
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            memory = each.memory_full_info()
        except psutil.Error:  # it ended while we looked
            continue
        total += getattr(memory, "pss", memory.rss)
    return total
