"""The frames of one encoded video: when each is shown, and a reader of some of them.

Two decoders read them, PyAV and decord, and both give the same bits: the times come from PyAV alone, exact, and decord
is asked only for media where its frames were found to be PyAV's (``_suits_decord``); whatever it refuses goes to PyAV.

Shapes: F frames, H height, W width.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal, NamedTuple, TypeVar

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

Frames = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]  # (F, H, W, 3)
Times = np.ndarray[tuple[int, ...], np.dtype[np.float64]]  # (F,) seconds, ascending
Decoder = Literal["decord", "pyav"]
T = TypeVar("T")

AHEAD = 4  # frames that are decoded while one before them is converted
# Containers that hold their streams. FFmpeg knows others, that name files and servers to read from (concat, hls, sdp).
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif"
CHUNK_BYTES = 32 << 20  # pixels that decord holds at full resolution at a time; PyAV holds one picture
# A frame of these that is no reference is skipped unless it is wanted. (HEVC's may serve higher temporal layers.)
SKIPPABLE = ("h264", "mpeg2video", "mpeg4")
# Eight bits a component; in the others decord rounds and interpolates colours in another way.
DECORD_FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p")
DECORD_CODECS = ("h264", "hevc", "vp9", "mpeg4")
UPRIGHT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # the matrix of a track that is not turned
HAS_DECORD = importlib.util.find_spec("decord") is not None


class Piece(NamedTuple):
    """Some frames of one shape, and width / height of their pixels."""

    frames: Frames
    aspect: float


class BadSample(Exception):
    """A sample that cannot be used. ``reason`` is one of a few phrases, to be counted; ``detail`` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@contextmanager
