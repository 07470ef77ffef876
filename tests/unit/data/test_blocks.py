"""Blocks of shared memory: used again, never while somebody holds what lies in them."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch import Bucket
from data.blocks import SPARE, Block, Blocks, Maps
from data.shards import Index
from data.workers import Job, decode
from lingen.config import DataConfig


def handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_block_is_free_when_the_last_view_is_gone() -> None:
    blocks = Blocks()
    block = blocks.take(4096)
    lent = blocks.lend(block, 100)
    assert lent.shape == (100,) and lent.dtype == torch.uint8
    held = lent.view(2, 50)[1].numpy()
    del lent
    other = blocks.take(4096)
    assert other.number != block.number
    del held
    assert blocks.take(10) is block
    blocks.close()


def test_a_larger_job_makes_larger_blocks() -> None:
    blocks = Blocks()
    small, before = blocks.take(4096), handles()
    blocks.lend(small, 4096)
    large = blocks.take(8192)
    assert (small.size, large.size) == (4096, 8192) and handles() <= before + 1
    blocks.lend(large, 8192)
    assert blocks.take(1) is large
    blocks.close()


def test_no_more_are_kept_than_a_few_and_none_after_the_end() -> None:
    gc.collect()
    before, blocks = handles(), Blocks()
    lent = [blocks.lend(block, 8) for block in [blocks.take(4096) for _ in range(10)]]
    lent.clear()
    held = blocks.lend(blocks.take(4096), 8)
    assert handles() <= before + 2 * SPARE
    held.fill_(7)
    blocks.close()
    assert held.tolist() == [7] * 8
    del held
    assert handles() == before


def test_what_is_dropped_takes_no_memory_and_a_fork_drops_nothing() -> None:
    block = Block(0, 1 << 20)
    other = os.dup(block.handle)
    block.map[:5] = b"there"
    if not (child := os.fork()):
        block.drop()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and os.fstat(other).st_size == 1 << 20
    block.drop()
    assert os.fstat(other).st_size == 0
    os.close(other)


def test_a_worker_maps_a_block_once_and_forgets_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[int] = []
    make = mmap.mmap

    def counted(handle: int, size: int) -> mmap.mmap:
        mapped.append(size)
        return make(handle, size)

    monkeypatch.setattr("data.blocks.mmap.mmap", counted)
    blocks = [Block(n, 4096 * (n + 1)) for n in range(3)]
    mapped.clear()
    maps, before = Maps(room=2), handles()
    for n in (0, 1, 0, 1, 2, 0):
        pixels = maps.tensor(blocks[n].part(5 + n), os.dup(blocks[n].handle))
        pixels.fill_(n)
        assert pixels.shape == (5 + n,) and blocks[n].map[: 6 + n] == bytes([n] * (5 + n)) + b"\0"
    assert mapped == [4096, 8192, 12288, 4096] and handles() == before + 2
    for block in blocks:
        block.drop()


def test_batches_that_are_kept_stay_as_they_are(index: Index, data_config: Callable[..., DataConfig]) -> None:
    """Of several sizes, in turn; some are kept and some are not."""
    rows, sizes = np.flatnonzero(index.frames == 1), (8, 16, 4)
    jobs = [
        Job(Bucket(1, sizes[n % 3], sizes[n % 3]), 8.0, rows[[n % len(rows)]], np.zeros(1), np.arange(1))
        for n in range(60)
    ]
    alone = [batch.pixels for batch, _ in decode(index, data_config(workers=0), iter(jobs))]
    kept = [batch if n % 4 else None for n, (batch, _) in enumerate(decode(index, data_config(workers=2), iter(jobs)))]
    for pixels, batch in zip(alone, kept, strict=True):
        assert batch is None or (batch.pixels == pixels).all()
