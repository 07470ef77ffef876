"""Memory that the loader's processes share, used again and again.

A page of new memory is cleared by the system and mapped into each process that touches it, which costs as much as
filling it does. So a block that was lent comes back when the last tensor in it is gone, and serves another job.
"""

from __future__ import annotations

import itertools
import mmap
import os
import sys
import tempfile
import weakref
from collections import deque
from typing import NamedTuple

import torch

SPARE = 2  # blocks that are kept although no job waits for them


class Part(NamedTuple):
    """The first ``used`` bytes of a block, as other processes are told of it, beside its handle."""

    number: int
    size: int
    used: int


class Block:
    """So many bytes of memory, of any content, without a name that anyone would have to remove."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size, self.handle, self._owner = number, size, _anonymous_file(size), os.getpid()
        self.map = mmap.mmap(self.handle, size)

    def part(self, used: int) -> Part:
        return Part(self.number, self.size, used)

    def drop(self) -> None:
        """Give the memory back, also what workers have mapped of it. Nobody may use it any more."""
        if os.getpid() == self._owner:  # a fork has no say
            os.truncate(self.handle, 0)
            os.close(self.handle)


class Blocks:
    """A loader's blocks. All are as large as the largest job: what a smaller one does not touch takes no memory."""

    def __init__(self) -> None:
        self._size, self._numbers, self._open = 0, itertools.count(), True
        self._free: deque[Block] = deque()  # another thread may put one in at any time

    def take(self, size: int) -> Block:
        """A block of at least so many bytes; ``lend`` makes it free again, ``Block.drop`` ends it."""
        self._size = max(self._size, size)
        while self._free:
            block = self._free.popleft()
            if block.size == self._size and len(self._free) < SPARE:
                return block
            block.drop()
        return Block(next(self._numbers), self._size)

    def lend(self, block: Block, used: int) -> torch.Tensor:
        """Its first bytes, (used,) uint8. When no tensor lies in them any more, the block is free."""
        view = memoryview(block.map)[:used]
        weakref.finalize(view, self._back, block).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def close(self) -> None:
        """Drop all blocks; those that are lent, when they come back."""
        self._open = False
        self._drop()

    def _back(self, block: Block) -> None:
        self._free.append(block)
        if not self._open:
            self._drop()

    def _drop(self) -> None:
        while self._free:
            self._free.popleft().drop()


class Maps:
    """A worker's view of the blocks that it was told of, at most ``room`` of them."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._maps: dict[int, torch.Tensor] = {}  # by number, the one used last at the end

    def tensor(self, part: Part, handle: int) -> torch.Tensor:
        """(used,) uint8. The handle is closed."""
        whole = self._maps.pop(part.number, None)
        if whole is None:
            whole = torch.frombuffer(mmap.mmap(handle, part.size), dtype=torch.uint8)
        os.close(handle)
        self._maps[part.number] = whole
        if len(self._maps) > self._room:
            del self._maps[next(iter(self._maps))]
        return whole[: part.used]


def _anonymous_file(size: int) -> int:
    if sys.platform == "linux":
        handle = os.memfd_create("lingen-batch")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.truncate(handle, size)
    return handle
