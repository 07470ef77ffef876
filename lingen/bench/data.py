"""The loader against what it stands on.

*Clips*: the loader's frames/s against those of a bare decord loop over the same clips, which takes the same frames of
each and gives RGB at the source's size. The loader also checks sha256 sums, crops, scales to the bucket and hands over
batches in order. *Latents*: the loader's bytes/s, every sample checked, against reading all members of the same tar
files: from the disk, as in a training whose latents do not fit into memory, and (``latent_memory_...``) from the memory
of the system, where reading is no more than copying, into a buffer that stays in the processor's cache.

Both sides have as many processes (the loader's keepers and its parent beside them do next to nothing), and either
library keeps the threads it has for one clip: in decord one decodes, in the loader too. One side runs after the other,
round by round; the bare one is timed from the start of its processes, the loader, which lives for hours, from when its
memory was used once. ``ratio`` is the loader's rate over the bare one's, the median over the rounds; ``cpu_ratio`` that
of what they make a CPU second, summed over all processes of a side: where others use the cores, it says more.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from data.batch import Bucket
from data.blocks import SPARE
from data.buckets import Ints, eligible
from data.decode import ClipInfo
from data.index_file import INDEX, IndexFile, LatentBucket, Latents
from data.latents import SUFFIX, check_of, pack, refuse_latents
from data.shards import Index, add_shard, load_index, read_member
from data.video import HAS_DECORD
from data.workers import Job, decode
from data.writer import ShardWriter, Window
from lingen.bench.timing import Case, interleave, median, ratio
from lingen.config import DataConfig
from lingen.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4  # samples of a micro-batch
WORLD = ("clips=48", "images=0", "size=320", "frames=49", "fps=24")
LATENTS = Bucket(257, 512, 512)  # 17 s: 4.3 MB a sample
STORED = 256  # samples of such latents
TICK = 0.01  # seconds, in which the system counts a process's
WARM = 100  # clips, after which a worker holds what it always holds


class DataWords(BaseModel):
    """``data``: shards of clips; without them a small world is rendered. Likewise ``latents``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: str | None = None
    latents: str | None = None
    workers: PositiveInt = 2
    frames: PositiveInt = 17
    height: PositiveInt = 256
    width: PositiveInt = 256
    fps: PositiveFloat = 8.0
    clips: PositiveInt = 384  # that are decoded in each round
    passes: PositiveInt = 8  # over the latents in each round from memory
    rounds: PositiveInt = 5
    opened: PositiveInt = 1000  # clips that one worker opens while its memory is watched


def run(words: DataWords) -> dict[str, Any]:
    """Frames and bytes per second of the loader and of what it is compared with; what a worker's memory grew by."""
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        clips = load_index(words.data or _render(Path(folder)))
        refuse_latents(clips, f"data={words.data}")
        decoding = _decoding(words, clips, Bucket(words.frames, words.height, words.width))
        side = int(clips.height[0])
        unscaled = {} if words.data else {"unscaled": _decoding(words, clips, Bucket(words.frames, side, side))}
        growth = _growth(words, clips)
        stored = load_index(words.latents or _store(Path(folder) / "latents"))
        if stored.latents is None:
            raise UserError(f"latents={words.latents} holds clips; name a folder that scripts/precompute.py wrote")
        reading = _reading(words, stored)
    return {
        "bench": "data",
        "cores": os.cpu_count(),
        "workers": words.workers,
        **decoding,
        "rss_growth_bytes": growth,
        "opened": words.opened,
        **reading,
        **unscaled,
    }


def _decoding(words: DataWords, index: Index, bucket: Bucket) -> dict[str, Any]:
    """Frames/s of the loader, and of a bare loop over the same frames, which neither crops nor scales."""
    data = DataConfig(path=str(index.path), workers=words.workers)
    rows = _rows(words, index, bucket, data, words.clips)
    cases = {
        "loader": lambda: _load(index, data, _jobs(bucket, words.fps, rows)),
        "bare": lambda: _in_processes(words.workers, lambda n: _bare(index, words, rows[n :: words.workers])),
    }
    return {
        "bucket": str(bucket),
        "decoder": data.decoder,
        "bare_decoder": "decord" if HAS_DECORD else "pyav",
        **_compare(cases, words.rounds, len(rows) * words.frames, ("frames_per_s", "raw_frames_per_s", "")),
    }


