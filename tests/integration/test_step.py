"""One training step on two ranks that do not see the same: what one of them meets, both act on.

This file is also the program that runs in the two processes (see ``work``): one launch serves all tests.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from data.batch import Batch, Bucket
from lingen.config import BucketConfig, EngineConfig, FlowConfig, OptimConfig, StageConfig
from lingen.diffusion import Networks
from lingen.dist import Dist, init
from lingen.engine import make_engine
from lingen.errors import UserError
from lingen.guard import Guard
from lingen.operation_config import GuardConfig
from lingen.step import step_keys, train_step
from tests.conftest import Command

BROKEN, WHOLE = 255, 100  # pixels
STAGE = StageConfig(
    name="s", buckets=[BucketConfig(frames=1, height=4, width=4, batch_size=4)], samples=4, lr=0.1, timestep_shift=1.0
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 1, 1, 1), 0.5))

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, states: dict[str, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        return x * self.weight  # (B, 3, F, H, W)


class Autoencoder:
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = pixels.float() / WHOLE
        return torch.where(pixels == BROKEN, math.nan, latents)


class Text:
    dropout: ClassVar[dict[str, float]] = {}

    def encode(
        self, captions: list[str], left_out: list[set[str]], stored: None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {}, torch.ones(len(captions), 1, dtype=torch.bool)


def batch(dist: Dist, level: int = WHOLE, *, valid: bool = True) -> Batch:
    """This rank's two of the global batch's four samples."""
    positions = 2 * dist.rank + torch.arange(2)
    return Batch(
        Bucket(1, 4, 4),
        torch.full((2, 3, 1, 4, 4), level, dtype=torch.uint8),
        ["", ""],
        [f"sample-{int(n)}" for n in positions],
        torch.full((2,), valid),
        positions,
    )


def work(out: Path) -> None:
    """Each case, with what every rank heard and whether anything changed on it."""
    torch.set_num_threads(1)
    dist = init("cpu")
    judge = Guard(GuardConfig())

    def make() -> Networks:
        model = Model()
        engine = make_engine(model, EngineConfig(), OptimConfig(), dist)
        config = SimpleNamespace(seed=0, flow=FlowConfig())
        return Networks(engine, Autoencoder(), Text(), dist.device, torch.float32, config)  # type: ignore[arg-type]

    disturbed = make()

    def state(networks: Networks) -> list[Any]:
        parts = [t.tolist() for f in networks.engine.fragments() for t in (f.master, f.exp_avg, f.exp_avg_sq)]
        return [*parts, networks.engine.steps, networks.engine.model.weight.flatten().tolist()]  # type: ignore[operator]

    def take(
        batches: list[Batch],
        *,
        networks: Networks = disturbed,
        refuse: Callable[[float, float], str | None] = lambda loss, norm: judge.reason("1x4x4", loss, norm),
        lost: str | None = None,
    ) -> list[dict[str, Any]]:
        before = state(networks)
        heard: dict[str, Any] = {"keys": step_keys(batches, dist)}
        try:
            result = train_step(
                networks, batches, lr=0.1, stage=STAGE, samples_seen=0, dist=dist,
                votes=lambda: [float(dist.rank == 0), 10.0 + dist.rank], refuse=refuse, lost=lost,
            )  # fmt: skip
            heard |= {**vars(result), "loss": str(result.loss)}
        except UserError as error:
            heard["error"] = str(error)
        heard |= {"changed": state(networks) != before, "state": state(networks)}
        return dist.gather(heard)

    here = dist.rank == 1
    cases = {
        "sound": take([batch(dist)]),
        "nan": take([batch(dist, BROKEN if here else WHOLE)]),
        "split": take([batch(dist)], refuse=lambda loss, norm: "too steep" if here else None),
        "holes": take([batch(dist, valid=False)]),
        "lost": take([batch(dist)], lost="shard s.tar cannot be read: Input/output error" if here else None),
        "again": take([batch(dist)]),
        "undisturbed": [take([batch(dist)], networks=other) for other in [make()] for _ in range(2)][1],
    }
    if dist.rank == 0:
        out.write_text(json.dumps(cases))
    dist.close()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, python: Command) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("step") / "cases.json"
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_a_sound_step_is_taken_and_votes_are_summed(cases: dict[str, Any]) -> None:
    for name in ("sound", "again"):
        first, second = cases[name]
        assert {**first, "state": None} == {**second, "state": None}  # each shows its own fragments
        assert first["changed"] and first["refused"] is None and first["valid"] == 4
        assert first["votes"] == [1.0, 21.0] and float(first["loss"]) > 0 and first["grad_norm"] > 0
        assert first["keys"] == [f"sample-{n}" for n in range(4)]


def test_nan_in_the_loss_of_one_rank_is_refused_on_both(cases: dict[str, Any]) -> None:
    for heard in cases["nan"]:
        assert heard["refused"] == "loss=nan is not finite" and not heard["changed"]
        assert heard["votes"] == [1.0, 21.0]  # NaN does not spread to them


def test_what_one_rank_refuses_both_leave_out(cases: dict[str, Any]) -> None:
    first, second = cases["split"]
    assert (first["refused"], second["refused"]) == ("another rank refused it", "too steep")
    assert not first["changed"] and not second["changed"]


def test_a_step_of_holes_is_no_failure_and_changes_nothing(cases: dict[str, Any]) -> None:
    for heard in cases["holes"]:
        assert heard["refused"] is None and heard["loss"] == "nan" and heard["valid"] == 0
        assert not heard["changed"] and heard["votes"] == [1.0, 21.0]


def test_what_one_rank_lost_both_say_and_nothing_changes(cases: dict[str, Any]) -> None:
    for heard in cases["lost"]:
        assert heard["error"] == (
            "shard s.tar cannot be read: Input/output error; nothing of this step was taken; restore it and run again"
        )
        assert not heard["changed"]


def test_what_was_left_out_leaves_no_trace_in_a_later_step(cases: dict[str, Any]) -> None:
    assert cases["again"] == cases["undisturbed"] != cases["sound"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
