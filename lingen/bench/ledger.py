"""Who spends the time of a run: every function that is named here charges what it takes to its own account."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

Seconds = dict[str, float]  # by account
REST = "loop"  # the account of all that no function was named for


class Ledger:
    """A stopwatch that runs for one account at a time; a context manager that puts the functions back at its end.

    A named function that calls another one stops for it: each second is charged once. For one thread.

    Args:
        clock: ``time.process_time`` or ``time.perf_counter``.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self._spent: Seconds = defaultdict(float)
        self._account, self._since = REST, clock()
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in reversed(self._replaced):
            setattr(owner, name, original)

    def charge(self, owner: Any, name: str, account: str) -> None:
        """From now on ``owner.name`` (a function of a class or module) is timed for ``account``; of a generator
        function, every step is."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            value = self._run(account, lambda: original(*args, **kwargs))
            if isinstance(value, Iterator):
                return self._each(account, value)
            return value

        self.replace(owner, name, timed)

    def replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Put ``function`` in the place of ``owner.name`` until the end."""
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def turn(self) -> Seconds:
        """What each account took since the last turn, or the beginning."""
        self._switch(self._account)
        spent, self._spent = dict(self._spent), defaultdict(float)
        return spent

    def _run(self, account: str, call: Callable[[], Any]) -> Any:
        before = self._switch(account)
        try:
            return call()
        finally:
            self._switch(before)

    def _each(self, account: str, values: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (value := self._run(account, lambda: next(values, end))) is not end:
            yield value

    def _switch(self, account: str) -> str:
        """Charge what went by, and run for ``account``; returns the one before."""
        now = self._clock()
        self._spent[self._account] += now - self._since
        self._since, before = now, self._account
        self._account = account
        return before
