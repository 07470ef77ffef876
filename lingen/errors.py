"""Errors that the user can mend: one line that names the key, the value and what would be right; exit code 2."""

from __future__ import annotations

import difflib
import os
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 130  # as a shell says of what Ctrl-C ended


class UserError(Exception):
    """Something that the user asked for cannot be done. The message is shown as one line, without a traceback."""


class LocalError(UserError):
    """A ``UserError`` of this process alone. Others are the same on every rank, and rank 0 says them for all."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint for a misspelt name: ``"; did you mean 'lr'?"``, else the known names, else nothing."""
    known = sorted(candidates)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's main. A ``UserError`` becomes one line on stderr and exit code 2; the line goes into the file that
    LINGEN_REASON names too, where a job's script does so. Ctrl-C ends in one line too, and exit code 130."""
    try:
        code = main()
    except KeyboardInterrupt:
        if _speaks():
            print("stopped", file=sys.stderr, flush=True)
        sys.exit(EXIT_STOPPED)
    except UserError as error:
        reason = " ".join(str(error).split())
        _leave_reason(reason)  # every rank, since the others may be killed before they come to it
        if _speaks() or isinstance(error, LocalError):
            print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(code or 0)


def _speaks() -> bool:
    """Whether this process is the only one, or rank 0, which speaks for all."""
    rank = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if "SLURM_STEP_ID" in os.environ else None)
    return rank in (None, "0")


def _leave_reason(reason: str) -> None:
    """For whoever decides whether to start again: with several ranks, ``srun``'s exit code alone does not tell."""
    named = os.environ.get("LINGEN_REASON")
    if named is None or (path := Path(named)).exists():
        return
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        aside.write_text(f"{reason}\n")
        aside.replace(path)
    except OSError as error:
        print(f"LINGEN_REASON={named} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
