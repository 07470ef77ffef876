"""A run folder has one writer: the process that holds its lease.json.

The holder rewrites the file's beat in place, every few seconds. In place, because that can neither overwrite a
successor's file, which is another one, nor fail on a full disk, where a new file would.

A holder whose end is known is succeeded at once; of any other the beat is watched. Its successor is whoever creates
.lease-TOKEN.next, which can happen once: it then renames that file to lease.json. One that died on the way is succeeded
in the same manner, so the files form a chain, whose end is the holder. Files are created whole, aside, and linked to
their name, which fails where the name is taken, also on NFS.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from lingen.errors import UserError
from lingen.files import rename
from lingen.model_config import Section

LEASE = "lease.json"
BEAT_S = 5.0
EXPIRY_S = 30.0  # a beat that stands still for so long, by the watcher's clock, is a dead one's


class Holder(Section):
    """Who writes a run: the content of lease.json."""

    token: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    host: str
    boot: str  # id of the machine's boot; empty where the system has none
    namespace: str  # of process ids: a container has its own
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    started: str  # the process's start, in ticks since the boot: an id may come again
    job: str | None  # Slurm's
    restart: int  # how often Slurm has requeued that job
    since: str
    beat: str = f"{0:010d}"  # of one width, so that it is written over in place

    def content(self, beat: int) -> bytes:
        """The file's bytes; as many for each beat."""
        return self.model_copy(update={"beat": f"{beat:010d}"}).model_dump_json(indent=1).encode()

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"{self.host} pid {self.pid}{job}, since {self.since}"


@dataclass(frozen=True)
class Found:
    """A lease as it was read. A damaged one is of a holder unknown."""

    path: Path
    raw: bytes

    @property
    def holder(self) -> Holder | None:
        """Who wrote it; None where it cannot be understood."""
        try:
            return Holder.model_validate_json(self.raw)
        except ValidationError:
            return None

    @property
    def next(self) -> Path:
        """What its successor creates."""
        token = self.holder.token if self.holder else hashlib.sha256(self.raw).hexdigest()[:32]
        return self.path.with_name(f".lease-{token}.next")

    def __str__(self) -> str:
        return str(self.holder) if self.holder else f"a holder unknown ({self.path} is damaged)"


class Lease:
    """What makes this process the run folder's writer, from ``take`` to ``release``."""

    def __init__(self, path: Path, me: Holder, descriptor: int) -> None:
        self._path, self._me, self._descriptor = path, me, descriptor
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, run_folder: Path) -> Lease:
        """Become the writer of ``run_folder``, which is made where it is missing. May wait for ``EXPIRY_S``.

        Raises:
            UserError: another process is, or the folder cannot be written.
        """
        me = myself()
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            return cls(run_folder / LEASE, me, _acquire(run_folder / LEASE, me))
        except OSError as error:
            raise UserError(f"{run_folder} cannot hold a lease: {error.strerror}; name a folder that can") from error

    def check(self) -> None:
        """Return where this process is still the writer; called before anything is published.

        Raises:
            UserError: it is no longer, or cannot say so to others.
        """
        try:
            there = read(self._path)
        except OSError as error:
            raise UserError(f"{self._path} cannot be read: {error.strerror}; nothing more is written") from error
        if there is None or there.holder is None or there.holder.token != self._me.token:
            to = there or f"nobody: {self._path} is gone"
            raise UserError(f"{self._path.parent}: lost the lease to {to}; nothing more is written")
        if not self._thread.is_alive():
            raise UserError(f"{self._path}: the thread that renews the lease has died; its error was printed above")

    def release(self) -> None:
        """Let the next one in. A lease that is another's by now stays."""
        self._stopped.set()
        self._thread.join(BEAT_S)  # no longer: it may hang in a file system that is gone
        try:
            there = read(self._path)
            if there is not None and there.holder is not None and there.holder.token == self._me.token:
                self._path.unlink()
        except OSError as error:
            _say(f"{self._path} cannot be removed: {error.strerror}; the next start waits for {EXPIRY_S:g} s")

    def _beat(self) -> None:
        beat, failing = 0, False
        try:
            while not self._stopped.wait(BEAT_S):
                beat += 1
                try:
                    os.pwrite(self._descriptor, self._me.content(beat), 0)
                    os.fsync(self._descriptor)
                    failing = False
                except OSError as error:  # a passing one must not cost the lease
                    if not failing:
                        _say(f"{self._path} cannot be renewed: {error.strerror}; trying on")
                    failing = True
        finally:
            os.close(self._descriptor)