class Cost(NamedTuple):
    """Of one round of one side."""

    wall: float  # seconds
    cpu: float  # seconds of all its processes


def _compare(
    cases: dict[str, Callable[[], Cost]], rounds: int, amount: int, names: tuple[str, str, str]
) -> dict[str, Any]:
    """The rates of the loader and of what it is compared with, and how they compare."""
    costs: dict[str, list[Cost]] = {name: [] for name in cases}

    def measure(name: str) -> None:
        costs[name].append(cases[name]())

    interleave({name: Case(partial(measure, name)) for name in cases}, rounds)
    wall = {name: [cost.wall for cost in found[1:]] for name, found in costs.items()}  # the first one warmed up
    cpu = {name: [max(cost.cpu, TICK) for cost in found[1:]] for name, found in costs.items()}
    ours, bare = cases
    return {
        names[0]: round(amount / median(wall, ours), 1),
        names[1]: round(amount / median(wall, bare), 1),
        f"{names[2]}ratio": round(ratio(wall, bare, ours), 3),
        f"{names[2]}cpu_ratio": round(ratio(cpu, bare, ours), 3),
    }


def _load(index: Index, data: DataConfig, jobs: list[Job]) -> Cost:
    """What it costs to have these jobs done by a loader that runs already: the first ones, until each of its blocks of
    memory was filled once, are left out, and the rest is scaled up to all jobs.

    Raises:
        RuntimeError: there is a hole, which would cost nothing.
    """
    me, first = psutil.Process(), min(data.workers * data.prefetch + SPARE, len(jobs) // 2)
    began = now = Cost(0.0, 0.0)
    for n, (_, holes) in enumerate(decode(index, data, iter(jobs)), start=1):
        if holes:
            raise RuntimeError(f"{holes[0].key}: {holes[0].reason}")
        if n in (first, len(jobs)):
            now = Cost(time.perf_counter(), _cpu(me) + sum(map(_cpu, me.children(recursive=True))))
            began = now if n == first else began
    share = (len(jobs) - first) / len(jobs)
    return Cost((now.wall - began.wall) / share, (now.cpu - began.cpu) / share)


def _cpu(process: psutil.Process) -> float:
    """Seconds so far; of its children that ended too, but for this process."""
    times = process.cpu_times()
    ended = (times.children_user + times.children_system) if process.pid != os.getpid() else 0.0
    return float(times.user + times.system + ended)


def _bare(index: Index, words: DataWords, rows: Ints) -> None:
    """Decode the window in the middle of each clip, as one would write it down: no crop, no scaling, no checks."""
    for row in rows:
        rate, count = float(index.fps[row]), int(index.frames[row])
        first = index.begin[row] * rate + 0.5 * (count - 1 - (words.frames - 1) * rate / words.fps)
        wanted = np.round(first + np.arange(words.frames) * rate / words.fps).astype(int)
        media = io.BytesIO(read_member(index, int(row), verify=False))
        if HAS_DECORD:
            import decord

            video = decord.VideoReader(media, ctx=decord.cpu(0), num_threads=1)
            video.get_batch(np.minimum(wanted, len(video) - 1)).asnumpy()
        else:
            import av

            with av.open(media) as container:
                for n, frame in enumerate(container.decode(video=0)):
                    if n in wanted:
                        frame.to_ndarray(format="rgb24")
                    if n >= wanted[-1]:
                        break


def _reading(words: DataWords, index: Index) -> dict[str, Any]:
    """Bytes/s of latents through the loader, and of the members of their tar files: from the disk, then from memory."""
    data = DataConfig(path=str(index.path), workers=words.workers)
    bucket = Bucket(int(index.frames[0]), int(index.height[0]), int(index.width[0]))
    rows = np.flatnonzero((index.frames == bucket.frames) & (index.height == bucket.height))
    rows = rows[index.width[rows] == bucket.width]
    paths = [index.shard_paths[shard] for shard in np.unique(index.shard[rows])]

    def compare(prefix: str, passes: int, before: Callable[[], None]) -> dict[str, Any]:
        jobs, files = _jobs(bucket, float(index.fps[0]), np.tile(rows, passes)), passes * paths

        def loader() -> Cost:
            before()
            return _load(index, data, jobs)

        def tars() -> Cost:
            before()
            return _in_processes(words.workers, lambda n: _read_tars(files[n :: words.workers]))

        names = f"{prefix}_bytes_per_s", f"{prefix.replace('latent', 'tar')}_bytes_per_s", f"{prefix}_"
        return _compare(
            {"latents": loader, "tar files": tars}, words.rounds, passes * int(index.bytes[rows].sum()), names
        )

    return {
        "latent_bytes": int(index.bytes[rows[0]]),
        **compare("latent", 1, lambda: _forget(paths)),
        **compare("latent_memory", words.passes, lambda: None),
    }


def _forget(paths: list[Path]) -> None:
    """Have the system read these files from the disk the next time, where it can be told so."""
    for path in paths if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet cannot be forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_tars(paths: list[Path]) -> None:
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                file.read()


def _growth(words: DataWords, index: Index) -> int:
    """What one worker's own memory grew by from its ``WARM``-th clip to the largest after it, in bytes."""
    bucket = Bucket(words.frames, words.height, words.width)
    data = DataConfig(path=str(index.path), workers=1, worker_memory_mb=1 << 20)  # never replaced
    rows = _rows(words, index, bucket, data, words.opened)
    held: list[int] = []
    for n, _ in enumerate(decode(index, data, iter(_jobs(bucket, words.fps, rows))), start=1):
        if n * BATCH >= min(WARM, words.opened):
            held.append(_worker_memory())
    return max(held) - held[0]


def _worker_memory() -> int:
    """Bytes that the youngest of this process's descendants does not share: a keeper's worker."""
    youngest = max(psutil.Process().children(recursive=True), key=lambda process: process.pid)
    memory = youngest.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _rows(words: DataWords, index: Index, bucket: Bucket, data: DataConfig, count: int) -> Ints:
    """So many samples that fill the bucket, again from the first where there are fewer."""
    fits = eligible(index, bucket, fps=words.fps, data=data)
    if not len(fits):
        raise UserError(f"data={words.data}: no clip fills frames={words.frames} at fps={words.fps:g}")
    return np.resize(fits, count)


def _jobs(bucket: Bucket, fps: float, rows: Ints) -> list[Job]:
    jobs = []
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        jobs.append(Job(bucket, fps, part, np.full(len(part), 0.5), np.arange(len(part), dtype=np.int64)))
    return jobs


def _in_processes(count: int, work: Callable[[int], None]) -> Cost:
    """What it costs to have ``work(n)`` done in ``count`` forked processes.

    Raises:
        RuntimeError: one of them failed.
    """
    processes = [multiprocessing.get_context("fork").Process(target=_alone, args=(work, n)) for n in range(count)]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process of the bare loop failed; its traceback is above")
    return Cost(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _alone(work: Callable[[int], None], n: int) -> None:
    torch.set_num_threads(1)
    work(n)


def _render(folder: Path) -> Path:
    """Shards of a small rendered world."""
    clips, shards = folder / "clips", folder / "shards"
    for words in (
        ["-m", "data.synthetic", f"out={clips}", *WORLD],
        ["scripts/make_shards.py", f"input={clips}", f"output={shards}"],
    ):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return shards


def _store(folder: Path) -> Path:
    """Shards of random latents of ``LATENTS``."""
    folder.mkdir()
    bucket = LatentBucket(frames=LATENTS.frames, height=LATENTS.height, width=LATENTS.width, fps=16.0)
    about = Latents(
        autoencoder="none", channels=16, time=8, space=8, dtype="fp16", source="none", buckets=[bucket], windows=1,
        holdout_share=0.0,
    )  # fmt: skip
    writer, index, checks = ShardWriter(folder), IndexFile(), []
    for n in range(STORED):
        shape = about.shape(bucket.frames, bucket.height, bucket.width)
        media = pack(torch.randn(shape).half(), {}, about.autoencoder)
        info = ClipInfo(bucket.frames, bucket.fps, bucket.height, bucket.width)
        writer.add_media(f"clip-{n}", media, SUFFIX, ("txt", b"noise"), [Window(f"clip-{n}", "noise", info)])
        checks.append(check_of(media))
        if n % 16 == 15:
            add_shard(index, writer.close())
    sources = [((bucket.frames - 1) / bucket.fps, bucket.height, bucket.width)] * STORED
    index.latents = about.model_copy(update={"checks": checks, "sources": sources})
    (folder / INDEX).write_bytes(index.to_json())
    return folder
