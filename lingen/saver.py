"""Checkpoints written beside training: a copy in memory, a thread a rank that writes it, one rename that shows it.

A save has two turns, and all ranks are in the same one. First they write their parts, ``writers`` at a time; then
rank 0 writes the rest and makes all of it visible. Threads write and never communicate. What a rank's thread has done
is its *vote*; the training step sums the votes in its own reduction, and from the sums all ranks conclude the same.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, NoReturn

import torch

from lingen.checkpoint import SAVING, prune, swap_in
from lingen.dist import Dist
from lingen.ema import Ema
from lingen.engine import Engine
from lingen.errors import UserError
from lingen.files import sha256, sync_path, write_file
from lingen.manifest import MANIFEST, STATE, FileEntry, Manifest, read_manifest
from lingen.shardfiles import Damaged, Recorder, Snapshot, write_shard

GLANCE = 0.05  # seconds between two looks at a thread that is waited for
PATIENCE = 10.0  # seconds that ``close`` gives a thread; one whose disk does not answer ends with the process

log = logging.getLogger(__name__)


class _Abandoned(Exception):
    """The save was given up, for a reason that lies elsewhere."""


class _Job:
    """A thread with one thing to do, and what came of it."""

    def __init__(self, action: Callable[[_Job], Any]) -> None:
        """Begins at once."""
        self.value: Any = None
        self.error: str | None = None
        self.moves = 0  # grows while it gets on
        self.ended = threading.Event()
        self._abandoned = False
        # A daemon: a disk that does not answer must not keep the process from exiting.
        thread = threading.Thread(target=self._run, args=(action,), name="checkpoint", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            self.error = str(error)
            self.ended.set()

    def go_on(self) -> None:
        """For the action to call between its parts."""
        self.moves += 1
        if self._abandoned:
            raise _Abandoned

    def abandon(self, patience: float | None) -> None:
        """Let it end at its next part, and wait for that so many seconds (None: as long as it takes)."""
        self._abandoned = True
        self.ended.wait(patience)

    def _run(self, action: Callable[[_Job], Any]) -> None:
        try:
            self.value = action(self)
        except _Abandoned:
            pass
        except (OSError, UserError, Damaged) as error:
            self.error = str(error) or type(error).__name__
        except BaseException as error:  # else the others would wait for a dead thread
            log.exception("the thread that writes a checkpoint died")
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.ended.set()


@dataclass(frozen=True)
class _Plan:
    """What is written, fixed when the save began."""

    folder: Path
    aside: Path  # where it is written
    made: list[Path]  # the folders that rank 0 made for it
    snapshot: Snapshot
    state: bytes
    facts: dict[str, Any]  # of the manifest, all but the files
    keep_last: int


@dataclass
class _Flight:
    """The save under way."""

    plan: _Plan
    job: _Job | None = None  # this rank's, in this turn
    all_written: bool = False  # the first turn is over


class Saver:
    """Saves, at most one at a time. All but ``votes`` and ``close`` are collectives."""

    def __init__(self, dist: Dist, *, writers: int, may_publish: Callable[[], None]) -> None:
        """``writers`` ranks write at the same time (0: all). Just before a checkpoint becomes visible, rank 0 calls
        ``may_publish``, in its thread; it raises a UserError where the run folder is no longer ours."""
        self._dist = dist
        self._writers = writers or dist.world
        self._may_publish = may_publish
        self._recorder = Recorder()
        self._flight: _Flight | None = None
        self._turn = 0  # counts what the votes are about
        self._voted_in = -1
        atexit.register(self.close)  # a thread that meets the end of the interpreter would abort the process

    def start(
        self,
        stage_dir: Path,
        *,
        step: int,
        samples: int,
        tokens: int,
        progress: dict[str, Any],
        architecture: dict[str, Any],
        final: bool,
        regular: bool,
        kept: bool,
        keep_last: int,
        engine: Engine,
        ema: Ema,
    ) -> None:
        """Copy what stage_dir/step_XXXXXXXX is to hold; training may go on at once. Finishes an earlier save first.

        A ``final`` or ``kept`` one is never pruned; of all, the newest ``keep_last`` stay, and the newest ``keep_last``
        of the ``regular`` ones.

        Raises:
            UserError: the earlier one failed, or there is no room for this one (on all ranks).
        """
        self.finish()
        folder = stage_dir / f"step_{step:08d}"
        # A name of its own: whoever took the run folder from us may be writing the same step.
        aside = stage_dir / f"{SAVING}{folder.name}_{token_hex(4)}"
        made: list[Path] = []
        snapshot, error = None, None
        try:
            if self._dist.rank == 0:
                made = [path for path in (stage_dir, *stage_dir.parents) if not path.exists()]
                aside.mkdir(parents=True)
            snapshot = self._recorder.take(engine.fragments(), ema)
        except (OSError, RuntimeError, MemoryError) as failure:
            error = f"rank {self._dist.rank}: {failure}"
        outcomes = self._dist.gather([str(aside), error])
        aside = Path(outcomes[0][0])
        if snapshot is None or any(e for _, e in outcomes):
            self._give_up(folder, aside, [e for _, e in outcomes if e])
        facts = {
            "stage": stage_dir.name,
            "step": step,
            "samples": samples,
            "tokens": tokens,
            "final": final,
            "regular": regular,
            "kept": kept or final,
            "world_size": self._dist.world,
            "zero_stage": engine.zero_stage,
            "adam_steps": engine.steps,
            "architecture": architecture,
        }
        state = json.dumps(progress, indent=1).encode()
        self._flight = _Flight(_Plan(folder, aside, made, snapshot, state, facts, keep_last))
        self._turn += 1
        self._let_write(self._flight, done=0)

    def votes(self) -> tuple[float, float]:
        """(this rank did its part of the turn, it failed), each 0 or 1. Their sums over the ranks go to ``advance``."""
        self._voted_in = self._turn
        job = self._flight.job if self._flight else None
        if job is None or not job.ended.is_set():
            return 0.0, 0.0
        return (1.0, 0.0) if job.error is None else (0.0, 1.0)

    def advance(self, done: float, failed: float) -> Path | None:
        """Take the next step of a save, given the sums of the ranks' ``votes``. Returns what became visible by it.

        Raises:
            UserError: some rank could not write (on all ranks). What was there before is untouched then.
        """
        flight = self._flight
        if flight is None or self._voted_in != self._turn:  # the votes were about an earlier turn
            return None
        plan = flight.plan
        if failed:
            if flight.job:
                flight.job.abandon(None)
            errors = self._dist.gather(flight.job.error if flight.job else None)
            self._flight = None
            self._give_up(plan.folder, plan.aside, [f"rank {n}: {e}" for n, e in enumerate(errors) if e is not None])
        elif flight.all_written and done:
            self._flight = None
            return plan.folder
        elif not flight.all_written and done == self._dist.world:
            assert flight.job is not None
            entries = self._dist.gather(flight.job.value)
            flight.job, flight.all_written = None, True
            self._turn += 1
            if self._dist.rank == 0:
                flight.job = _Job(lambda job: _publish(job, plan, entries, self._may_publish))
        elif not flight.all_written:
            self._let_write(flight, int(done))
        return None

    def finish(self, beat: Callable[[], None] | None = None) -> Path | None:
        """Wait until the save under way is visible. Returns its folder, or None where there was none.

        ``beat`` is called as long as this rank's own part gets on, or is done.

        Raises:
            UserError: some rank could not write (on all ranks).
        """
        folder, seen = None, -1
        while self._flight is not None:
            job = self._flight.job
            if job is not None:
                job.ended.wait(GLANCE)
            if beat is not None and (job is None or job.ended.is_set() or job.moves != seen):
                beat()
            seen = job.moves if job else -1
            votes = torch.tensor(self.votes(), device=self._dist.device)
            self._dist.all_reduce_sum(votes)
            folder = self.advance(*votes.tolist())
        return folder

    def close(self) -> None:
        """Give up the save under way, if any; what it wrote stays hidden, for ``sweep``. Not collective.

        To be called before another may take the run folder."""
        atexit.unregister(self.close)
        flight, self._flight = self._flight, None
        if flight is not None and flight.job is not None:
            flight.job.abandon(PATIENCE)

    def _let_write(self, flight: _Flight, done: int) -> None:
        """Begin this rank's part, once so many parts are done that it is its turn."""
        plan, rank = flight.plan, self._dist.rank
        if flight.job is None and rank < done + self._writers:
            path = plan.aside / f"rank_{rank:05d}.safetensors"
            flight.job = _Job(lambda job: write_shard(path, plan.snapshot, job.go_on))

    def _give_up(self, folder: Path, aside: Path, errors: list[str]) -> NoReturn:
        """Remove what was written, and tell it on all ranks."""
        if self._dist.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        self._dist.barrier()
        raise UserError(f"{folder} could not be written ({'; '.join(errors)}); earlier checkpoints are untouched")


def _publish(job: _Job, plan: _Plan, entries: list[dict[str, Any]], may_publish: Callable[[], None]) -> None:
    """Rank 0's second turn: the small files, the rename, and the removal of what is no longer kept."""
    write_file(plan.aside / STATE, plan.state)
    files = {f"rank_{rank:05d}.safetensors": entry for rank, entry in enumerate(entries)}
    files[STATE] = {"size": len(plan.state), "sha256": sha256(plan.aside / STATE)}
    manifest = Manifest(**plan.facts, files={name: FileEntry(**e) for name, e in files.items()}, complete=True)
    write_file(plan.aside / MANIFEST, manifest.sealed().model_dump_json(indent=1).encode())
    read_manifest(plan.aside)  # what other hosts wrote is there, seen from here
    job.go_on()
    may_publish()
    swap_in(plan.aside, plan.folder)
    for path in plan.made:
        sync_path(path.parent)
    job.go_on()
    prune(plan.folder, plan.keep_last)
