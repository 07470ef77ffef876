"""What a run of make_shards has done so far, so that the same command goes on where it was stopped.

journal.jsonl has one line for the command and its input, then one for each shard that is whole (or each few hundred
samples, where none is written). A line that was being written when the power failed counts for nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data.collect.examine import Rejection
from data.index_file import Columns, IndexFile, ShardEntry
from data.shards import refuse_used
from lingen.errors import UserError
from lingen.files import sync, sync_path

JOURNAL = "journal.jsonl"


class Header(BaseModel):
    """What is collected, and how."""

    model_config = ConfigDict(extra="forbid")
    words: dict[str, Any]  # those that shape the output
    entries: int
    samples: int  # that the entries name; more, where videos are cut
    fingerprint: str  # of the input: names, sizes and times of change


class Step(BaseModel):
    """What was done since the line before."""

    model_config = ConfigDict(extra="forbid")
    done: int  # entries, from the first on
    shards: list[ShardEntry] = []
    rows: Columns = Columns()
    rejected: list[Rejection] = []
    bad: int  # of the samples that the entries name, from the first on


@dataclass
class Done:
    """All steps so far."""

    entries: int = 0
    index: IndexFile = field(default_factory=IndexFile)
    rejected: list[Rejection] = field(default_factory=list)
    bad: int = 0

    def add(self, step: Step) -> None:
        self.entries = step.done
        self.index.shards += step.shards
        self.index.samples.extend(step.rows)
        self.rejected += step.rejected
        self.bad = step.bad


class Journal:
    """The file, open and locked; ``done`` is what it tells."""

    def __init__(self, output: Path, header: Header) -> None:
        """Begin a journal, or go on with the one that is there.

        Raises:
            UserError: another run writes here, or one with other words or another input did, or shards lie here that
                no journal tells of.
        """
        self.output, self.done = output, Done()
        path = output / JOURNAL
        if not path.exists():
            refuse_used(output)
        self._stream = path.open("a+b", buffering=0)  # a buffer would try again to write what a full disk refused
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            raise UserError(f"output={output} is being written by another run; wait for its end") from error
        try:
            self._begin(header)
        except BaseException:
            self._stream.close()
            raise

    def _begin(self, header: Header) -> None:
        self._stream.seek(0)
        content = self._stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._stream.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            refuse_used(self.output)
        if len(lines) < 2:  # nothing is told of yet; a first shard that is there already is written again
            self._stream.truncate(0)
            self._write(header)
            sync_path(self.output)
            return
        try:
            before = Header.model_validate_json(lines[0])
            for line in lines[1:]:
                self.done.add(Step.model_validate_json(line))
        except ValidationError as error:
            raise UserError(
                f"output={self.output}: {JOURNAL} is damaged; remove this folder to write it again"
            ) from error
        self._compare(before, header)

    def _compare(self, before: Header, now: Header) -> None:
        """Raises:
        UserError: this is not the command that the journal was begun with, or a shard is not as it was written.
        """
        words = [name for name, value in now.words.items() if before.words.get(name) != value]
        if words:
            old, new = (", ".join(f"{name}={header.words.get(name)}" for name in words) for header in (before, now))
            raise UserError(
                f"output={self.output} was begun with {old}, and not with {new}; give the same words to go on, or "
                "choose another folder"
            )
        if before != now:
            raise UserError(
                f"output={self.output} was begun when input={now.words['input']} held other files (added, removed or "
                "changed since); choose another folder, or remove this one to write it again"
            )
        for shard in self.done.index.shards:
            file = self.output / shard.name
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise UserError(
                    f"output={self.output}: {shard.name} is not as it was written; remove this folder to write it again"
                )

    def add(self, step: Step) -> None:
        """Write down what was done. Shards must be on the disk before they are told of."""
        self._write(step)
        self.done.add(step)

    def _write(self, line: BaseModel) -> None:
        """A line or none: after an error of the disk the file ends where it ended before."""
        end = self._stream.seek(0, os.SEEK_END)
        try:
            content = line.model_dump_json().encode() + b"\n"
            if self._stream.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(self._stream)
        except OSError:
            os.truncate(self.output / JOURNAL, end)
            raise

    def close(self) -> None:
        self._stream.close()


def by_reason(rejected: list[Rejection]) -> dict[str, int]:
    """How many there are of each reason, the most frequent first."""
    return dict(Counter(one.reason for one in rejected).most_common())


def rejected_lines(rejected: list[Rejection]) -> str:
    """Lines of rejected.jsonl."""
    return "".join(
        json.dumps({"path": one.path, "reason": one.reason, "detail": one.detail}) + "\n" for one in rejected
    )