def myself() -> Holder:
    """This process, with a new token."""
    return Holder(
        token=secrets.token_hex(16),
        host=socket.gethostname(),
        boot=_text(Path("/proc/sys/kernel/random/boot_id")),
        namespace=_link(Path("/proc/self/ns/pid")),
        pid=os.getpid(),
        started=_state_and_start(os.getpid())[1],
        job=os.environ.get("SLURM_JOB_ID"),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def read(path: Path) -> Found | None:
    """The lease at ``path``; None where there is none."""
    try:
        return Found(path, path.read_bytes())
    except FileNotFoundError:
        return None


def _acquire(path: Path, me: Holder) -> int:
    """Make ``path`` ours. Returns the open file.

    Raises:
        UserError: a living process holds it.
    """
    while True:
        descriptor = _create(path, me)
        if descriptor is not None:
            return descriptor
        chain = _chain(path)
        if not chain and path.is_symlink():  # neither a lease nor a name for one
            raise OSError(errno.ENOENT, f"{path.name} is a link that leads nowhere")
        if not chain or not _has_ended(chain[-1], me):
            continue  # released, or another's by now
        claim = chain[-1].next
        descriptor = _create(claim, me)
        if descriptor is None:
            continue  # another was quicker
        if _chain(path)[:-1] == chain:  # nobody has moved since we judged; from here on nobody else can
            rename(claim, path)
            for dead in chain[1:]:
                dead.path.unlink(missing_ok=True)
            return descriptor
        claim.unlink(missing_ok=True)
        os.close(descriptor)


def _create(path: Path, me: Holder) -> int | None:
    """Create ``path`` with all of our content, and keep it open; None where it exists."""
    aside = path.with_name(f".lease-{me.token}")
    descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if os.write(descriptor, me.content(0)) < len(me.content(0)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
        try:
            os.link(aside, path)
        except FileExistsError:
            if aside.stat().st_nlink == 1:  # 2: it was ours, and only NFS's answer was lost
                os.close(descriptor)
                return None
        return descriptor
    except OSError:
        os.close(descriptor)
        raise
    finally:
        aside.unlink()


def _chain(path: Path) -> list[Found]:
    """The lease and those that began to succeed it; the last one holds."""
    chain: list[Found] = []
    there = read(path)
    while there is not None:
        chain.append(there)
        there = read(there.next)
    return chain


def _has_ended(there: Found, me: Holder) -> bool:
    """Whether the holder is known to have ended. False where the lease is no longer its own: judge anew.

    Raises:
        UserError: it lives.
    """
    holder, folder = there.holder, there.path.parent
    refusal = UserError(
        f"{folder} is written by {there}; "
        f"{f'scancel {holder.job}' if holder and holder.job else 'end that process'} first, or choose another name"
    )
    if holder is not None:
        alive, ourselves = _is_alive(holder, me), _is_earlier(holder, me)
        until = time.monotonic() + EXPIRY_S
        while alive and ourselves and time.monotonic() < until:  # what is left of it on a node that was lost, say
            time.sleep(BEAT_S / 5)
            alive = _is_alive(holder, me)
        if alive:
            raise refusal
        if alive is False or ourselves:
            _say(f"{folder}: going on after {there}, which has ended")
            return True
    _say(f"{folder} is written by {there}; waiting for {EXPIRY_S:g} s to see whether it is alive")
    for _ in range(round(5 * EXPIRY_S / BEAT_S)):  # looks, not time: a file system that hangs shows no beat either
        time.sleep(BEAT_S / 5)
        now = read(there.path)
        if now != there:
            if now is not None and (now.holder is None or (holder is not None and now.holder.token == holder.token)):
                raise refusal
            return False
    _say(f"warning: {folder}: {there} has shown no life for {EXPIRY_S:g} s; going on in its place")
    return True


def _is_earlier(holder: Holder, me: Holder) -> bool:
    """Whether the holder is our own job before Slurm requeued it."""
    return holder.job is not None and holder.job == me.job and holder.restart < me.restart


def _is_alive(holder: Holder, me: Holder) -> bool | None:
    """Whether the holder's process lives; None where this cannot be known here: another machine or container."""
    if not me.boot or (holder.host, holder.boot, holder.namespace) != (me.host, me.boot, me.namespace):
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's: it exists
    state, started = _state_and_start(holder.pid)
    if not started:
        return None  # hidden from us, or ended just now
    return started == holder.started and state not in "ZX"


def _state_and_start(pid: int) -> tuple[str, str]:
    """A process's state (Z: it only waits for its parent's look) and its start in ticks since the boot; else empty."""
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()  # a program's name may hold blanks
    return (fields[0], fields[19]) if fields else ("", "")


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