def decoding() -> Iterator[None]:
    """Whatever a decoder raises is a ``BadSample``."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("cannot be decoded", (str(error).splitlines() or [type(error).__name__])[0][:200]) from error


@dataclass(frozen=True)
class Key:
    """A frame that decoding can start at."""

    stamp: int
    seek: int
    before: int  # packets before it in the file


@dataclass(frozen=True)
class Video:
    """An opened video: what its packets say."""

    media: bytes
    container: av.container.InputContainer
    stream: int
    base: Fraction  # seconds a unit of the stamps
    stamps: list[int]  # (F,) when each frame is shown, ascending
    keys: list[Key]  # ascending
    picture_bytes: int  # of one decoded frame
    aspect: float  # width / height of a pixel as it is stored
    counted: bool  # in AVI a stamp is the packet's, not the frame's, and the order alone tells which frame is which
    suits_decord: bool

    @property
    def times(self) -> Times:
        """(F,) seconds."""
        return np.array(self.stamps, dtype=np.float64) * float(self.base)

    def frames(self, indices: list[int], decoder: Decoder = "pyav") -> Iterator[Piece]:
        """The frames at ``indices`` (ascending, some perhaps twice), upright, in pieces of some frames each.

        Raises:
            BadSample: one of them cannot be decoded.
        """
        done = 0
        if decoder == "decord" and HAS_DECORD and self.suits_decord:
            for frames in self._decord(indices):
                done += len(frames)
                yield Piece(frames, self.aspect)
        if done < len(indices):  # no decord, or it stopped
            with decoding():
                yield from self._pyav(indices[done:])

    def _decord(self, indices: list[int]) -> Iterator[Frames]:
        """As many as decord can give: it cannot copy rows of 16, 24, 48 or 72 pixels, for example."""
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        size = max(1, CHUNK_BYTES // self.picture_bytes)
        try:
            video = decord.VideoReader(io.BytesIO(self.media), ctx=decord.cpu(0), num_threads=1)
            for at in range(0, len(indices) if len(video) == len(self.stamps) else 0, size):
                yield video.get_batch(indices[at : at + size]).asnumpy()
        except (decord.base.DECORDError, AssertionError, RuntimeError):
            return  # PyAV goes on

    def _pyav(self, indices: list[int]) -> Iterator[Piece]:
        """From the key frame before each run; where seeking misses it, from the one before that, or all that is left
        from the start."""
        done, reformatter = 0, VideoReformatter()  # keeps its tables from frame to frame
        matrices: dict[int, bytes | None] = {}
        while done < len(indices):
            key, end = self._run(indices, done)
            for start in [*(at for at in (key, key - 1) if at >= 0), None]:
                run = indices[done : end if start is not None else len(indices)]
                for frame, times in _ahead(self._decode_from(start, run)):
                    piece = _upright(frame, self.aspect, reformatter, _matrix(frame, matrices))
                    for _ in range(times):
                        done += 1
                        yield piece
                if done >= end:
                    break
            else:
                missing = float(self.stamps[indices[done]] * self.base)
                raise BadSample("cannot be decoded", f"no frame at {missing:.3f} s")

    def _run(self, indices: list[int], first: int) -> tuple[int, int]:
        """The key frame to decode from (-1: none), and the end of the frames from ``first`` on that lie so close
        together that no whole group of pictures between two of them would be decoded for nothing."""
        begin = at = self._key_before(indices[first])
        for end in range(first + 1, len(indices)):
            before, at = at, self._key_before(indices[end])
            if at > before + 1:
                return begin, end
        return begin, len(indices)

    def _key_before(self, index: int) -> int:
        return bisect_right(self.keys, self.stamps[index], key=lambda key: key.stamp) - 1

    def _decode_from(self, start: int | None, indices: list[int]) -> Iterator[tuple[av.VideoFrame, int]]:
        """The frames, and how often each is wanted, until one is missing; ``start`` is the place of a key frame, None
        the file's start."""
        wanted = Counter(self.stamps[i] for i in indices)  # in their order
        needed = set(wanted)
        with nullcontext(self.container) if start is not None else open_media(self.media) as container:
            stream = container.streams[self.stream]
            if start is not None:
                container.seek(self.keys[start].seek, stream=stream)
            place = 0 if start is None else self.keys[start].before
            for frame in _decode(container, stream, set() if self.counted else needed):
                stamp = self.stamps[min(place, len(self.stamps) - 1)] if self.counted else frame.pts
                place += 1
                following = next(iter(wanted))
                if stamp is None or stamp < following:
                    continue
                if stamp > following:
                    return
                yield frame, wanted.pop(following)
                if not wanted:
                    return


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, made in a thread beside the one that uses them, at most ``AHEAD`` too early."""
    made: SimpleQueue[T | Exception | None] = SimpleQueue()
    room: SimpleQueue[bool] = SimpleQueue()

    def make() -> None:
        try:
            while room.get() and (item := next(items, None)) is not None:
                made.put(item)
            made.put(None)
        except Exception as error:
            made.put(error)

    # One that is never closed, since a traceback holds it, does not keep Python from ending.
    thread = Thread(target=make, daemon=True)
    thread.start()
    try:
        for _ in range(AHEAD):
            room.put(True)
        while (item := made.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            room.put(True)
    finally:
        room.put(False)
        thread.join()


def _decode(container: Any, stream: Any, needed: set[int]) -> Iterator[av.VideoFrame]:
    """The stream's frames; of some codecs only those that are needed or others refer to. An empty set needs all."""
    skips = stream.codec_context.name in SKIPPABLE and needed
    for packet in container.demux(stream):
        if skips:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed or not packet.size else "NONREF"
        yield from packet.decode()


def _matrix(frame: av.VideoFrame, known: dict[int, bytes | None]) -> bytes | None:
    """How it is to be turned or mirrored, if at all. ``known`` has the matrices of the video's frames by rotation.

    A frame that is asked for it refers to itself then, and stays until garbage is collected: so one is asked for all.
    """
    if frame.rotation not in known:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
        known[frame.rotation] = None if matrix is None else bytes(matrix)
    return known[frame.rotation]


def _upright(frame: av.VideoFrame, aspect: float, reformatter: VideoReformatter, matrix: bytes | None) -> Piece:
    """(1, H, W, 3) as it is to be shown, and its pixels' aspect.

    An interlaced frame holds two moments; the lines of the second are replaced by those of the first.
    """
    pixels: Frames = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray().astype(np.uint8, copy=False)
    if frame.interlaced_frame:
        pixels[1::2] = pixels[0 : len(pixels) // 2 * 2 : 2]
    if matrix is None:
        return Piece(pixels[None], aspect)
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)  # x' = ax + cy, y' = bx + dy
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Piece(pixels[None, :: -1 if d < 0 else 1, :: -1 if a < 0 else 1], aspect)
    return Piece(pixels.transpose(1, 0, 2)[None, :: -1 if b < 0 else 1, :: -1 if c < 0 else 1], 1 / aspect)


