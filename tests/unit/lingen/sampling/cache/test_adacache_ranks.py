"""Two ranks that share the samples decide as one, by sums that are those of a rank alone.

This file is also the program that the ranks run (see ``work``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lingen.dist import init
from lingen.models.parallel import ALONE, SequenceGroup, parallelise
from lingen.sampling.cache.distance import change_sums, motion_sums
from lingen.sampling.cache.layout import Layout
from tests.unit.lingen.sampling.cache.test_adacache import BOOK, MODELS, MOTION, Generation, layout, model_of

ROOT = Path(__file__).resolve().parents[5]
GRIDS = [(5, 3, 4), (3, 5, 7), (2, 1, 3), (1, 1, 3), (1, 1, 5), (7, 1, 1)]


def work(out: Path) -> None:
    """In each of the ranks: sums of random residuals, and generations, beside what a rank alone has."""
    torch.set_num_threads(1)
    dist = init("cpu", 2)
    group = SequenceGroup(dist.sequence_group, dist.sequence_rank, dist.sequence)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for grid in GRIDS:
        old, new = torch.randn(2, 2, grid[0] * grid[1] * grid[2], 6, generator=generator)
        my_old, my_new = (group.slice_of(x + 1.0) - 1.0 for x in (old, new))  # what pads them is not zero
        shared = Layout(2, 2, grid, group)
        pairs = [
            (motion_sums(old, (1, 2, 3), layout(grid, 2)), motion_sums(my_old, (1, 2, 3), shared)),
            (change_sums(old, new, layout(grid, 2)), change_sums(my_old, my_new, shared)),
        ]
        for expected, found in pairs:
            worst = max(worst, float((shared.totals(found) - expected).abs().max()))
    results: dict[str, Any] = {"worst": worst}
    for name in MODELS:
        for mode in ("fixed", "reference") if name == "dit" else ("fixed",):
            config = {"mode": mode, **BOOK, "moreg": MOTION}
            parallelise(model_of(name), ALONE)
            alone = Generation(model_of(name), config, [1, 2, 3]).schedules
            parallelise(model_of(name), group)
            results[f"{name} {mode}"] = [alone, *dist.gather(Generation(model_of(name), config, [1, 2, 3]).schedules)]
    if dist.rank == 0:
        out.write_text(json.dumps(results))
    dist.close()


def test_two_ranks_decide_as_one(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID")}
    done = subprocess.run(
        [sys.executable, *launcher, __file__, str(tmp_path / "results.json")],
        env=environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.pop("worst") < 1e-4
    for alone, first, second in results.values():
        assert alone == first == second
        assert not all(map(all, alone["pair"]))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
