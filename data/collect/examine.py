"""One media, looked at from all sides: which samples it gives, and why not others. It runs in a worker.

Shapes: F frames of the media, K frames looked at, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from data.collect.cut import Span, cut, find_scenes
from data.collect.entries import BESIDE, MEDIA, Entry, Member, Part, escape, key_of, locate, refuse_outside
from data.collect.words import Words
from data.decode import BadSample, ClipInfo, Times, decode_clip, frame_times, part_of, probe
from data.writer import Window

LOOKS = 5  # frames that decide how bright a video is and whether it moves
LOOK_SIDE = 64  # pixels of their shorter side
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue; ITU-R BT.601
WHOLE: Span = (0.0, 0.0)
CAPTION_BYTES = 1 << 26  # of a caption file; a .json may hold more than the caption


Item = TypeVar("Item")
Made = TypeVar("Made")


class Rejection(NamedTuple):
    """A sample that is left out. ``bad``: it is broken, where a filter leaves out what is sound."""

    path: str
    reason: str
    detail: str
    bad: bool


class Media(NamedTuple):
    """A media with samples in it."""

    key: str
    suffix: str  # without a dot
    path: str  # the file, or the shard that holds it
    offset: int  # in it
    size: int
    sha256: str
    sidecar: tuple[str, bytes]  # as of data.writer.Record
    windows: list[Window]


class Outcome(NamedTuple):
    media: Media | None
    rejected: list[Rejection]


class Filtered(BadSample):
    """A sound sample that the words leave out."""


def examine(words: Words, root: str, entry: Entry) -> Outcome:
    """The samples of an entry below the folder ``root``. Whatever goes wrong with it is a rejection."""
    rejected: list[Rejection] = []
    try:
        return Outcome(_examine(words, Path(root), entry, rejected), rejected)
    except BadSample as bad:
        failed = [_reject(entry, bad)] * max(1, entry.samples - len(rejected))
    except MemoryError:
        failed = [_reject(entry, BadSample("too large for the memory"))]
    except Exception as error:  # a million files hold what nobody thought of: named and counted, it stops nothing
        failed = [_reject(entry, BadSample("unexpected error", f"{type(error).__name__}: {error}"[:200]))]
    return Outcome(None, rejected + failed)


def _reject(entry: Entry, bad: BadSample) -> Rejection:
    return Rejection(entry.label, bad.reason, bad.detail, not isinstance(bad, Filtered))


def _examine(words: Words, root: Path, entry: Entry, rejected: list[Rejection]) -> Media | None:
    """What one part of an entry lacks is put into ``rejected``; what the whole lacks is raised."""
    if entry.problem:
        raise BadSample(*entry.problem)
    path, key, suffix = place(root, entry)
    given, sidecar = read_captions(path, root, entry)
    parts = _keep(entry, rejected, given, lambda part: [check_caption(words, part)])
    if not parts:
        return None
    media = read_media(path, entry.member, words.max_megabytes)
    info = probe(media)
    if min(info.height, info.width) < words.min_side:
        raise Filtered("too small", f"{info.width}x{info.height}")
    times: Times = np.zeros(1)
    scenes: list[float] = []
    if info.frames > 1 and (words.cuts or any(part.begin or part.end for part in parts)):
        times = frame_times(media)
        scenes = find_scenes(media, times, words.scene_threshold) if words.scenes else []

    def spans(part: Part) -> list[tuple[str, Span]]:
        whole = len(times) == 1
        if whole and (part.begin or part.end):
            raise BadSample("bad start or end", "an image has no seconds")
        found = [WHOLE] if whole else cut(times, (part.begin, part.end), scenes, words.window_seconds)
        return [(part.caption, span) for span in found]

    def judged(sample: tuple[str, Span]) -> list[Window]:
        caption, (begin, end) = sample
        try:
            window = _window(key, caption, info, times, (begin, end))
            judge(words, window, media)
        except BadSample as bad:
            if (begin, end) == WHOLE:
                raise
            raise type(bad)(bad.reason, f"{bad.detail}, from {begin:g} to {end:g} s") from bad
        return [window]

    windows = _keep(entry, rejected, _keep(entry, rejected, parts, spans), judged)
    if not windows:
        return None
    offset = entry.member.offset if entry.member else 0
    digest = hashlib.sha256(media).hexdigest()
    return Media(key, suffix, str(path), offset, len(media), digest, sidecar, windows)


def _keep(
    entry: Entry, rejected: list[Rejection], items: Iterable[Item], work: Callable[[Item], list[Made]]
) -> list[Made]:
    """What ``work`` makes of the items; those that it refuses are rejections."""
    made: list[Made] = []
    for item in items:
        try:
            made += work(item)
        except BadSample as bad:
            rejected.append(_reject(entry, bad))
    return made


def place(root: Path, entry: Entry) -> tuple[Path, str, str]:
    """The file (or shard) of an entry, the key of its media, and the suffix, which is one that we know."""
    if entry.member:
        shard = PurePosixPath(entry.name).with_suffix("")
        return root / entry.name, escape(f"{shard}/{entry.member.key}"), entry.member.suffix.removeprefix(".")
    file = locate(root, entry.name)
    if file.suffix.lower() not in MEDIA:
        raise BadSample("neither a video nor an image", file.suffix)
    return file, key_of(file, root), file.suffix.lower().removeprefix(".")


def read_captions(path: Path, root: Path, entry: Entry) -> tuple[tuple[Part, ...], tuple[str, bytes]]:
    """The parts of an entry, and the caption file (suffix, content) to write beside its media."""
    if not entry.parts:
        suffix, content = _caption_file(path, root, entry.member)
        return (Part(_caption_of(suffix, content)),), (suffix, content)
    if len(entry.parts) == 1 and not (entry.parts[0].begin or entry.parts[0].end):
        return entry.parts, ("txt", entry.parts[0].caption.encode(errors="replace"))
    return entry.parts, ("json", json.dumps({"parts": [part._asdict() for part in entry.parts]}).encode())


def _caption_file(path: Path, root: Path, member: Member | None) -> tuple[str, bytes]:
    """(suffix, content) of the .txt or else the .json beside a media; ("txt", b"") where there is none."""
    if member:
        if member.caption is None:
            return "txt", b""
        suffix, offset, size = member.caption
        return suffix.removeprefix("."), read_part(path, offset, _small_enough(size))
    for suffix in BESIDE:
        beside = path.with_suffix(suffix)
        try:
            if not beside.is_file():
                continue
            refuse_outside(beside, root if path.is_relative_to(root) else beside.parent.resolve())
            _small_enough(beside.stat().st_size)
            return suffix.removeprefix("."), beside.read_bytes()
        except (OSError, ValueError) as error:
            raise BadSample("bad caption file", f"{beside.name}: {error}") from error
    return "txt", b""


def _small_enough(size: int) -> int:
    if size > CAPTION_BYTES:
        raise Filtered("caption too long", f"a caption file of {size} bytes")
    return size


def _caption_of(suffix: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
        caption = text if suffix == "txt" else json.loads(text)["caption"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last: a nest too deep
        raise BadSample("bad caption file", f".{suffix}: {error}"[:200]) from error
    return caption if isinstance(caption, str) else ""


def check_caption(words: Words, part: Part) -> Part:
    """The part with its caption stripped.

    Raises:
        BadSample: it has none, it is no text, or it is shorter or longer than is wanted.
    """
    caption = part.caption.strip()
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        raise BadSample("bad caption", "not valid Unicode") from error
    if not caption:
        raise BadSample("missing caption")
    if not words.min_caption <= len(caption) <= words.max_caption:
        short = len(caption) < words.min_caption
        raise Filtered("caption too short" if short else "caption too long", f"{len(caption)} characters")
    return part._replace(caption=caption)


def read_media(path: Path, member: Member | None, max_megabytes: int) -> bytes:
    """The bytes of a file, or of a member of a shard.

    Raises:
        BadSample: they cannot be read, or are more than ``max_megabytes``.
    """
    try:
        found = path.stat()
        size = member.size if member else found.st_size
        if not stat.S_ISREG(found.st_mode):  # a pipe would wait for ever, and some devices never end
            raise BadSample("cannot be read", "not a plain file")
        if size > max_megabytes << 20:
            raise Filtered("file too large", f"{size >> 20} MiB")
        return read_part(path, member.offset, size) if member else path.read_bytes()
    except OSError as error:
        raise BadSample("cannot be read", str(error)) from error


def read_part(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise BadSample("truncated", f"{len(content)} of {size} bytes")
    return content


def _window(key: str, caption: str, info: ClipInfo, times: Times, span: Span) -> Window:
    """A sample's row; the part of a video has its own frames and rate, and the seconds in its key."""
    if span == WHOLE:
        return Window(key, caption, info)
    begin, end = round(span[0], 6), round(span[1], 6)
    first, last = part_of(times, begin, end)
    frames, shown = last - first, float(times[last - 1] - times[first])
    if frames < 2 or shown <= 0:
        raise Filtered("too short", f"{frames} frames")
    part = replace(info, frames=frames, fps=(frames - 1) / shown)
    return Window(f"{key}@{begin * 1000:.0f}-{end * 1000:.0f}ms", caption, part, begin, end)


