"""A training that changes hands: ZeRO level, number of processes and accumulation change together, and it goes on as it
would have, in its losses, its batches, its weights, both moments and the average.

This file is also the program that does it (``python -m``): it imports torch and DeepSpeed once, and every process of
every leg is a fork of it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.checkpoint import assemble
from lingen.dist import init
from lingen.shardfiles import KINDS
from tests.conftest import ENVIRONMENT, ROOT
from tests.integration.test_engines import ENGINES, EngineKey, inherit, make, save, train
from tests.runs import Signal, lines

# A ring visits the five engines in strides of its own number: the four rings take each engine to each other one.
RINGS = (1, 2, 3, 4)
LEGS = [(1, 2), (2, 1), (4, 2), (2, 4), (1, 8), (2, 1)]  # (processes, grad_accumulation)
STEPS = 3  # a leg
TOTAL = STEPS * len(LEGS)

STAGES = ["demo_image", "demo_video"]
RUN = [  # two stages of four steps each
    "~stages.demo_video_128", "model=lingen", "validation.every_steps=0", "logger.console=false",
    "ema.halflife_samples=20",
    *(f"stages.{stage}.samples=16" for stage in STAGES), "stages.demo_image.buckets.0.batch_size=4",
    "stages.demo_video.buckets=[{frames: 17, height: 32, width: 32, batch_size: 4},"
    "{frames: 1, height: 32, width: 32, batch_size: 4, share: 0.5}]",
]  # fmt: skip
Way = tuple[int, list[str], int | None]  # processes, words, the step of a signal
WAYS: list[Way] = [
    (1, ["engine=cpu", "data.workers=1"], 3),
    (2, ["engine=zero3", "engine.dtype=fp32", "engine.grad_accumulation=2"], 6),
    (4, ["engine=zero1", "engine.dtype=fp32"], 7),
    (1, ["engine=zero2", "engine.dtype=fp32", "engine.grad_accumulation=4", "data.workers=2"], None),
]


def engine_of(ring: int, leg: int) -> EngineKey:
    return ENGINES[ring * leg % len(ENGINES)]


def take_leg(out: Path, leg: int) -> None:
    """The steps of one leg, in every ring."""
    dist = init("cpu")
    _, accumulation = LEGS[leg]
    measured = {}
    for ring in RINGS:
        folder = out / f"ring{ring}"
        engine, ema = make(dist, engine_of(ring, leg), "fp32", accumulation=accumulation, seed=leg)
        if leg:
            inherit(dist, folder, engine, ema)
        measured[ring] = train(dist, engine, ema, STEPS * leg, STEPS * (leg + 1), accumulation=accumulation)
        save(dist, folder, engine, ema, step=STEPS * (leg + 1))
        engine.close()
    if dist.rank == 0:
        (out / f"leg{leg}.json").write_text(json.dumps(measured))
    dist.close()


def never_change(out: Path) -> None:
    """All steps in one process, with plain torch."""
    dist = init("cpu")
    engine, ema = make(dist, ENGINES[0], "fp32")
    (out / "reference.json").write_text(json.dumps(train(dist, engine, ema, 0, TOTAL)))
    save(dist, out / "reference", engine, ema, step=TOTAL)


def train_a_run(out: Path, name: str, words: list[str], way: Way) -> None:
    """What train.py does, up to the way's signal; which samples each step took is written down."""
    from data.pipeline import StageLoader
    from lingen.compose import compose
    from lingen.loop import train as train_all

    rank, iterate = os.environ["RANK"], StageLoader.__iter__

    def watched(self: StageLoader) -> Any:
        for batches in iterate(self):
            with (out / f"{name}-{rank}.jsonl").open("a") as file:
                for batch in batches:
                    file.write(json.dumps([self.stage.name, self.position.step, batch.positions.tolist(), batch.keys]))
                    file.write("\n")
            yield batches

    StageLoader.__iter__ = watched  # type: ignore[method-assign]
    _, more, stop_at = way
    code = train_all(compose([f"name={name}", f"runs_dir={out}", *words, *RUN, *more]), Signal(out / name, stop_at))  # type: ignore[arg-type]
    assert code == (75 if stop_at else 0), code


