"""Timings that can be compared on a machine that does other things too: interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Seconds = dict[str, list[float]]  # by case: seconds of one call, one value a round
Clock = Callable[[Callable[[], object]], float]  # runs something and says how many seconds it took


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


@dataclass(frozen=True)
class Case:
    """One thing to time; ``calls`` of it make one measurement, so that short ones are not lost in the clock."""

    call: Callable[[], object]
    calls: int = 1

    def repeated(self) -> None:
        """All calls of one measurement."""
        for _ in range(self.calls):
            self.call()


def interleave(cases: dict[str, Case], rounds: int, clock: Clock = cpu_seconds, *, warm_up: bool = True) -> Seconds:
    """Time every case once a round, so that a slow minute of the machine meets them all; round 0 warms up."""
    first = 0 if warm_up else 1
    seconds: Seconds = {name: [] for name in cases}
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases) * (rounds + 1 - first))
        for i in range(first, rounds + 1):
            for name, case in cases.items():
                progress.update(task, description=name)
                if i:
                    seconds[name].append(clock(case.repeated) / case.calls)
                else:
                    case.call()
                progress.advance(task)
    return seconds


def median(seconds: Seconds, name: str) -> float:
    """The median seconds of one call."""
    return statistics.median(seconds[name])


def ratio(seconds: Seconds, name: str, base: str) -> float:
    """The median over the rounds of one case's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
