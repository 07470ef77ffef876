"""A worker that may die: a process in which samples are made, and a keeper beside it that replaces it.

    parent  --job, memory-->  keeper  --job, memory-->  worker

The parent takes a block of shared memory for each job (``data.blocks``) and passes it on; the worker fills it in,
sample after sample, notes which one it is at, and says at the end what came of each. The keeper decodes nothing, so it
outlives what kills a worker. It blames the sample that a worker died at, tries it once more alone in a new worker, and
calls it a hole if that dies too: the same sample, each time and on each machine. A worker that holds too much memory is
replaced between two samples.

Both are forks. The keeper is forked when the loader starts and has one thread, so that it can fork workers safely later
on, when the parent has threads of its own.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import multiprocessing
import os
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Generic, TypeVar

import psutil
import torch

from data.blocks import Block, Maps, Part
from data.video import BadSample
from lingen.errors import UserError

J = TypeVar("J")
Outcome = BadSample | None  # of one sample: why it is a hole
Work = Callable[[J, int, torch.Tensor], None]  # make sample n of a job in this memory (flat, uint8)

# Slurm and Ctrl-C send these to every process of a job; the workers must outlive the step that is saved.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ALONE_S = 2.0  # how often a keeper looks whether its parent is still there
CRASHED = "decoder crashed"
PR_SET_PDEATHSIG = 1
PLACE = struct.Struct("q")
FORK = multiprocessing.get_context("fork")
CLOSED = (EOFError, BrokenPipeError, ConnectionResetError)  # the other end; any other error is said


class WorkerError(Exception):
    """A worker met what is no fault of a sample: a bug, or the end of its keeper."""


Failure = UserError | WorkerError  # of the whole job


class Keeper(Generic[J]):
    """The parent's end. Jobs are done in the order in which they were sent.

    Args:
        work: makes one sample; it may raise ``BadSample``, which makes a hole, and anything else, which ends the job.
        memory_mb: a worker that has gained so much since its start is replaced.
        room: blocks of memory that a worker keeps in reach.
    """

    def __init__(self, work: Work[J], memory_mb: int, room: int) -> None:
        self._connection, self._process = start_process(_keep, work, memory_mb << 20, room)

    def send(self, job: J, places: list[int], block: Block, used: int) -> None:
        """Have these samples of a job made in the first bytes of a block."""
        self._connection.send((places, block.part(used)))
        self._connection.send(job)
        send_handle(self._connection, block.handle, self._process.pid)

    def receive(self) -> dict[int, Outcome]:
        """What came of the samples of the oldest job.

        Raises:
            LostShard, UserError: what ``work`` raised.
            WorkerError: it raised something else, with its traceback; or the keeper itself was killed.
        """
        try:
            result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(f"the process that keeps a data worker was killed ({error})") from error
        if isinstance(result, Exception):
            raise result
        outcomes: dict[int, Outcome] = result
        return outcomes

    def close(self) -> None:
        """End both processes, also in the middle of a job."""
        self._connection.close()
        self._process.kill()  # and with it the worker
        self._process.join()


def start_process(target: Callable[..., None], *words: Any) -> tuple[Connection, BaseProcess]:
    """Fork a process that runs target(its end of a pipe, *words, the parent's id) and ignores ``JOB_SIGNALS``."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_ignoring_signals, args=(target, theirs, *words, os.getpid()))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # until it ignores them
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours, process


def _ignoring_signals(target: Callable[..., None], *words: Any) -> None:
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
    target(*words)


def _keep(connection: Connection, work: Work[J], limit: int, room: int, parent: int) -> None:
    """The keeper's whole life: it ends with its parent."""
    worker = _Worker(connection, work, limit, room, parent)
    try:
        while True:
            wait_for(connection, parent)
            (places, part), job = connection.recv(), connection.recv_bytes()  # which is the worker's to unpack
            handle = recv_handle(connection)
            connection.send(_do(worker, job, places, part, handle))
            os.close(handle)
    except CLOSED:
        pass  # by the parent, or with it: the way in which a keeper's life ends
    finally:
        worker.end()


def _do(worker: _Worker[J], job: bytes, places: list[int], part: Part, handle: int) -> dict[int, Outcome] | Exception:
    """What came of each sample, or the error that ended the job."""
    outcomes: dict[int, Outcome] = {}
    blamed: int | None = None  # the sample that the worker before this one died at
    while todo := [n for n in places if n not in outcomes]:
        made = worker.make(job, todo if blamed is None else [blamed], part, handle)
        for n, outcome in made.items():
            if isinstance(outcome, Failure):
                return outcome
            outcomes[n] = outcome
        if worker.died is None:
            blamed = None
        elif worker.at == blamed:
            outcomes[worker.at], blamed = BadSample(CRASHED, f"{worker.died}, twice"), None
        else:
            print(f"a data worker died ({worker.died}); its sample is tried again alone", file=sys.stderr, flush=True)
            blamed = worker.at
    return outcomes


class _Worker(Generic[J]):
    """The keeper's end of a worker. If that died in the last ``make``, ``died`` says of what and ``at`` at which
    sample, and a new one stands ready."""

    def __init__(self, outer: Connection, work: Work[J], limit: int, room: int, parent: int) -> None:
        self._outer, self._parent, self._words = outer, parent, (work, limit, room)
        self.died: str | None = None
        self._at = mmap.mmap(-1, PLACE.size)  # which the worker writes
        self._start()

    @property
    def at(self) -> int:
        return int(PLACE.unpack(self._at)[0])

    def _start(self) -> None:
        self._connection, theirs = FORK.Pipe()
        ends = (self._outer, self._connection)
        self._process: BaseProcess = FORK.Process(target=_work, args=(theirs, ends, self._at, *self._words))
        self._process.start()
        theirs.close()

    def make(self, job: bytes, places: list[int], part: Part, handle: int) -> dict[int, Outcome | Failure]:
        """The outcomes of these samples; fewer where the worker ends before, and none where it dies."""
        self.died = None
        PLACE.pack_into(self._at, 0, places[0])
        try:
            self._connection.send((places, part))
            self._connection.send_bytes(job)
            send_handle(self._connection, handle, self._process.pid)
            wait_for(self._connection, self._parent)
            outcomes: dict[int, Outcome | Failure]
            outcomes, ends = self._connection.recv()
            if ends:
                self.end()
                self._start()
            return outcomes
        except (EOFError, OSError):
            if os.getppid() != self._parent:
                raise
            self._process.join()
            code = self._process.exitcode or 0
            self.died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.end()
            self._start()
            return {}

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()
        self._process.close()


def wait_for(connection: Connection, parent: int) -> None:
    """Until there is something to read.

    Raises:
        EOFError: the process ``parent`` is not this one's parent any more.
    """
    waiter = select.poll()  # a connection's own way to wait takes ten times as long to set up
    waiter.register(connection, select.POLLIN)
    while not waiter.poll(1000 * ALONE_S):
        if os.getppid() != parent:
            raise EOFError


def _work(
    connection: Connection, keepers: Sequence[Connection], at: mmap.mmap, work: Work[J], limit: int, room: int
) -> None:
    """The worker's whole life: it ends with its keeper."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also out of a decoder that hangs
    for end in keepers:
        end.close()
    torch.set_num_threads(1)
    gc.freeze()  # what the parent had stays where it is, and shared
    process, maps, full = psutil.Process(), Maps(room), False
    before = _held(process)
    while not full:
        try:
            (places, part), job = connection.recv(), connection.recv()
            pixels = maps.tensor(part, recv_handle(connection))
        except CLOSED:
            return
        outcomes: dict[int, Outcome | Failure] = {}
        for n in places:
            PLACE.pack_into(at, 0, n)
            outcomes[n] = make(work, job, n, pixels)
            full = _held(process) - before > limit
            if full or isinstance(outcomes[n], Failure):
                break
        connection.send((outcomes, full))


def make(work: Work[J], job: J, n: int, pixels: torch.Tensor) -> Outcome | Failure:
    """One sample, and what came of it."""
    try:
        work(job, n, pixels)
    except (BadSample, UserError) as known:
        return known
    except Exception:
        return WorkerError(traceback.format_exc())
    return None


def _held(process: psutil.Process) -> int:
    """Bytes of memory that a process does not share."""
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))