def fork(processes: int, task: Callable[..., None], *arguments: Any) -> None:
    """Run ``task`` as so many ranks; all must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        torch.set_num_threads(1)
        task(*arguments)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank,)) for rank in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * processes, f"{task.__name__}{arguments[1:]}: exit codes {codes}"


def main(out: Path, words: list[str]) -> None:
    import deepspeed  # noqa: F401  # once for all forks

    import lingen.loop  # noqa: F401

    fork(1, never_change, out)
    for leg, (processes, _) in enumerate(LEGS):
        fork(processes, take_leg, out, leg)
    fork(1, train_a_run, out, "undisturbed", words, (1, ["engine=cpu"], None))
    for way in WAYS:
        fork(way[0], train_a_run, out, "changing", words, way)


@pytest.fixture(scope="module")
def out(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All legs of all rings, and the runs."""
    folder = tmp_path_factory.mktemp("elastic")
    command = [sys.executable, "-m", "tests.integration.test_elastic", str(folder), *world.words]
    environment = os.environ | ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def apart(folder: Path, reference: Path, kind: str) -> float:
    """The greatest difference of any parameter's ``kind``, relative to the largest of its own values.

    What is a millionth of other parameters' is rounding, and held against those: gates that are still nearly shut leave
    gradients of 1e-14 behind them.
    """
    ours, theirs = assemble(folder, kind), assemble(reference, kind)
    assert ours.keys() == theirs.keys()
    largest = {name: float(value.abs().max()) for name, value in theirs.items()}
    least = 1e-6 * max(largest.values())
    return max(float((ours[name] - theirs[name]).abs().max()) / max(largest[name], least) for name in theirs)


def final(run: Path, stage: str) -> Path:
    return max((run / "checkpoints" / stage).glob("step_*"))


def test_the_rings_take_each_engine_to_each_other() -> None:
    hops = {hop for ring in RINGS for hop in pairwise(engine_of(ring, leg) for leg in range(len(LEGS)))}
    assert hops == {(a, b) for a in ENGINES for b in ENGINES if a != b}
    assert all(here != there for here, there in pairwise(LEGS))


@pytest.mark.parametrize("ring", RINGS)
def test_losses_go_on_as_they_would_have(out: Path, ring: int) -> None:
    legs = [json.loads((out / f"leg{leg}.json").read_text())[str(ring)] for leg in range(len(LEGS))]
    ours = torch.tensor([step for leg in legs for step in leg], dtype=torch.float64)  # (TOTAL, 2)
    theirs = torch.tensor(json.loads((out / "reference.json").read_text()), dtype=torch.float64)
    assert ours.shape == theirs.shape == (TOTAL, 2)
    assert float(((ours - theirs).abs() / theirs.abs()).max()) < 1e-5


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_moments_and_average_are_carried(out: Path, ring: int, kind: str) -> None:
    last = f"step_{TOTAL:08d}"
    assert apart(out / f"ring{ring}" / last, out / "reference" / last, kind) < 1e-5
    steps = [
        json.loads((out / n / last / "manifest.json").read_text())["adam_steps"] for n in (f"ring{ring}", "reference")
    ]
    assert steps == [TOTAL, TOTAL]


def test_a_whole_run_goes_on_as_it_would_have(out: Path) -> None:
    ours, theirs = lines(out / "changing", "train"), lines(out / "undisturbed", "train")
    assert [(r["step"], r["stage"], r["samples"], r["bucket"], r["valid"]) for r in ours] == [
        (r["step"], r["stage"], r["samples"], r["bucket"], r["valid"]) for r in theirs
    ]
    assert len(ours) == 8 and len({r["bucket"] for r in ours}) == 3
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-5)
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-4)
    for stage in STAGES:
        for kind in KINDS:
            assert apart(final(out / "changing", stage), final(out / "undisturbed", stage), kind) < 1e-5


def test_a_whole_run_sees_the_same_batches(out: Path) -> None:
    """Each sample of each global batch was read by one rank of one start."""

    def batches(name: str) -> dict[tuple[str, int], dict[int, str]]:
        seen: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
        for file in out.glob(f"{name}-*.jsonl"):
            for stage, step, positions, keys in map(json.loads, file.read_text().splitlines()):
                for at, key in zip(positions, keys, strict=True):
                    assert at not in seen[stage, step]
                    seen[stage, step][at] = key
        return seen

    ours = batches("changing")
    assert ours == batches("undisturbed") and len(ours) == 8 and all(len(batch) == 4 for batch in ours.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
