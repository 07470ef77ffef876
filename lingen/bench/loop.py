"""What it costs to keep a run alive: the loop's own work, a resume, an index, and checkpoints beside training.

*step*. A real run, as ``train.py`` starts it, on rendered clips. Every function that trains (the losses and their
backward, the optimizer's step, the weight average) charges its CPU time to an account of its own, as the metrics, the
guard, the position, the votes and the watchdog do (``lingen.bench.ledger``); what is left between them is the loop's.
So nothing is subtracted, and nothing timed apart from the run: all that does not train is the loop's own work. Only
the receiving of a decoded batch from its worker is listed beside it. CPU time of the process with all its threads,
torch on one of them, median over the steps; W&B runs offline, the guard judges every step, and the model's graph is
let go where its backward is timed.

*resume*. Wall seconds from the start of a process to the record of its first step, after a run that a signal ended.

*index*. Wall seconds of ``load_index``.

*stall*. Wall seconds that the training thread spends in the saver in one save, and by how much steps are slower while a
checkpoint is written, as a share of ``checkpoint.every_steps`` steps.
"""

from __future__ import annotations

import hashlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

import data.pipeline
import lingen.diffusion
from data.pipeline import StageLoader
from data.shards import load_index
from lingen.bench.ledger import Ledger, Seconds
from lingen.bench.tables import markdown
from lingen.compose import compose
from lingen.config import Config
from lingen.dist import EXIT_PREEMPTED, StopSignal
from lingen.ema import Ema
from lingen.engines.plain import TorchEngine
from lingen.errors import UserError
from lingen.guard import Guard
from lingen.loop import train
from lingen.metrics import Metrics
from lingen.operation_config import CheckpointConfig
from lingen.saver import Saver
from lingen.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("model", "optimizer")  # the accounts of what trains
RECEIVING = "receiving"  # ... and of what brings the batches from the workers; all others are the loop's own work
ACCOUNTS: list[tuple[Any, str, str]] = [
    (TorchEngine, "step", "optimizer"),
    (Ema, "update", "optimizer"),
    (StageLoader, "__iter__", "position"),
    (data.pipeline, "decode", RECEIVING),
    (Guard, "reason", "guard"),
    (Guard, "note", "guard"),
    (Metrics, "log", "metrics"),
    (Watchdog, "beat", "watchdog"),
    (Metrics, "sync", "saver"),
    (Saver, "start", "saver"),
    (Saver, "votes", "saver"),
    (Saver, "advance", "saver"),
]
Part = Literal["step", "resume", "index", "stall"]
PARTS: tuple[Part, ...] = get_args(Part)
WARM_UP = 12  # steps: the guard's windows fill, and caches
GUARD_WINDOW = 10  # the smallest, so that so few steps fill it
RESUME_WAIT_S = 300.0


class LoopWords(BaseModel):
    """``steps`` are measured after some that warm up; the stall's are before the first save and after each one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: Annotated[list[Part], Field(min_length=1)] = list(PARTS)
    size: str = "base"
    stall_size: str = "small"
    pixels: PositiveInt = 256  # a side of the one image that a step takes
    steps: PositiveInt = 12
    saves: PositiveInt = 2
    rounds: PositiveInt = 3  # of resume and index
    samples: PositiveInt = 100_000  # of the index


class World(NamedTuple):
    """What a run needs, rendered for it."""

    folder: Path

    @property
    def words(self) -> list[str]:
        return [
            f"runs_dir={self.folder}", f"data.path={self.folder}/shards", "validation.every_steps=0",
            f"autoencoder.path={self.folder}/autoencoder.safetensors", "stage=demo_image",
            "stage.samples=1_000_000", "data.workers=1", "logger.wandb=offline",
        ]  # fmt: skip


def run(words: LoopWords) -> dict[str, Any]:
    """Measure the parts that were asked for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"bench": "loop", **words.model_dump()}
    try:
        with tempfile.TemporaryDirectory(prefix="loop-") as temporary:
            world = World(Path(temporary))
            if set(words.parts) - {"index"}:
                render(world)
            measures: dict[str, Callable[[], dict[str, Any]]] = {
                "index": lambda: measure_index(world.folder / "index", words),
                "resume": lambda: measure_resume(world, words),
                "step": lambda: measure_step(world, words),
                "stall": lambda: measure_stall(world, words),
            }
            result |= {part: measure() for part, measure in measures.items() if part in words.parts}
    finally:
        torch.set_num_threads(threads)
    print(markdown(["part", "figure", ""], [[p, k, v] for p in PARTS if p in result for k, v in result[p].items()]))
    return result


