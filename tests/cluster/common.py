"""What the drills share: a tiny training of three stages, moments to disturb it at, and the comparison at the end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

STAGES = ("demo_image", "demo_video", "demo_video_128")
STEPS = 40  # of a stage: long enough to be hit, a second or two
SAVE_EVERY = 4
SMALL = [
    "logger.console=false",
    f"checkpoint.every_steps={SAVE_EVERY}",
    "validation.every_steps=10",
    *(f"stages.{stage}.samples={4 * STEPS}" for stage in STAGES),
    "stages.demo_image.buckets=[{frames: 1, height: 64, width: 64, batch_size: 4}]",
    "stages.demo_video.buckets=[{frames: 9, height: 32, width: 32, batch_size: 4}, "
    "{frames: 1, height: 32, width: 32, batch_size: 4}]",
    "stages.demo_video_128.buckets=[{frames: 17, height: 32, width: 32, batch_size: 4}]",
]


class World(Protocol):
    """The part of tests/conftest.py's ``World`` that a training needs."""

    @property
    def words(self) -> list[str]: ...


def words(world: World, runs: Path, name: str, *more: str) -> list[str]:
    """Of ``train.py`` and ``slurm/launch.py`` alike."""
    return [f"name={name}", f"runs_dir={runs}", *world.words, *SMALL, *more]


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; none where it is not there yet."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def step(run: Path) -> int:
    """The last recorded step; read from the end alone, since it is asked for again and again."""
    try:
        with (run / "metrics.jsonl").open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
            whole = stream.read().rpartition(b"\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return int(json.loads(whole[-1])["step"]) if whole else 0


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    for stage in STAGES:
        with suppress(FileNotFoundError):
            if any(path.name.startswith(".saving_") for path in (run / "checkpoints" / stage).iterdir()):
                return True
    return False


def wait(condition: Callable[[], Any], what: str, seconds: float = 60, every: float = 0.005) -> None:
    """Return once ``condition`` holds.

    Raises:
        AssertionError: it did not come to hold.
    """
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds:g} s"
        time.sleep(every)


def tensors(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """All tensors of a finished stage: its final checkpoint's, of every rank, and its export's."""
    final = max((run / "checkpoints" / stage).glob("step_*"))
    found = {"export": load_file(run / "export" / stage / "model.safetensors")}
    found |= {path.stem: load_file(path) for path in sorted(final.glob("*.safetensors"))}
    return {f"{origin}: {name}": tensor for origin, part in found.items() for name, tensor in part.items()}


def moment_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Which record it is."""
    return tuple(record.get(key) for key in ("step", "stage", "kind", "at"))


def history(run: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says about training, without what the clock and the place have in it."""
    keys = ("loss", "grad_norm", "samples", "bucket", "valid", "bucket_loss")
    return [(*moment_of(record), *(record.get(key) for key in keys)) for record in records(run)]


def differences(run: Path, reference: Path) -> list[str]:
    """In what a run differs from an undisturbed one: records, final weights, moments and averages, to the bit."""
    found = []
    ours, theirs = history(run), history(reference)
    if ours != theirs:
        both = enumerate(zip(ours, theirs, strict=False))
        at = next((i for i, (a, b) in both if a != b), min(len(ours), len(theirs)))
        found.append(f"{len(ours)} records, not {len(theirs)}; number {at} is {ours[at:][:1]}, not {theirs[at:][:1]}")
    for stage in STAGES:
        here, there = tensors(run, stage), tensors(reference, stage)
        if here.keys() != there.keys():
            found.append(f"{stage}: {sorted(here.keys() ^ there.keys())[:4]} are on one side alone")
        found += [f"{stage}: {name}" for name in here.keys() & there.keys() if not here[name].equal(there[name])]
    return found


@contextmanager
def frozen(pids: Iterable[int]) -> Iterator[None]:
    """Processes stand still, so that what is done to them meets them at this very step."""
    pids = list(pids)
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
