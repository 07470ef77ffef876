"""The loader against what it stands on: decoding against a bare loop, latents against reading their files.

Both sides of each ratio have as many processes, each of one thread, and are timed from the start of the processes to
the last byte, one after the other, round by round.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from data.batch import Bucket
from data.buckets import Ints, eligible
from data.decode import ClipInfo
from data.index_file import INDEX, IndexFile, LatentBucket, Latents
from data.latents import SUFFIX, check_of, pack, refuse_latents
from data.shards import Index, add_shard, load_index, read_member
from data.video import HAS_DECORD
from data.workers import Job, decode
from data.writer import ShardWriter, Window
from lingen.bench.timing import Case, Seconds, interleave, ratio
from lingen.config import DataConfig
from lingen.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4  # samples of a micro-batch
WORLD = ("clips=48", "images=0", "size=320", "frames=49", "fps=24")
LATENTS = Bucket(257, 512, 512)  # 17 s: 4.3 MB a sample
STORED = 64  # samples of such latents
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
    clips: PositiveInt = 96  # that are decoded in each round
    rounds: PositiveInt = 5
    opened: PositiveInt = 1000  # clips that one worker opens while its memory is watched


def run(words: DataWords) -> dict[str, Any]:
    """Frames and bytes per second of the loader and of what it is compared with; what a worker's memory grew by."""
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        clips = load_index(words.data or _render(Path(folder)))
        refuse_latents(clips, f"data={words.data}")
        decoding = _decoding(words, clips)
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
    }


def _decoding(words: DataWords, index: Index) -> dict[str, Any]:
    """Frames/s of the loader, and of a bare loop over the same frames, which neither crops nor scales."""
    bucket = Bucket(words.frames, words.height, words.width)
    data = DataConfig(path=str(index.path), workers=words.workers)
    rows = _rows(words, index, bucket, data, words.clips)

    def loader() -> None:
        for _ in decode(index, data, _jobs(bucket, words.fps, rows)):
            pass

    def bare() -> None:
        _in_processes(words.workers, lambda n: _bare(index, words, rows[n :: words.workers]))

    seconds = interleave({"loader": Case(loader), "bare loop": Case(bare)}, words.rounds, _wall)
    frames = len(rows) * words.frames
    return {
        "bucket": str(bucket),
        "decoder": data.decoder,
        "bare_decoder": "decord" if HAS_DECORD else "pyav",
        "frames_per_s": _rate(seconds, "loader", frames),
        "raw_frames_per_s": _rate(seconds, "bare loop", frames),
        "ratio": round(ratio(seconds, "bare loop", "loader"), 3),
    }


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
    """Bytes/s of latents through the loader, and of the members of their tar files; both from the disk where the
    system can be told to forget files."""
    data = DataConfig(path=str(index.path), workers=words.workers)
    rows = np.arange(len(index), dtype=np.int64)
    fps = float(index.fps[0])
    bucket = Bucket(int(index.frames[0]), int(index.height[0]), int(index.width[0]))
    rows = rows[(index.frames == bucket.frames) & (index.height == bucket.height) & (index.width == bucket.width)]
    paths = [index.shard_paths[shard] for shard in np.unique(index.shard[rows])]

    def loader() -> None:
        for _ in decode(index, data, _jobs(bucket, fps, rows)):
            pass

    def forgotten(call: Callable[[], object]) -> float:
        _forget(paths)
        return _wall(call)

    def tars() -> None:
        _in_processes(words.workers, lambda n: _read_tars(paths[n :: words.workers]))

    seconds = interleave({"latents": Case(loader), "tar files": Case(tars)}, words.rounds, forgotten)
    size = int(index.bytes[rows].sum())
    return {
        "latent_bytes": int(index.bytes[rows[0]]),
        "latent_bytes_per_s": _rate(seconds, "latents", size),
        "tar_bytes_per_s": _rate(seconds, "tar files", size),
        "latent_ratio": round(ratio(seconds, "tar files", "latents"), 3),
    }


def _read_tars(paths: list[Path]) -> None:
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                file.read()


def _forget(paths: list[Path]) -> None:
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _growth(words: DataWords, index: Index) -> int:
    """What one worker's own memory grew by from its ``WARM``-th clip to the largest after it, in bytes."""
    bucket = Bucket(words.frames, words.height, words.width)
    data = DataConfig(path=str(index.path), workers=1, worker_memory_mb=1 << 20)  # never replaced
    rows = _rows(words, index, bucket, data, words.opened)
    held: list[int] = []
    for n, _ in enumerate(decode(index, data, _jobs(bucket, words.fps, rows)), start=1):
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


def _jobs(bucket: Bucket, fps: float, rows: Ints) -> Iterator[Job]:
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        yield Job(bucket, fps, part, np.full(len(part), 0.5), np.arange(len(part), dtype=np.int64))


def _in_processes(count: int, work: Callable[[int], None]) -> None:
    """``work(n)`` in ``count`` forked processes.

    Raises:
        RuntimeError: one of them failed.
    """
    processes = [multiprocessing.get_context("fork").Process(target=_alone, args=(work, n)) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process of the bare loop failed; its traceback is above")


def _alone(work: Callable[[int], None], n: int) -> None:
    torch.set_num_threads(1)
    work(n)


def _wall(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _rate(seconds: Seconds, name: str, amount: int) -> float:
    return round(amount / statistics.median(seconds[name]), 1)


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