def render(world: World) -> None:
    """Some images and clips in shards, and an autoencoder fitted to them."""
    for words in (
        ("-m", "data.synthetic", f"out={world.folder}/clips", "clips=48", "images=48", "size=64", "frames=17", "fps=8"),
        ("scripts/make_shards.py", f"input={world.folder}/clips", f"output={world.folder}/shards"),
        ("scripts/fit_autoencoder.py", f"data={world.folder}/shards", f"out={world.folder}/autoencoder.safetensors"),
    ):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{words[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


class _Enough(Exception):
    """Ends a run that was measured."""


class _Unasked(StopSignal):
    """Takes no signal: Ctrl-C ends a benchmark at once."""

    def __init__(self) -> None:
        self.asked = False


def watch(config: Config, ledger: Ledger, steps: int, each: Callable[[], None] = lambda: None) -> list[Seconds]:
    """The accounts of each of the last ``steps`` steps of a run of ``steps + WARM_UP``, which then ends unsaved.

    A step lasts from one optimizer step's beginning to the next; there ``each`` is called.
    """
    turns: list[Seconds] = []
    cut_graphs(ledger)
    for owner, name, account in ACCOUNTS:
        ledger.charge(owner, name, account)
    step = TorchEngine.step

    def counted(*args: Any, **kwargs: Any) -> float:
        turns.append(ledger.turn())
        each()
        if len(turns) > steps + WARM_UP:
            raise _Enough
        return step(*args, **kwargs)

    ledger.replace(TorchEngine, "step", counted)
    try:
        train(config, _Unasked())
    except _Enough:
        return turns[-steps:]
    raise UserError(f"the run ended before its step {steps + WARM_UP}")


def cut_graphs(ledger: Ledger) -> None:
    """Let a model's graph end, in memory too, where its backward is timed: else the loop would be charged for freeing
    it. The losses that the step sees are leaves, and their gradient goes on through the graph behind them."""
    forward, backward = lingen.diffusion.batch_losses, TorchEngine.backward
    behind: list[tuple[torch.Tensor, torch.Tensor]] = []

    def cut(*args: Any, **kwargs: Any) -> torch.Tensor:
        losses = forward(*args, **kwargs)
        leaves = losses.detach().requires_grad_()
        behind.append((losses, leaves))
        return leaves

    def through(engine: TorchEngine, loss: torch.Tensor) -> None:
        backward(engine, loss)
        losses, leaves = behind.pop()
        losses.backward(leaves.grad)  # type: ignore[no-untyped-call]

    ledger.replace(lingen.diffusion, "batch_losses", cut)
    ledger.charge(lingen.diffusion, "batch_losses", "model")
    ledger.replace(TorchEngine, "backward", through)
    ledger.charge(TorchEngine, "backward", "model")


def configure(world: World, size: str, pixels: int, *more: str) -> Config:
    """A run with plain torch whose step is one image: a small one for its model, so that the loop's share is large."""
    bucket = f"stage.buckets=[{{frames: 1, height: {pixels}, width: {pixels}, batch_size: 1}}]"
    guard = [f"guard.window={GUARD_WINDOW}", "guard.loss_deviations=1000", "guard.grad_deviations=1000"]
    return compose(
        [f"name={size}", *world.words, f"size={size}", "engine=cpu", "engine.device=cpu", bucket, *guard, *more]
    )


def measure_step(world: World, words: LoopWords) -> dict[str, Any]:
    """The loop's own CPU milliseconds a step by account, and their share of a step."""
    config = configure(world, words.size, words.pixels, f"checkpoint.every_steps={10**9}")
    with Ledger() as ledger:
        turns = watch(config, ledger, words.steps)
    names = sorted({name for turn in turns for name in turn} - set(TRAINING))
    own = [sum(seconds for name, seconds in turn.items() if name not in (*TRAINING, RECEIVING)) for turn in turns]
    step = statistics.median(sum(turn.values()) for turn in turns)
    return {
        "own_ms": milli(statistics.median(own)),
        "own_ms_most": milli(max(own)),
        "step_s": round(step, 3),
        "own_share": round(statistics.median(own) / step, 6),
        **{f"{name}_ms": milli(statistics.median(turn.get(name, 0.0) for turn in turns)) for name in names},
    }


def measure_stall(world: World, words: LoopWords) -> dict[str, Any]:
    """How long a save holds training up, and by how much it slows steps down, against the steps between two saves."""
    interval, every = WARM_UP + words.steps, CheckpointConfig().every_steps  # so the first steps measured are quiet
    config = configure(world, words.stall_size, words.pixels, f"checkpoint.every_steps={interval}")
    beside: list[bool] = []  # of each step: whether a checkpoint was being written
    with Ledger(time.perf_counter) as ledger:
        start, advance = Saver.start, Saver.advance
        writing = False

        def started(*args: Any, **kwargs: Any) -> None:
            nonlocal writing
            start(*args, **kwargs)
            writing = True

        def advanced(*args: Any) -> Path | None:
            nonlocal writing
            folder = advance(*args)
            writing = writing and folder is None
            return folder

        ledger.replace(Saver, "start", started)
        ledger.replace(Saver, "advance", advanced)
        steps = interval * words.saves - WARM_UP + words.steps
        turns = watch(config, ledger, steps, each=lambda: beside.append(writing))
    quiet, busy = by_company(turns, beside[-len(turns) :])
    step = statistics.median(quiet)
    held_up = sum(turn.get("saver", 0.0) for turn in turns) / words.saves
    slowed = sum(seconds - step for seconds in busy) / words.saves
    return {
        "step_s": round(step, 3),
        "held_up_s": round(held_up, 3),  # a save
        "steps_beside": round(len(busy) / words.saves, 1),
        "slowed_s": round(slowed, 3),  # a save
        "every_steps": every,
        "held_up_share": round(held_up / (every * step), 6),
        "whole_share": round((held_up + max(0.0, slowed)) / (every * step), 6),
    }


def by_company(turns: list[Seconds], beside: list[bool]) -> tuple[list[float], list[float]]:
    """Seconds of the steps, without what the saver took: of those by themselves, and of those beside a write."""
    seconds = [sum(s for name, s in turn.items() if name != "saver") for turn in turns]
    return (
        [s for s, company in zip(seconds, beside, strict=True) if not company],
        [s for s, company in zip(seconds, beside, strict=True) if company],
    )


def measure_resume(world: World, words: LoopWords) -> dict[str, Any]:
    """Wall seconds from a process's start to its first step's record, after a signal ended the run before it."""
    name = "resumed"
    command = [sys.executable, "train.py", f"name={name}", *world.words, "size=tiny", "logger.console=false"]
    metrics = world.folder / name / "metrics.jsonl"
    seconds, steps = [], 0
    for _ in range(words.rounds + 1):
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while (now := last_step(metrics)) <= steps and process.poll() is None:
                if time.perf_counter() - began > RESUME_WAIT_S:
                    raise UserError(f"no step of a tiny model after {RESUME_WAIT_S:g} s")
                time.sleep(0.01)
            seconds.append(time.perf_counter() - began)
            process.send_signal(signal.SIGUSR1)
            _, said = process.communicate(timeout=RESUME_WAIT_S)
        finally:
            process.kill()
        if process.returncode != EXIT_PREEMPTED:
            last = (said.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"train.py ended with code {process.returncode}: {last}")
        steps = max(now, last_step(metrics))
    first, *resumed = seconds
    most, middle = max(resumed), statistics.median(resumed)
    return {"first_start_s": round(first, 2), "resume_s": round(middle, 2), "resume_s_most": round(most, 2)}


def last_step(metrics: Path) -> int:
    """Of the records; 0 where there is none yet."""
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return max((json.loads(line)["step"] for line in whole if b'"train"' in line), default=0)


def measure_index(folder: Path, words: LoopWords) -> dict[str, Any]:
    """Wall seconds of ``load_index`` on an index of so many samples, 256 a shard, the shards being there."""
    write_index(folder, words.samples)
    seconds = []
    for _ in range(words.rounds):
        began = time.perf_counter()
        index = load_index(folder)
        seconds.append(time.perf_counter() - began)
    return {
        "samples": len(index),
        "bytes": (folder / "index.json").stat().st_size,
        "load_s": round(statistics.median(seconds), 3),
    }


def write_index(folder: Path, samples: int) -> None:
    """index.json, and shards that hold nothing yet have their sizes."""
    each, room = 256, 1 << 16
    folder.mkdir()
    names = [f"shard-{n:06d}.tar" for n in range(-(-samples // each))]
    for name in names:
        with (folder / name).open("wb") as shard:
            shard.truncate(each * room)
    rows = range(samples)
    columns: dict[str, list[Any]] = {
        "key": [f"folder/{n:09d}" for n in rows],
        "caption": [f"a red circle moving left on a plain background, number {n}" for n in rows],
        **{name: [value] * samples for name, value in (("frames", 17), ("fps", 8.0), ("height", 256), ("width", 448))},
        "bytes": [40_000 + n % 1000 for n in rows],
        "shard": [n // each for n in rows],
        "offset": [n % each * room + 512 for n in rows],
        "sha256": [hashlib.sha256(str(n).encode()).hexdigest() for n in rows],
    }
    shards = [{"name": name, "bytes": each * room} for name in names]
    (folder / "index.json").write_text(json.dumps({"format": "lingen-shards-1", "shards": shards, "samples": columns}))


def milli(seconds: float) -> float:
    return round(1e3 * seconds, 4)
