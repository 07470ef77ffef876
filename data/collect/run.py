"""The work of make_shards: examine what there is in many processes, write what is good in its order, tell about it."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from data.collect.cut import require_scenedetect
from data.collect.entries import Entry, printable
from data.collect.examine import Media, Outcome, Rejection, examine, read_part
from data.collect.journal import Header, Journal, Step, by_reason, rejected_lines
from data.collect.pool import Lost, ordered
from data.collect.report import write_report
from data.collect.source import Source, find_source
from data.collect.words import Words
from data.decode import BadSample
from data.index_file import INDEX, PARTIAL_INDEX, Columns, IndexFile
from data.shards import write_partial
from data.writer import ShardWriter, Window, add_row
from lingen.errors import UserError
from lingen.files import write_file

ENOUGH_SEEN = 100  # samples; a smaller set is looked at whole, so that all that is bad in it is named
SHARD_BYTES = 1 << 30
INDEXED_AT_ONCE = 256  # entries between two lines of the journal, where no shard is written
REJECTED = "rejected.jsonl"
REPORT = "report.json"


def collect(words: Words) -> str:
    """Shards (or an index into others'), rejected.jsonl, report.json and report.html; what was done, in one line.

    Raises:
        UserError: no input, an output that is in use or cannot be written, or more bad samples than ``max_bad_share``.
    """
    if words.scenes:
        require_scenedetect()
    output = Path(words.output)
    source = find_source(words)
    if output.resolve().is_relative_to(source.root) and Path(words.input).is_dir():
        raise UserError(f"output={output} lies in input={words.input}, which is never changed; choose another folder")
    binding = words.binding() | {"input": str(Path(words.input).resolve())}
    samples = sum(entry.samples for entry in source.entries)
    header = Header(words=binding, entries=len(source.entries), samples=samples, fingerprint=source.fingerprint)
    try:
        output.mkdir(parents=True, exist_ok=True)
        journal = Journal(output, header)
        try:
            return _Run(words, source, journal).finish()
        finally:
            journal.close()
    except OSError as error:  # what cannot be read of the input is a bad sample
        raise UserError(
            f"output={output} cannot be written: {error}; what was written is whole, and the same command goes on"
        ) from error


class _Run:
    """From where the journal stands to the end of the input."""

    def __init__(self, words: Words, source: Source, journal: Journal) -> None:
        self.words, self.source, self.journal, self.output = words, source, journal, journal.output
        self.writes = not source.shards or words.shards == "rewrite"
        done = journal.done
        self.writer = ShardWriter(self.output, first=len(done.index.shards))
        self.indexed = Columns()  # rows since the journal's last line, where no shard is written
        self.rejected: list[Rejection] = []  # since the journal's last line
        self.entries = done.entries
        self.samples = sum(entry.samples for entry in source.entries)
        self.bad = done.bad
        self.keys = {key.partition("@")[0] for key in done.index.samples.key}  # of media
        self.place_of = {str(source.root / shard.name): n for n, shard in enumerate(source.shards)}

    def finish(self) -> str:
        """Do what is left, then the index and the report."""
        whole = self.entries == len(self.source.entries) and (self.output / INDEX).exists()
        if not whole:
            (self.output / PARTIAL_INDEX).unlink(missing_ok=True)
            try:
                self._collect()
                self._step()
                self._write_index()
            except BaseException as error:
                self._stop(error)
                raise
        report = self._write_json(self.journal.done.index)
        write_report(self.words, self.output, report, self.journal.done.rejected)
        return (
            f"{self.output}: {report['samples']} samples in {report['shards']} shards, {report['bytes'] / 1e6:.1f} MB; "
            f"rejected: {listed(self.journal.done.rejected)}"
        )

    def _collect(self) -> None:
        words, entries, done = self.words, self.source.entries, self.entries
        task = partial(examine, words, str(self.source.root))
        outcomes = ordered(task, entries[done:], workers=words.workers, seconds=words.file_seconds)
        write_file(self.output / REJECTED, rejected_lines(self.journal.done.rejected).encode())
        try:
            with _bar() as bar, (self.output / REJECTED).open("a") as log:
                shown = bar.add_task(
                    "writing shards" if self.writes else "indexing", total=len(entries), completed=done
                )
                for entry, found in zip(entries[done:], outcomes, strict=True):
                    if isinstance(found, Lost):
                        lost = Rejection(entry.label, found.reason, found.detail, True)
                        found = Outcome(None, [lost] * entry.samples)
                    before = len(self.rejected)
                    self._take(entry, found)
                    log.write(rejected_lines(self.rejected[before:]))
                    log.flush()
                    self._refuse_too_many()
                    self._step_where_full()
                    bar.advance(shown)
        finally:
            outcomes.close()

    def _take(self, entry: Entry, found: Outcome) -> None:
        """Write or index what an entry gave, and count what it did not."""
        self.entries += 1
        rejected, media = list(found.rejected), found.media
        if media:
            if media.key in self.keys:
                rejected += [Rejection(entry.label, "duplicate key", window.key, True) for window in media.windows]
            else:
                distinct = {window.key: window for window in reversed(media.windows)}
                windows = [window for window in media.windows if distinct[window.key] is window]
                rejected += [Rejection(entry.label, "duplicate key", "", True)] * (len(media.windows) - len(windows))
                self.keys.add(media.key)
                self._store(media, windows)
        self.rejected += [one._replace(path=printable(one.path), detail=printable(one.detail)) for one in rejected]
        self.bad += min(entry.samples, sum(one.bad for one in rejected))  # a video in a thousand windows is one sample

    def _store(self, media: Media, windows: list[Window]) -> None:
        if self.writes:
            content = read_again(media)
            self.writer.add_media(media.key, content, media.suffix, media.sidecar, windows, sha256=media.sha256)
            return
        for window in windows:
            add_row(self.indexed, window, size=media.size, shard=self.place_of[media.path], sha256=media.sha256)
            self.indexed.offset.append(media.offset)

    def _step_where_full(self) -> None:
        full = (
            len(self.writer.pending.key) >= self.words.samples_per_shard or self.writer.media_bytes >= SHARD_BYTES
            if self.writes
            else self.entries - self.journal.done.entries >= INDEXED_AT_ONCE
        )
        if full:
            self._step()

    def _step(self) -> None:
        """Close the shard under way and tell the journal."""
        shard, rows = self.writer.close() or (None, self.indexed)
        step = Step(done=self.entries, shards=[shard] if shard else [], rows=rows, rejected=self.rejected, bad=self.bad)
        self.journal.add(step)
        self.indexed, self.rejected = Columns(), []

    def _refuse_too_many(self) -> None:
        """Raises:
        UserError: more are bad than ``max_bad_share`` of all samples, and more than one (one bad sample among a few
            says nothing); 0 allows none. Judged at the end, or from ``ENOUGH_SEEN`` on as soon as it is certain.
        """
        share, samples = self.words.max_bad_share, self.samples
        allowed = max(share * samples, 1.0 if share else 0.0)
        if self.bad > allowed and (self.entries >= ENOUGH_SEEN or self.entries == len(self.source.entries)):
            bad = [one for one in self.journal.done.rejected + self.rejected if one.bad]
            good = len(self.keys)
            kept = f"; rename {PARTIAL_INDEX} to {INDEX} to use the {good} good ones" if good else ""
            raise UserError(
                f"{self.bad} of {samples} samples are bad ({listed(bad)}), more than max_bad_share={share:g}; "
                f"{self.output / REJECTED} names them{kept}"
            )

    def _write_index(self) -> None:
        index = self.journal.done.index
        if not index.samples.key:
            raise UserError(
                f"output={self.output}: there is no sample to write ({listed(self.journal.done.rejected)}); "
                f"{self.output / REJECTED} names them"
            )
        write_file(self.output / INDEX, self._located(index).to_json())

    def _located(self, index: IndexFile) -> IndexFile:
        """Where others' shards are only pointed at, the index says where they are."""
        if self.writes:
            return index
        return IndexFile(root=str(self.source.root), shards=self.source.shards, samples=index.samples)

    def _stop(self, error: BaseException) -> None:
        """Keep what is whole: index.partial.json lists it, report.json counts it."""
        index = self._located(self.journal.done.index)
        index.samples.extend(self.indexed)
        write_partial(self.output, index, self.writer, whole=not isinstance(error, OSError))
        with suppress(OSError):
            self._write_json(index)

    def _write_json(self, index: IndexFile) -> dict[str, Any]:
        """report.json."""
        samples = index.samples
        frames, fps = np.array(samples.frames, np.int64), np.array(samples.fps)
        videos = frames > 1
        report = {
            "samples": len(samples.key),
            "shards": len(index.shards if self.writes else self.source.shards),
            "rejected": by_reason(self.journal.done.rejected + self.rejected),
            "files": self.entries,
            "videos": int(videos.sum()),
            "images": int((~videos).sum()),
            "frames": int(frames.sum()),
            "hours": float((frames[videos] / fps[videos]).sum() / 3600),
            "bytes": sum(shard.bytes for shard in (index.shards if self.writes else self.source.shards)),
        }
        write_file(self.output / REPORT, (json.dumps(report, indent=2) + "\n").encode())
        return report


def listed(rejected: list[Rejection]) -> str:
    """For example "2 missing caption, 1 truncated"."""
    return ", ".join(f"{count} {reason}" for reason, count in by_reason(rejected).items()) or "none"


def read_again(media: Media) -> bytes:
    """The bytes that a worker looked at.

    Raises:
        UserError: they are others now.
    """
    try:
        content = read_part(Path(media.path), media.offset, media.size)
    except (BadSample, OSError) as error:
        raise UserError(f"{media.path} was read, and can be read no more: {error}") from error
    if hashlib.sha256(content).hexdigest() != media.sha256:
        raise UserError(f"{media.path} changed while it was read; let what writes it end, and run this again")
    return content


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} files/s", style="progress.data.speed")


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