def open_media(media: bytes) -> av.container.InputContainer:
    """Workers are processes already: no threads. A title or an author need not be UTF-8."""
    container = av.open(io.BytesIO(media), metadata_errors="replace", options={"format_whitelist": FORMATS})
    for stream in container.streams.video:
        stream.thread_type = "NONE"
    return container


@contextmanager
def open_video(media: bytes) -> Iterator[Video]:
    """Read the packets' times; nothing is decoded yet.

    Raises:
        BadSample: it does not hold a video, or fewer frames than its header declares; and whatever a decoder raises
            before the video is closed.
    """
    with decoding(), open_media(media) as container:
        cover = av.stream.Disposition.attached_pic  # of a song
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise BadSample("no video", "there is no video stream")
        if streams[0].codec_context is None:
            raise BadSample("cannot be decoded", "its codec is not known")
        stream, codec, name = streams[0], streams[0].codec_context, container.format.name
        packets, plain, stamps, keys, moments = 0, len(container.streams.video) == 1, [], [], [0]
        for packet in container.demux(stream):
            if not packet.size:
                continue
            moments.append(packet.dts or 0)
            if packet.is_keyframe and packet.pts is not None:
                early = packet.pts if name.startswith("mov") or packet.dts is None else min(packet.pts, packet.dts)
                keys.append(Key(packet.pts, early, packets))
            packets += 1
            if packet.pts is not None and not packet.is_discard:  # what an edit list leaves out is not shown
                stamps.append(packet.pts)
                # Decord mistakes frames around key frames that later frames are shown before.
                plain = plain and bool(keys) and packet.pts >= keys[-1].stamp
            else:
                plain = False
        if not packets:
            raise BadSample("no frames")
        # An AVI counts moments: a frame that is shown for several has one packet.
        reached = packets if name != "avi" else moments[-1] + max(1, int(np.diff(moments).max()))
        if reached < stream.frames:
            raise BadSample("truncated", f"{reached} of {stream.frames} frames")
        if not stamps:
            raise BadSample("no timestamps")
        yield Video(
            media,
            container,
            stream.index,
            stream.time_base or Fraction(1, 1),
            sorted(stamps),
            sorted(keys, key=lambda key: key.stamp),
            max(1, 3 * codec.height * codec.width),
            _pixel_aspect(stream.sample_aspect_ratio),
            name == "avi",
            plain and _suits_decord(media, name, codec),
        )
    gc.collect(0)  # the frame that ``_matrix`` asked


def _pixel_aspect(ratio: Fraction | None) -> float:
    """1 where a header says nothing, or nonsense."""
    return float(ratio) if ratio and 0.1 < ratio < 10 else 1.0


def _suits_decord(media: bytes, container: str, codec: av.VideoCodecContext) -> bool:
    """Whether decord is known to give the frames that PyAV gives.

    It mistakes frames in MPEG-TS and around key frames side by side in fragments, and the times in AVI, rounds 10 bits
    and odd sizes in another way, converts interlaced colours, and does not turn by every matrix; AV1 it cannot read.
    """
    halved = {"yuv420p": 2, "yuv422p": 1, "yuvj420p": 2, "yuvj422p": 1}.get(codec.pix_fmt or "", 0)
    odd = (halved >= 1 and codec.width % 2) or (halved >= 2 and codec.height % 2)
    return (
        container.startswith("mov,mp4")
        and b"moof" not in media  # the box of a fragment
        and codec.name in DECORD_CODECS
        and codec.pix_fmt in DECORD_FORMATS
        and not odd
        and codec.field_order in (0, 1)  # unknown (not told by HEVC and VP9), progressive
        and not _is_turned(media)
    )


def _is_turned(media: bytes) -> bool:
    """Whether a header of an MP4 or one of its tracks has another matrix than that of an upright picture."""
    for box in (b"mvhd", b"tkhd"):
        at = media.find(box)
        while at >= 0:
            if UPRIGHT not in media[at : at + 92]:  # of 64-bit times the matrix ends there
                return True
            at = media.find(box, at + 4)
    return False
