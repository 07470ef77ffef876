"""A rank that hangs says where, and ends: the job is started again instead of burning its time limit.

What cannot be seen from here, the hang of another rank, shows here too: this one waits for it in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

EXIT_HUNG = 76  # hung, and to be started again; the number beside lingen.dist's EXIT_PREEMPTED
LOOK_S = 5.0
GRACE_S = 10.0  # the other ranks, stuck in the same collective, write their stacks too before the first one ends
BACKSTOP_S = 30.0  # beyond the time in which the watchdog itself would have ended the process


class Watchdog:
    """Ends the process with ``EXIT_HUNG`` when no ``beat`` came for ``timeout_s`` seconds; 0: never.

    Before that it writes the stacks of all threads to hang-JOB-rankRANK-TIME.txt in ``folder`` and one line to stderr.
    A process that was stopped (by a shell's Ctrl-Z) has the whole time again when it goes on.

    The watch needs the interpreter, and a C call that hangs may keep it. So each look also sets a timer of
    faulthandler, which does without: where no look follows for ``timeout_s`` and more, it prints the stacks to stderr,
    and in a Slurm job ends the process (with code 1; it has no other). That one does count the time stopped: it ends
    nothing where somebody at a terminal may have stopped it, but a Slurm job that was suspended for longer than that.
    """

    def __init__(self, folder: Path, rank: int, timeout_s: float) -> None:
        self._folder, self._rank, self._timeout = folder, rank, timeout_s
        self._grace = min(GRACE_S, timeout_s / 2)
        self._every = min(LOOK_S, timeout_s / 4)
        self._last = (time.monotonic(), "starting")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout_s > 0:
            self._thread.start()

    def beat(self, doing: str) -> None:
        """A sign of life, and what comes next. Costs less than a microsecond."""
        self._last = (time.monotonic(), doing)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        seen, still, looked = self._last, 0.0, time.monotonic()
        backstop = self._timeout + self._grace + BACKSTOP_S
        while not self._stopped.is_set():
            faulthandler.dump_traceback_later(backstop, exit="SLURM_JOB_ID" in os.environ, file=2)  # sets it anew
            self._stopped.wait(self._every)
            now = time.monotonic()
            gap, looked = now - looked, now
            still += gap
            if self._last is not seen or gap > 2 * self._every:  # such a gap: this process was stopped
                seen, still = self._last, 0.0
            elif still >= self._timeout and not self._stopped.is_set():
                self._end(*seen)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, since: float, doing: str) -> None:
        """Report, give the other ranks the time to do so, and end."""
        # In a thread of its own: the file system may be what hangs.
        threading.Thread(target=self._report, args=(since, doing), name="watchdog-report", daemon=True).start()
        time.sleep(self._grace)
        os._exit(EXIT_HUNG)

    def _report(self, since: float, doing: str) -> None:
        now, age = datetime.now(UTC), time.monotonic() - since
        job = os.environ.get("SLURM_JOB_ID")
        parts = ("hang", *([job] if job else []), f"rank{self._rank:05d}", now.strftime("%Y%m%dT%H%M%SZ"))
        path = self._folder / f"{'-'.join(parts)}.txt"
        who = f"rank {self._rank} ({socket.gethostname()} pid {os.getpid()})"
        what = f"{who} has shown no life for {age:.1f} s: {doing}"
        os.write(2, f"{what}; stacks in {path}; exit code {EXIT_HUNG}\n".encode())  # sys.stderr may be what hangs
        self._folder.mkdir(parents=True, exist_ok=True)  # a start may hang before the run has one
        with path.open("w") as stream:
            stream.write(f"{now:%Y-%m-%d %H:%M:%S} UTC: {what}\n\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
