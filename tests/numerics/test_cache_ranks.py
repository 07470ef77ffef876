"""Ranks that compute each sample together decide as one, and as one rank alone decides.

This file is also the program that runs in those processes (see ``work``).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.dist import Dist, init
from lingen.models.parallel import SequenceGroup, parallelise
from lingen.sampling.cache import CacheRun
from lingen.sampling.cache.magcache import MeasureNorms
from tests.caches import PAIR, STEPS, generate, model, schedules, start

LATENTS = (4, 3, 2, 6)  # 9 tokens: the second rank's slice ends in padding
SEEDS = [0, 3, 1]
POLICIES: dict[str, dict[str, Any]] = {
    "teacache": {"policy": "teacache", "threshold": 0.15},
    "first_block": {"policy": "first_block", "threshold": 0.2},
    "pab": {"policy": "pab"},
}


def results(ranks: SequenceGroup | None) -> dict[str, Any]:
    """What one process finds: of each model and policy the schedules and the latents, and MagCache's ratios."""
    found: dict[str, Any] = {}
    for name in ("dit", "lingen"):
        made = copy.deepcopy(model(name))
        if ranks is not None:
            parallelise(made, ranks)
        for policy, config in POLICIES.items():
            run = start(made, config)
            latents = generate(run.forward, SEEDS, latents=LATENTS)
            summary = run.summary()
            decided = [schedules(run), summary.contexts["pair"].computed, summary.executed_flops]
            found[f"{name}, {policy}"] = {"decided": decided, "latents": latents.flatten().tolist()}
        norms = MeasureNorms(len(made.blocks))
        run = CacheRun.measuring(lambda context, norms=norms: norms, made, calls=STEPS, contexts=PAIR)  # type: ignore[misc]
        generate(run.forward, SEEDS, latents=LATENTS)
        found[f"{name}, ratios"] = torch.stack(norms.ratios).tolist()
    return found


def work(out: Path) -> None:
    """In one of two processes."""
    torch.set_num_threads(1)
    dist: Dist = init("cpu", 2)
    found = results(SequenceGroup(dist.sequence_group, dist.sequence_rank, dist.sequence))
    (out / f"{dist.rank}.json").write_text(json.dumps(found))
    dist.close()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID")}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *launcher, __file__, str(out)],
        env=environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_decide_as_one(of_ranks: list[dict[str, Any]]) -> None:
    first, second = of_ranks
    assert first == second  # to the last bit: else they would wait for each other in exchanges that never come
    alone = json.loads(json.dumps(results(None)))
    for key, expected in alone.items():
        if key.endswith("ratios"):
            assert first[key] == pytest.approx(expected, rel=1e-5)
            continue
        assert first[key]["decided"] == expected["decided"], key
        torch.testing.assert_close(torch.tensor(first[key]["latents"]), torch.tensor(expected["latents"]))
    parted = {key: found["decided"][0] for key, found in alone.items() if "teacache" in key or "first_block" in key}
    assert all(len({tuple(schedule) for schedule in schedules}) > 1 for schedules in parted.values()), parted


if __name__ == "__main__":
    work(Path(sys.argv[1]))
