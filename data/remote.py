"""Files that lie elsewhere: on a web server, in an object store, or at the other end of a command.

A base names where a folder of shards is:

    https://HOST/FOLDER, s3://BUCKET/FOLDER, ...   whatever fsspec knows; a query (?sig=...) is kept behind each name
    pipe:aws s3 cp s3://BUCKET/FOLDER/{} -         a command that writes the file {} to its standard output; no shell
                                                   sees it
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from lingen.errors import UserError

# Seconds before a transfer is tried again that brought nothing; each that brought something starts anew.
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
TIMEOUT_S = 30.0  # without a byte
SMALLEST_PART, FIRST_PART, LARGEST_PART = 1 << 16, 1 << 20, 1 << 25  # bytes of one request
FULL = (errno.ENOSPC, errno.EDQUOT)
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


class Unreachable(Exception):
    """A file could not be brought, also after some pauses."""


def is_remote(path: str | Path) -> bool:
    """Whether this is a base, and no folder."""
    return bool(re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", str(path)))


def shown(base: str) -> str:
    """A base as it may stand in a log: without passwords and signatures."""
    if base.startswith("pipe:"):
        return f"pipe:{base[5:].split()[0]} ..." if base[5:].split() else base
    parts = urlsplit(base)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True)
class Source:
    """A base, checked. Safe to use on both sides of a fork."""

    base: str

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: a library is missing for it, or a command has no place for the name.
        """
        if not self.base.startswith("pipe:"):
            self._filesystem  # noqa: B018
        elif not any("{}" in word for word in self._words[1:]):
            raise UserError(
                f"data.path={shown(self.base)}: the command names no file; write {{}} where the file's name belongs"
            )

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            Unreachable: there is none, or it cannot be brought, also after some pauses.
        """
        problem = ""
        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            try:
                if self.base.startswith("pipe:"):
                    return subprocess.run(
                        self._command(name),
                        stdin=subprocess.DEVNULL,
                        capture_output=True,
                        check=True,
                        timeout=TIMEOUT_S,
                    ).stdout
                content: bytes = self._filesystem.cat_file(self.url(name))
                return content
            except Exception as error:
                problem = _what(error)
                if isinstance(error, FileNotFoundError):
                    break
        raise Unreachable(f"{shown(self.url(name))}: {problem}")

    def download(self, name: str, size: int, to: Path) -> None:
        """Write a file of ``size`` bytes to ``to``. What was brought before a connection broke is kept, where the
        server can send parts.

        Raises:
            Unreachable: also after some pauses.
        """
        done, failures, part = 0, 0, FIRST_PART
        while done < size:
            try:
                if self.base.startswith("pipe:"):
                    done = _run(self._command(name), to, size)
                else:
                    done = self._bring(name, to, done, min(size, done + part), size)
                failures, part = 0, min(2 * part, LARGEST_PART)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise Unreachable(
                        f"{to.parent} is full; lower data.cache_gb, or set data.cache_dir to another disk"
                    ) from error
                if failures == len(PAUSES):
                    raise Unreachable(f"{shown(self.url(name))}: {_what(error)}") from error
                if not failures:
                    patience = f"trying again for {sum(PAUSES):.0f} s"
                    print(f"{shown(self.url(name))}: {_what(error)}; {patience}", file=sys.stderr, flush=True)
                time.sleep(PAUSES[failures])
                failures, part = failures + 1, max(part // 4, SMALLEST_PART)

    def _bring(self, name: str, to: Path, begin: int, end: int, size: int) -> int:
        """Write the bytes from ``begin`` to ``end``, or the whole file where a server sends that; returns where the
        file is whole up to."""
        content = self._filesystem.cat_file(self.url(name), start=begin, end=end)
        if len(content) == size:  # ranges are not for all servers
            begin = 0
        elif len(content) != end - begin:
            raise OSError(f"{len(content)} bytes came where {end - begin} were asked for")
        with to.open("r+b" if to.exists() else "wb") as file:
            file.seek(begin)
            file.write(content)
        return begin + len(content)

    def url(self, name: str) -> str:
        """Of one file."""
        if self.base.startswith("pipe:"):
            return f"{self.base.rstrip('/')}/{name}"
        parts = urlsplit(self.base)
        if parts.scheme.lower() in ("http", "https"):
            return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
        return f"{self.base.rstrip('/')}/{name}"

    def _command(self, name: str) -> list[str]:
        return [word.replace("{}", name) for word in self._words]

    @cached_property
    def _words(self) -> list[str]:
        try:
            return shlex.split(self.base[5:])
        except ValueError as error:
            raise UserError(
                f"data.path={shown(self.base)}: the command cannot be split into words ({error})"
            ) from error

    @property
    def _filesystem(self) -> Any:
        """Raises:
        UserError: a library is missing.
        """
        scheme = urlsplit(self.base).scheme.lower()
        try:
            return _filesystem(scheme, os.getpid())
        except ImportError as error:
            package = PACKAGES.get(scheme, f"fsspec[{scheme}]")
            raise UserError(
                f"data.path={shown(self.base)}: {scheme}:// needs a library that is missing: pip install {package}"
            ) from error
        except ValueError as error:
            raise UserError(f"data.path={shown(self.base)}: nothing can read {scheme}://") from error


@lru_cache
def _filesystem(scheme: str, _process: int) -> Any:
    """One a process: its connections and its thread do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    return fsspec.filesystem(scheme, skip_instance_cache=True, **options)


def _run(command: list[str], to: Path, size: int) -> int:
    """Let a command write a file; returns its size."""
    with to.open("r+b" if to.exists() else "wb") as file:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file) as process:
            written, since = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(0.02)
                if written != (written := file.tell()):  # the command moves the place of both
                    since = time.monotonic()
                elif time.monotonic() - since > TIMEOUT_S:
                    process.kill()
                    raise TimeoutError
        written = file.tell()
    if process.returncode:
        raise OSError(f"the command ended with code {process.returncode}")
    if written != size:
        raise OSError(f"the command wrote {written} bytes of {size}")
    return size


def _what(error: Exception) -> str:
    """An error in words, without the address, which may hold a signature."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return f"the server answered {status}"
    if isinstance(error, TimeoutError):
        return f"nothing came for {TIMEOUT_S:g} s"
    if isinstance(error, subprocess.CalledProcessError):
        return f"the command ended with code {error.returncode}"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if type(error) is OSError and error.args and isinstance(error.args[0], str):
        return error.args[0]
    said = error.strerror if isinstance(error, OSError) else None
    return said or f"the connection broke ({type(error).__name__})"
