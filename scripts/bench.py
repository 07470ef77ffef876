"""Measure: ``python scripts/bench.py NAME key=value ...``; the last line on stdout is JSON.

flops     forward and training FLOPs of both models on each published stage, and their ratios
latency   a guided denoising forward, or mode=train a training step, of both models: time, FLOP/s, MFU, peak memory
ablation  a guided forward of each row of the published ablation
block     a whole LinGen block's CPU time per token, forward and backward, from 4k to 64k tokens
memory    predicted memory of training on each published stage; measure=true: of one step, beside what it takes
scan      the scan's CPU time per token at 1k to 64k tokens, against full attention of the same width, and against the
          torch scans of mamba-ssm and transformers
import    the wall time of ``import lingen`` and of importing the training loop
loop      what keeping a run alive costs: the loop's own work a step, a resume, an index, checkpoints beside training
cache     a guided generation with a cache beside one without: executed FLOPs, time, PSNR, and what deciding costs
data      the loader's frames/s against a bare decoding loop, its bytes/s of latents against reading tar files, and the
          growth of a worker's memory
demo      the wall time and the peak memory of ``make demo``, without installation
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from lingen.bench import ablation, block, cache, data, demo, flops, imports, latency, loop, memory, scan
from lingen.compose import HELP, parse
from lingen.errors import UserError, nearest, run_main

BENCHES: dict[str, tuple[type[BaseModel], Callable[[Any], object]]] = {
    "flops": (flops.FlopWords, flops.run),
    "latency": (latency.LatencyWords, latency.run),
    "ablation": (ablation.AblationWords, ablation.run),
    "block": (block.BlockWords, block.run),
    "memory": (memory.MemoryWords, memory.run),
    "scan": (scan.ScanWords, scan.run),
    "import": (imports.ImportWords, imports.run),
    "loop": (loop.LoopWords, loop.run),
    "cache": (cache.CacheWords, cache.run),
    "data": (data.DataWords, data.run),
    "demo": (demo.DemoWords, demo.run),
}


def main() -> None:
    """Parse, measure, print."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in HELP:
        print(__doc__)
        return
    if name not in BENCHES:
        raise UserError(f"'{name}' is no benchmark{nearest(name, BENCHES)}; python scripts/bench.py NAME key=value ...")
    schema, run = BENCHES[name]
    print(json.dumps(run(parse(schema, words))))


if __name__ == "__main__":
    run_main(main)
