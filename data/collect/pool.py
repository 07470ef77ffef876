"""Work spread over processes, its results in order. A worker that dies takes one piece of work with it, not the run."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 32  # results a worker may be ahead of the oldest one that is missing


class Lost(NamedTuple):
    """In the place of a result: the worker died, or was ended after too long."""

    reason: str
    detail: str


def ordered(
    task: Callable[[Item], Result], items: Iterable[Item], *, workers: int, seconds: float
) -> Generator[Result | Lost, None, None]:
    """``task`` of each item, in the order of the items, from ``workers`` processes.

    They are forked from a server that has imported what decodes, so that a new one is there in milliseconds. They end
    with the generator, and where this process dies. An exception in ``task`` ends the run; a worker that dies, or takes
    longer than ``seconds``, is replaced, and its result is ``Lost``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.collect.examine"])
    team: list[_Worker[Item, Result]] = []
    results: dict[int, Result | Lost] = {}
    todo, given = iter(enumerate(items)), 0
    try:
        team += [_Worker(context, task, seconds) for _ in range(workers)]
        handed_out = 0
        while True:
            for place, worker in enumerate(team):
                if worker.number is None and given < handed_out + AHEAD * workers:
                    number, item = next(todo, (None, None))
                    if number is None:
                        break
                    given += 1
                    if not worker.give(number, item):  # it died while it had nothing to do
                        team[place] = _Worker(context, task, seconds)
                        team[place].give(number, item)
            if handed_out in results:
                yield results.pop(handed_out)
                handed_out += 1
            elif any(worker.number is not None for worker in team):
                for place, number, result in _wait(team):
                    results[number] = result
                    if isinstance(result, Lost):
                        team[place].end()
                        team[place] = _Worker(context, task, seconds)
            else:
                return
    finally:
        for worker in team:
            worker.end()


class _Worker(Generic[Item, Result]):
    """A process, and the one item that it has."""

    def __init__(self, context: Any, task: Callable[[Item], Result], seconds: float) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(task, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None
        self.seconds, self.deadline = seconds, 0.0

    def give(self, number: int, item: Any) -> bool:
        """Whether it could be given."""
        try:
            self.connection.send(item)
        except OSError:
            return False
        self.number, self.deadline = number, time.monotonic() + self.seconds
        return True

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _wait(team: list[_Worker[Any, Any]]) -> Iterator[tuple[int, int, Any]]:
    """(place in the team, number, result) of each that is done or lost; waits for one at least."""
    busy = {worker.connection: (place, worker) for place, worker in enumerate(team) if worker.number is not None}
    patience = min(worker.deadline for _, worker in busy.values()) - time.monotonic()
    ready = wait(list(busy), timeout=max(0.0, patience))
    for connection in ready:
        assert isinstance(connection, Connection)
        place, worker = busy[connection]
        yield place, *_done(worker, _receive(worker))
    now = time.monotonic()
    for place, worker in busy.values():
        if worker.number is not None and worker.deadline <= now:
            yield place, *_done(worker, Lost("decoder hung", f"ended after {worker.seconds:g} s"))


def _done(worker: _Worker[Any, Any], result: Any) -> tuple[int, Any]:
    number, worker.number = worker.number, None
    assert number is not None
    return number, result


def _receive(worker: _Worker[Any, Any]) -> Any:
    try:
        result, problem = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return Lost("decoder crashed", name)
    if problem is not None:
        raise RuntimeError(f"a worker failed: {problem}")
    return result


def _serve(task: Callable[[Any], Any], connection: Connection) -> None:
    """Work until the other end is closed. Ctrl-C is for the process that gives the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        answer: tuple[Any, str | None]
        try:
            answer = task(item), None
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"
        try:
            connection.send(answer)
        except OSError:
            return
