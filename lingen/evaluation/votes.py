"""Blind votes between two runs: what is shown on which side, the file of votes, and what it says.

Every pair of videos of the same prompt and seed is shown, in an order and on sides that depend on a seed alone. A vote
is a line of JSON; a voter who votes again on a pair takes the first vote back.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from lingen.comparison.tables import Table
from lingen.errors import UserError
from lingen.evaluation.folder import SampledRun
from lingen.evaluation.statistics import Interval, wilson
from lingen.files import sync_path
from lingen.output import writing

Choice = Literal["left", "right", "same"]


class Vote(BaseModel):
    """A line of the file. ``left`` and ``right`` are names of runs, so that it can be read without the seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    voter: Annotated[str, Field(max_length=64)]
    video: NonNegativeInt  # number in both runs
    prompt: str
    seed: NonNegativeInt
    left: str
    right: str
    choice: Choice
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # from when the pair was shown

    @property
    def winner(self) -> str | None:
        """The run that was preferred."""
        return {"left": self.left, "right": self.right, "same": None}[self.choice]


@dataclass(frozen=True)
class Pair:
    """One video of both runs, and which run is on the left."""

    video: int
    left: SampledRun
    right: SampledRun


def pairs(runs: Sequence[SampledRun], seed: int) -> list[Pair]:
    """All pairs, shuffled, with sides that are as often one way as the other.

    Raises:
        UserError: there are not two runs.
    """
    if len(runs) != 2:
        raise UserError(f"runs=[{','.join(run.name for run in runs)}]: votes are between two runs, got {len(runs)}")
    rng = np.random.default_rng(seed)
    count = len(runs[0].file.videos)
    order, swapped = rng.permutation(count), rng.permutation(np.arange(count) % 2 == rng.integers(2))
    return [Pair(int(n), runs[int(swap)], runs[1 - int(swap)]) for n, swap in zip(order, swapped, strict=True)]


class VoteFile:
    """The votes so far; each new one is on the disk before ``add`` returns."""

    def __init__(self, path: Path, runs: Sequence[SampledRun], *, seed: int, shown: bool = False) -> None:
        """
        Args:
            shown: only looked at, also while others vote.

        Raises:
            UserError: the file is of other runs or another seed, a line is no vote, it cannot be written, or another
                process has it.
        """
        self.path, self._lock = path, threading.Lock()
        self._sides = {pair.video: (pair.left.name, pair.right.name) for pair in pairs(runs, seed)}
        self._asked = runs[0].file.videos
        self.votes: dict[tuple[str, int], Vote] = {}
        if shown:
            with path.open("rb", buffering=0) as self._stream:
                self._read(mend=False)
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            existed = path.exists()
            self._stream = path.open("a+b", buffering=0)
            if not existed:
                sync_path(path.parent)
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"out={path} is open in another vote.py; end that one first") from error
        self._read(mend=True)

    def _read(self, *, mend: bool) -> None:
        self._stream.seek(0)
        lines = self._stream.read().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not line.endswith(b"\n"):  # cut short, or not yet written whole
                if mend:
                    self._stream.truncate(sum(map(len, lines[:-1])))
                break
            try:
                self._take(Vote.model_validate_json(line))
            except (ValidationError, ValueError) as error:
                why = "is no vote" if isinstance(error, ValidationError) else str(error)
                raise UserError(f"out={self.path}, line {number} {why}; name another file") from error

    def _take(self, vote: Vote) -> None:
        """Raises:
        ValueError: it is of other runs, or of other sides.
        """
        sides, asked = self._sides.get(vote.video), self._asked[vote.video] if vote.video < len(self._asked) else None
        if sides is None or asked is None or (vote.prompt, vote.seed) != (asked.prompt, asked.seed):
            raise ValueError("is of other videos")
        if (vote.left, vote.right) != sides:
            raise ValueError(f"has {vote.left} beside {vote.right}: other runs, or another seed")
        self.votes[vote.voter, vote.video] = vote

    def add(self, voter: str, video: int, choice: Choice, seconds: float) -> None:
        """Raises:
        ValueError: a value is out of range.
        OSError: the disk refuses; the vote does not count.
        """
        if video not in self._sides:
            raise ValueError(f"video={video} is not there")
        asked, (left, right) = self._asked[video], self._sides[video]
        vote = Vote(
            voter=voter, video=video, prompt=asked.prompt, seed=asked.seed, left=left, right=right, choice=choice,
            seconds=seconds,
        )  # fmt: skip
        line = json.dumps(vote.model_dump()).encode() + b"\n"
        with self._lock:
            end = self._stream.seek(0, os.SEEK_END)
            try:
                if self._stream.write(line) < len(line):
                    raise OSError("the disk is full")
                os.fsync(self._stream.fileno())
            except OSError:
                self._stream.truncate(end)
                raise
            self._take(vote)

    def voted(self, voter: str) -> set[int]:
        """The videos that this voter has voted on."""
        with self._lock:
            return {video for name, video in self.votes if name == voter}

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


@dataclass(frozen=True)
class WinRate:
    """How often a run was preferred to the other, of the votes that prefer one."""

    wins: int
    rate: Interval


@dataclass(frozen=True)
class Tally:
    """All votes together."""

    runs: dict[str, WinRate]
    same: int
    votes: int
    voters: int
    left: int  # votes for the left side: far from half of the decided ones, somebody did not look


def tally(votes: Mapping[tuple[str, int], Vote], names: Sequence[str]) -> Tally:
    """Win rates with Wilson's intervals. They take votes as independent: several voters on the same pairs are less."""
    winners = [vote.winner for vote in votes.values()]
    decided = sum(winner is not None for winner in winners)
    rates = {name: WinRate(winners.count(name), wilson(winners.count(name), decided)) for name in names}
    left = sum(vote.choice == "left" for vote in votes.values())
    return Tally(rates, len(winners) - decided, len(winners), len({vote.voter for vote in votes.values()}), left)


def as_table(found: Tally) -> Table:
    """For the terminal."""
    rows = [
        [name, str(one.wins), f"{one.rate.value:.1%}", f"{one.rate.low or 0:.1%} to {one.rate.high or 0:.1%}"]
        for name, one in found.runs.items()
    ]
    decided = found.votes - found.same
    title = (
        f"{found.votes} votes of {found.voters} voters, {found.same} of them undecided; left {found.left} of {decided}"
    )
    return Table(title, ["run", "preferred", "of the decided", "95% interval"], rows)