def judge(words: Words, window: Window, media: bytes) -> None:
    """Raises:
    BadSample: the words leave this sample out, or the frames to look at cannot be decoded.
    """
    info = window.info
    if info.frames > 1:
        seconds = info.frames / info.fps
        if seconds < words.min_seconds:
            raise Filtered("too short", f"{seconds:.3f} s")
        if words.max_seconds is not None and seconds > words.max_seconds:
            raise Filtered("too long", f"{seconds:.3f} s")
        if info.fps < words.min_fps:
            raise Filtered("rate too low", f"{info.fps:.3f} frames/s")
        if words.max_fps is not None and info.fps > words.max_fps:
            raise Filtered("rate too high", f"{info.fps:.3f} frames/s")
    if not words.looks:
        return
    seen = look(media, window, min(LOOKS, info.frames)).astype(np.float32)  # (K, H, W, 3)
    luma = float((seen @ LUMA).mean())
    if luma < words.min_luma:
        raise Filtered("too dark", f"a mean luma of {luma:.1f}")
    motion = float(np.abs(np.diff(seen, axis=0)).mean()) if len(seen) > 1 else float("inf")  # an image never moves
    if motion < words.min_motion:
        raise Filtered("still", f"a mean change of {motion:.2f}")


def look(media: bytes, window: Window, frames: int, side: int = LOOK_SIDE) -> npt.NDArray[np.uint8]:
    """(K, H, W, 3): frames spread over a sample, the shorter side ``side`` pixels and the longer at most twice that."""
    info = window.info
    scale = side / min(info.height, info.width)
    height, width = (min(2 * side, round(scale * size)) for size in (info.height, info.width))
    fps = (frames - 1) * info.fps / (info.frames - 1) if frames > 1 else 1.0
    clip = decode_clip(
        media, frames=frames, height=height, width=width, fps=fps, start=0.0, begin=window.begin, end=window.end
    )
    pixels: npt.NDArray[np.uint8] = clip.permute(1, 2, 3, 0).numpy()
    return pixels
