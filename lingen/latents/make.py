"""The work of precompute: claim a unit, decode its clips, encode them, write their shard; in any number of processes.

Shapes: B clips, F frames, H height, W width in pixels; C channels, T x h x w latent positions.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.batch import Batch
from data.decode import ClipInfo
from data.index_file import Latents, StoredStates
from data.latents import DTYPES, SUFFIX, check_of, pack, refuse_latents
from data.shards import Index, load_index
from data.workers import Hole, Job, decode
from data.writer import ShardWriter, Window
from lingen.autoencoders import Autoencoder, load_autoencoder
from lingen.config import Config
from lingen.dist import Place
from lingen.errors import LocalError, UserError, run_main
from lingen.latents.folder import Folder, Part, Plan, Rejected
from lingen.latents.units import Unit, buckets_of, make_units
from lingen.output import make_folder, writing
from lingen.text.encoders import TextEncoders, load_text_encoders

SHOW_S = 0.5  # between two looks at what the other processes have done


class Words(BaseModel):
    """The script's own words; all others are a run's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: str  # the shards
    out: str  # a folder
    windows: PositiveInt = 1  # of a clip and bucket, evenly spread; each is a sample
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # of the latents
    text_states: bool = False  # store the text encoders' states too
    workers: PositiveInt | None = None  # processes on this machine; None: one a GPU, or one a core; under a launcher 1
    batch_size: PositiveInt = 4  # clips that are encoded together
    samples_per_shard: PositiveInt = 256


def precompute(words: Words, config: Config, place: Place) -> str:
    """Make what is missing; what was done, in one line.

    Raises:
        UserError: the input cannot be used, the output cannot be written, or more samples are bad than
            ``data.max_bad_share``.
    """
    device = find_device(config, place.local_rank)
    here = torch.cuda.device_count() if device.type == "cuda" else _cores()
    count = 1 if place.world > 1 else words.workers or here
    task = Task.open(words, config, device)
    others: list[BaseProcess] = []
    try:
        with writing(words.out):
            if not task.folder.complete:
                others = [_start(words, config, rank) for rank in range(1, min(count, len(task.units)))]
                task.work(shown=place.rank == 0, busy=others)
                for other in others:
                    other.join()
                task.work(shown=False, busy=[])  # what a process left that was killed
            complete = task.folder.finish(len(task.units), config.data.max_bad_share)
    finally:
        task.folder.close()
        for other in others:
            other.kill()
            other.join()
    return task.summary() if complete else f"{words.out}: done here; other processes write the rest and the index"


def find_device(config: Config, local_rank: int) -> torch.device:
    """This process's device, by ``engine.device``.

    Raises:
        UserError: there is no GPU where one is asked for.
    """
    if config.engine.device == "cpu" or (config.engine.device == "auto" and not torch.cuda.is_available()):
        torch.set_num_threads(1)  # the same bits whatever the number of cores; processes are what uses them
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("engine.device=cuda, but torch sees no GPU; set engine.device=cpu or auto")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(words: Words, config: Config, rank: int) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_other, args=(words, config, rank))
    process.start()
    return process


def _other(words: Words, config: Config, rank: int) -> None:
    """Another process of this machine. Its errors are the first one's too, which tells them."""

    def work() -> None:
        task = Task.open(words, config, find_device(config, rank))
        with writing(words.out):
            task.work(shown=False, busy=[])

    os.environ["RANK"] = str(rank)  # for run_main: rank 0 says it for all
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    run_main(work)


