"""Where a script's ``out`` goes: looked at before the work, so that hours of it never end at a wrong path."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lingen.errors import UserError


@contextmanager
def writing(out: str | Path, key: str = "out") -> Iterator[None]:
    """What the disk refuses inside becomes a ``UserError`` that names ``out``, the value of ``key``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{key}={out} cannot be written: {error.strerror or error}") from error


def make_folder(folder: Path, out: str | Path, key: str = "out") -> None:
    """Make ``folder``, where ``out``, the value of ``key``, is or will lie, and see that files can be made in it.

    Raises:
        UserError: they cannot.
    """
    with writing(out, key):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
