"""Timings that can be compared on a machine that does other things too: process CPU time, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Case:
    """One thing to time; ``calls`` of it make one measurement, so that short ones are not lost in the clock."""

    call: Callable[[], object]
    calls: int = 1


Seconds = dict[str, list[float]]  # by case: CPU seconds of one call, one value a round


def interleave(cases: dict[str, Case], rounds: int) -> Seconds:
    """Time every case once a round, so that a slow minute of the machine meets them all; round 0 warms up."""
    seconds: Seconds = {name: [] for name in cases}
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases) * (rounds + 1))
        for i in range(rounds + 1):
            for name, case in cases.items():
                progress.update(task, description=name)
                calls = case.calls if i else 1
                start = time.process_time()
                for _ in range(calls):
                    case.call()
                elapsed = (time.process_time() - start) / calls
                if i:
                    seconds[name].append(elapsed)
                progress.advance(task)
    return seconds


def median(seconds: Seconds, name: str) -> float:
    """The median CPU seconds of one call."""
    return statistics.median(seconds[name])


def ratio(seconds: Seconds, name: str, base: str) -> float:
    """The median over the rounds of one case's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