def _end_with_the_first() -> None:
    """A process that was killed cannot end the others; they would go on for hours with nobody to look after them."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


@dataclass(frozen=True)
class Task:
    """All that one process needs."""

    words: Words
    config: Config
    device: torch.device
    index: Index
    autoencoder: Autoencoder
    text: TextEncoders | None
    units: list[Unit]
    folder: Folder

    @classmethod
    def open(cls, words: Words, config: Config, device: torch.device) -> Task:
        """Read the input and see that the output is ours."""
        index = load_index(words.data)
        refuse_latents(index, f"data={words.data}")
        stages = list(config.stages.values())
        units = make_units(index, stages, config.data, windows=words.windows, samples_per_shard=words.samples_per_shard)
        make_folder(Path(words.out), words.out)
        autoencoder = load_autoencoder(config.autoencoder, device)
        text = load_text_encoders(config.text, device) if words.text_states else None
        empty = pack(None, text.tokens(""), autoencoder.fingerprint) if text else b""
        latents = Latents(
            autoencoder=autoencoder.fingerprint,
            channels=autoencoder.channels,
            time=autoencoder.time,
            space=autoencoder.space,
            dtype=words.dtype,
            source=index.fingerprint,
            buckets=list(buckets_of(stages)),
            windows=words.windows,
            holdout_share=config.data.holdout_share,
            text=_stored(text) if text else {},
            empty_sha256=hashlib.sha256(empty).hexdigest() if empty else "",
        )
        plan = Plan(
            latents=latents,
            samples=sum(len(unit.rows) for unit in units),
            samples_per_shard=words.samples_per_shard,
            batch_size=words.batch_size,
            autoencoder_dtype=config.autoencoder.dtype,
            tile=config.autoencoder.tile,
        )
        with writing(words.out):
            folder = Folder(words.out, plan, empty)
        return cls(words, config, device, index, autoencoder, text, units, folder)

    def work(self, *, shown: bool, busy: list[BaseProcess]) -> None:
        """Make what nobody has made or is making; ``shown``: under a bar, until those that are busy end too."""
        claimed: deque[Unit] = deque()  # the workers are ahead: these are claimed, and their clips come in this order
        clips = decode(self.index, self.config.data, self._jobs(claimed))
        with _bar(shown) as bar:
            show = _Shown(self, bar)
            for first in clips:
                unit = claimed.popleft()
                rest = islice(clips, -(-len(unit.rows) // self.words.batch_size) - 1)
                self._make(unit, chain([first], rest), show)
                self.folder.release(unit.number)
            while any(process.is_alive() for process in busy):
                show.others()
                time.sleep(SHOW_S)
            show.others()

    def _jobs(self, claimed: deque[Unit]) -> Iterator[Job]:
        for unit in self.units:
            if self.folder.claim(unit.number):
                claimed.append(unit)
                yield from unit.jobs(self.words.batch_size)

    def _make(self, unit: Unit, clips: Iterator[tuple[Batch, list[Hole]]], show: _Shown) -> None:
        """One shard and its rows. It depends on the unit alone."""
        writer, part, done = ShardWriter(self.folder.path, first=unit.number), Part(), 0
        try:
            for batch, holes in clips:
                if batch.lost:
                    raise LocalError(batch.lost)  # the others may never come to this shard
                part.rejected += [Rejected(bucket=str(unit.bucket), **vars(hole)) for hole in holes]
                self._encode(unit, batch, writer, part)
                done += len(batch.keys)
                show.own(done)
            part.shard, rows = writer.close() or (None, part.rows)
            part.rows = rows
        except BaseException:
            writer.drop()
            raise
        self.folder.add(unit.number, part)

    @torch.no_grad()
    def _encode(self, unit: Unit, batch: Batch, writer: ShardWriter, part: Part) -> None:
        pixels = batch.pixels.to(self.device)  # (B, 3, F, H, W)
        encoded = self.autoencoder.encode(pixels).to(DTYPES[self.words.dtype]).cpu()  # (B, C, T, h, w)
        for n in torch.nonzero(batch.valid).flatten().tolist():
            place, latents, caption = int(batch.positions[n]), encoded[n], batch.captions[n]
            if not latents.isfinite().all():
                bad = Rejected(key=batch.keys[n], bucket=str(unit.bucket), reason="latents not finite", detail="")
                part.rejected.append(bad)
                continue
            part.count(latents)
            tokens = self.text.tokens(caption) if self.text else {}
            media = pack(latents, tokens, self.autoencoder.fingerprint)
            part.checks.append(check_of(media))
            part.sources.append(unit.source(self.index, place))
            key = unit.key(self.index, place)
            bucket = unit.bucket
            info = ClipInfo(bucket.frames, unit.fps if bucket.frames > 1 else 0.0, bucket.height, bucket.width)
            window = Window(key, caption, info, *unit.window(self.index, place))
            writer.add_media(key, media, SUFFIX, ("txt", caption.encode(errors="replace")), [window])

    def summary(self) -> str:
        """Of a finished folder.

        Raises:
            UserError: it is no longer whole.
        """
        index = load_index(self.folder.path)
        about = index.latents
        assert about is not None
        size = int(index.bytes.sum()) / 1e6
        return (
            f"{self.words.out}: {len(index)} latents of {len(about.buckets)} buckets in {len(index.shards)} shards, "
            f"{size:.1f} MB; rejected: {self.folder.plan.samples - len(index)}; by channel, mean {min(about.mean):.2f} "
            f"to {max(about.mean):.2f}, std {min(about.std):.2f} to {max(about.std):.2f}"
        )


def _stored(text: TextEncoders) -> dict[str, StoredStates]:
    return {
        name: StoredStates(
            fingerprint=text.fingerprints[name], length=config.length, dim=config.dim, dtype=config.dtype
        )
        for name, config in text.configs.items()
    }


class _Shown:
    """The bar: what is done in this process, and in those beside it."""

    def __init__(self, task: Task, bar: Progress) -> None:
        self._sizes = {unit.number: len(unit.rows) for unit in task.units}
        self._folder, self._bar, self._looked = task.folder, bar, 0.0
        self._done = 0  # in whole units
        self._task = bar.add_task("encoding clips", total=sum(self._sizes.values()))

    def own(self, part: int) -> None:
        """So much of the unit under way is done."""
        if not self._bar.disable and time.monotonic() - self._looked > SHOW_S:
            self.others()
        self._bar.update(self._task, completed=self._done + part)

    def others(self) -> None:
        """Count the units that are whole."""
        if not self._bar.disable:
            self._looked = time.monotonic()
            self._done = sum(size for number, size in self._sizes.items() if self._folder.has(number))
            self._bar.update(self._task, completed=self._done)


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
