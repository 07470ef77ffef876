"""Work in many processes: in order, and a process that dies costs one piece of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count

import pytest

from data.collect.pool import AHEAD, Lost, ordered


def slow_first(number: int) -> tuple[int, int]:
    time.sleep(0.2 if number == 0 else 0.0)
    return number, os.getpid()


def fragile(number: int) -> int:
    if number in (2, 7):
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 4:
        os._exit(3)
    return number


def endless(number: int) -> int:
    time.sleep(60.0 if number == 1 else 0.0)
    return number


def broken(number: int) -> int:
    raise KeyError(number)


def test_results_come_in_order_from_several_processes() -> None:
    results = list(ordered(slow_first, range(40), workers=3, seconds=30))
    assert [number for number, _ in results] == list(range(40))
    pids = {pid for _, pid in results}
    assert 2 <= len(pids) <= 3 and os.getpid() not in pids


def test_a_worker_that_dies_takes_one_piece_with_it() -> None:
    results = list(ordered(fragile, range(10), workers=2, seconds=30))
    lost = {n: result for n, result in enumerate(results) if isinstance(result, Lost)}
    assert lost == {
        2: Lost("decoder crashed", "SIGSEGV"),
        4: Lost("decoder crashed", "exit code 3"),
        7: Lost("decoder crashed", "SIGSEGV"),
    }
    assert [result for result in results if not isinstance(result, Lost)] == [0, 1, 3, 5, 6, 8, 9]


def test_a_worker_that_takes_too_long_is_replaced() -> None:
    assert list(ordered(endless, range(3), workers=1, seconds=0.5)) == [0, Lost("decoder hung", "ended after 0.5 s"), 2]


def test_an_error_of_ours_is_no_lost_piece() -> None:
    with pytest.raises(RuntimeError, match="a worker failed: KeyError: 5"):
        list(ordered(broken, [5], workers=1, seconds=30))


def test_no_process_outlives_the_work_and_no_more_is_read_than_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in count(1):
            taken.append(number)
            yield number

    before = set(multiprocessing.active_children())
    with closing(ordered(slow_first, items(), workers=2, seconds=30)) as results:
        assert next(results)[0] == 1  # type: ignore[index]
    assert len(taken) <= 2 * AHEAD + 2
    assert set(multiprocessing.active_children()) <= before
