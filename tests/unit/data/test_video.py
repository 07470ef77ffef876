"""Which frames two decoders give: codecs, containers, depths, sizes, rotation, edit lists, files without pictures."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from data.decode import BadSample, decode_clip, probe
from data.video import CHUNK_BYTES, Frames, open_media, open_video

X264 = "log-level=none:threads=1:mbtree=0"  # the same file each time
H264 = {"crf": "10", "x264-params": f"bframes=2:keyint=8:{X264}"}
HEVC = {"x265-params": "log-level=none:keyint=8:crf=10:open-gop=0"}


def drawing(frames: int, height: int, width: int) -> Frames:
    """A textured picture that moves by a pixel a frame; the number of a frame is written in its top left, in greys."""
    chance = np.random.default_rng(0)
    blocks = chance.integers(0, 200, (height // 8 + frames, width // 8 + 2, 3)).astype(np.uint8)
    ground = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    made = np.stack([ground[n : n + height, :width] for n in range(frames)])
    made[:, : height // 2, : width // 2] = (6 * np.arange(frames) + 20)[:, None, None, None]
    return made


def number(picture: Frames) -> int:
    """Of the frame, read from a picture (H, W, 3) of a ``drawing`` at any size."""
    height, width = picture.shape[:2]
    corner = picture[1 : max(2, height // 2 - 6), 1 : max(2, width // 2 - 6)]
    return round((float(corner.mean()) - 20) / 6)


def encode(
    codec: str = "libx264",
    *,
    pixels: str = "yuv420p",
    container: str = "mp4",
    shape: tuple[int, int, int] = (24, 64, 96),
    options: dict[str, str] | None = None,
    stamps: Sequence[int] | None = None,
    turned: float | None = None,
    audio: bool = False,
    rate: int = 25,
    muxing: dict[str, str] | None = None,
) -> bytes:
    """A ``drawing`` of ``shape`` (F, H, W) as a file."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=muxing or {}) as made:
        stream: Any = made.add_stream(codec, rate=rate, options=H264 if options is None else options)
        stream.height, stream.width, stream.pix_fmt = shape[1], shape[2], pixels
        if turned is not None:
            stream.set_display_rotation(turned)
        sound: Any = made.add_stream("aac", rate=44100, layout="mono") if audio else None
        for n, picture in enumerate(drawing(*shape)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = n if stamps is None else stamps[n]
            frame.time_base = Fraction(1, rate)
            made.mux(stream.encode(frame))
        made.mux(stream.encode())
        if sound is not None:
            made.mux(sound.encode(silence()))
            made.mux(sound.encode())
    return out.getvalue()


def read(media: bytes, indices: list[int], decoder: Any = "pyav") -> Frames:
    with open_video(media) as video:
        return np.concatenate([piece.frames for piece in video.frames(indices, decoder)])


def silence() -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
    return frame


PLAIN = {
    "h264": {},
    "h264 without key frames": {"options": {"crf": "10", "x264-params": f"keyint=999:{X264}"}},
    "h264 bt709": {"options": {"x264-params": f"colormatrix=bt709:{X264}"}},
    "h264 4:2:2": {"pixels": "yuv422p"},
    "h264 4:4:4 odd": {"pixels": "yuv444p", "shape": (24, 37, 77)},
    "hevc": {"codec": "libx265", "options": HEVC},
    "vp9": {"codec": "libvpx-vp9", "options": {"crf": "10", "g": "8"}},
    "mpeg4": {"codec": "mpeg4", "options": {"b": "4M", "g": "8"}},
    "uneven times": {"stamps": [3 * n for n in range(10)] + [30 + 15 * n for n in range(14)]},
}
OTHERS = {
    "h264 with open groups": {"options": {"crf": "10", "x264-params": f"open-gop=1:keyint=8:bframes=3:{X264}"}},
    "hevc with open groups": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=8:crf=10"}},
    "h264 10 bit": {"pixels": "yuv420p10le"},
    "h264 interlaced": {"options": {"x264-params": f"tff=1:keyint=8:{X264}"}},
    "h264 in fragments": {
        "options": {"crf": "10", "x264-params": f"bframes=2:keyint=2:{X264}"},
        "muxing": {"movflags": "+frag_keyframe+empty_moov"},
    },
    "h264 matroska": {"container": "matroska"},
    "h264 ts": {"container": "mpegts"},
    "h264 avi": {"container": "avi"},
    "frames that stay, avi": PLAIN["mpeg4"] | {"container": "avi", "rate": 50, "stamps": range(0, 48, 2)},
    "hevc 10 bit": {"codec": "libx265", "pixels": "yuv420p10le", "options": HEVC},
    "vp9 odd webm": {"codec": "libvpx-vp9", "shape": (24, 37, 51), "container": "webm", "options": {"crf": "10"}},
    "vp8 webm": {"codec": "libvpx", "container": "webm", "options": {"auto-alt-ref": "1", "lag-in-frames": "9"}},
    "av1": {"codec": "libsvtav1", "shape": (24, 64, 96), "options": {"preset": "12", "crf": "10"}},
    "av1 10 bit": {"codec": "libsvtav1", "pixels": "yuv420p10le", "options": {"preset": "12", "crf": "10"}},
    "mpeg2 ts": {"codec": "mpeg2video", "container": "mpegts", "options": {"b": "4M", "g": "8", "bf": "2"}},
    "mjpeg": {"codec": "mjpeg", "pixels": "yuvj420p", "container": "avi", "options": {"q": "2"}},
    "ffv1": {"codec": "ffv1", "container": "matroska", "options": {}},
    "gif": {"codec": "gif", "pixels": "rgb8", "container": "gif", "options": {}},
}


@pytest.mark.parametrize("name", PLAIN)
def test_both_decoders_give_the_same_bits(name: str) -> None:
    """Frame by frame and from anywhere; and they are the right frames."""
    pytest.importorskip("decord")
    media = encode(**PLAIN[name])
    with open_video(media) as video:
        assert video.suits_decord
    for picked in (list(range(24)), [13], [5, 9, 9, 17, 23], [23], [0, 22]):
        with open_video(media) as video:
            by_decord = np.concatenate(list(video._decord(picked)))
        assert (by_decord == read(media, picked)).all()
        assert [number(picture) for picture in by_decord] == picked


@pytest.mark.parametrize("name", OTHERS)
def test_what_decord_gets_wrong_is_decoded_by_pyav(name: str) -> None:
    media = encode(**OTHERS[name])
    with open_video(media) as video:
        assert len(video.stamps) == 24 and not video.suits_decord
    whole = read(media, list(range(24)))
    assert [number(picture) for picture in whole] == list(range(24))
    for picked in ([13], [5, 9, 9, 17, 23], [23], [0, 22]):
        assert (read(media, picked, "decord") == whole[picked]).all()
    info = probe(media)
    assert info.frames == 24 and info.fps == pytest.approx(25, rel=0.02)


def test_what_decord_refuses_goes_to_pyav_in_the_middle() -> None:
    """It cannot copy the padded rows of a picture 16 pixels wide."""
    media = encode(shape=(24, 16, 16))
    with open_video(media) as video:
        assert video.suits_decord and not list(video._decord([0, 1]))
    assert (read(media, [3, 7], "decord") == read(media, [3, 7])).all()


@pytest.mark.parametrize(("turned", "shape"), [(90, (96, 64)), (180, (64, 96)), (270, (96, 64))])
def test_rotation(turned: int, shape: tuple[int, int]) -> None:
    straight, media = encode(), encode(turned=turned)
    with open_video(media) as video:
        assert not video.suits_decord
    assert (probe(media).height, probe(media).width) == shape
    expected = np.rot90(read(straight, [7])[0], turned // 90)  # av counts the other way round than EXIF, as numpy does
    assert (read(media, [7])[0] == expected).all()


def test_a_mirrored_video() -> None:
    media = encode()
    at = media.index(b"tkhd") + 44
    mirrored = media[:at] + struct.pack(">9i", -1 << 16, 0, 0, 0, 1 << 16, 0, 96 << 16, 0, 1 << 30) + media[at + 36 :]
    with open_video(mirrored) as video:
        assert not video.suits_decord
    assert (read(mirrored, [7])[0] == read(media, [7])[0, :, ::-1]).all()


def test_pixels_that_are_not_square() -> None:
    media = encode(options={"x264-params": f"sar=2/1:{X264}"})
    assert (probe(media).height, probe(media).width) == (64, 192)
    clip = decode_clip(media, frames=1, height=16, width=48, fps=8, start=0)  # all of it, undistorted
    assert number(clip[:, 0].permute(1, 2, 0).numpy()) == 0
    half = decode_clip(media, frames=1, height=16, width=24, fps=8, start=0)  # its middle
    assert (half.float() - clip[..., 12:36].float()).abs().mean() < 4


def test_an_interlaced_frame_shows_one_moment() -> None:
    media = encode(options={"crf": "1", "x264-params": f"tff=1:{X264}"})
    with open_media(media) as container:
        assert next(container.decode(video=0)).interlaced_frame
    picture = read(media, [5])[0]
    assert (picture[0::2] == picture[1::2]).all()
    odd = encode("ffv1", container="matroska", shape=(3, 37, 51), pixels="yuv444p", options={})
    assert read(odd, [1])[0].shape == (37, 51, 3)


def test_an_edit_list_leaves_frames_out() -> None:
    """Its first eight frames are cut off in the header alone; who reads packets only would count them."""
    media = encode(options={"x264-params": f"bframes=0:keyint=12:{X264}"})
    at = media.index(b"elst") + 12
    duration, begin, rate = struct.unpack(">Iii", media[at : at + 12])
    with open_media(media) as container:
        scale = container.streams.video[0].time_base.denominator
    cut = media[:at] + struct.pack(">Iii", duration * 16 // 24, begin + 8 * scale // 25, rate) + media[at + 12 :]
    with open_video(cut) as video:
        assert len(video.stamps) == 16 and not video.suits_decord
    assert [number(picture) for picture in read(cut, [0, 3, 4, 15])] == [8, 11, 12, 23]
    assert probe(cut).frames == 16


def test_a_wrong_duration_in_the_header() -> None:
    media = encode(audio=True)
    for box in (b"mvhd", b"mdhd", b"tkhd"):
        at = media.index(box) + (24 if box == b"tkhd" else 20)
        media = media[:at] + struct.pack(">I", 10**7) + media[at + 4 :]
    info = probe(media)
    assert (info.frames, round(info.fps)) == (24, 25)
    with pytest.raises(BadSample, match="too short"):
        decode_clip(media, frames=20, height=32, width=32, fps=8, start=0)


def test_an_avi_that_was_cut() -> None:
    media = encode(**OTHERS["frames that stay, avi"])
    with pytest.raises(BadSample, match="truncated"):
        probe(media[: len(media) * 9 // 10])


def test_sound_alone_and_a_cover_picture_are_no_video() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as made:
        stream: Any = made.add_stream("aac", rate=44100, layout="mono")
        made.mux(stream.encode(silence()))
        made.mux(stream.encode())
    with pytest.raises(BadSample, match="no video"):
        probe(out.getvalue())


def test_a_video_without_frames() -> None:
    media = encode(shape=(1, 64, 96))
    at = media.index(b"stsz") + 8
    media = media[:at] + struct.pack(">II", 0, 0) + media[at + 8 :]
    with pytest.raises(BadSample):
        probe(media)


def test_one_pixel() -> None:
    media = encode(pixels="yuv444p", shape=(24, 1, 1), options={"x264-params": X264})
    assert (probe(media).frames, probe(media).height, probe(media).width) == (24, 1, 1)
    assert decode_clip(media, frames=4, height=16, width=16, fps=8, start=0).shape == (3, 4, 16, 16)


def many_frames(copies: int) -> bytes:
    """The packets of a second, again and again: encoding so many frames would take long."""
    source, out = encode(shape=(25, 48, 64), options={"x264-params": f"bframes=0:keyint=25:{X264}"}), io.BytesIO()
    with open_media(source) as container, av.open(out, "w", format="mp4") as made:
        stream = made.add_stream_from_template(container.streams.video[0])
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
        for n in range(copies * len(packets)):
            packet = av.Packet(packets[n % len(packets)])
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = n
            packet.is_keyframe = n % len(packets) == 0
            made.mux(packet)
    return out.getvalue()


def test_a_hundred_thousand_frames_are_not_decoded() -> None:
    media = many_frames(4000)
    assert probe(media).frames == 100_000
    began, before = time.process_time(), psutil.Process().memory_info().rss
    for decoder in ("decord", "pyav"):
        clip = decode_clip(media, frames=5, height=48, width=64, fps=25, start=0.50001, decoder=decoder)
        begin = round(0.50001 * (100_000 - 5)) % 25
        assert [number(clip[:, n].permute(1, 2, 0).numpy()) for n in range(5)] == [(begin + n) % 25 for n in range(5)]
    assert time.process_time() - began < 10  # decoding them all takes much longer
    assert psutil.Process().memory_info().rss - before < 150 << 20


def test_pictures_are_held_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    media = encode(pixels="yuv444p")
    monkeypatch.setattr("data.video.CHUNK_BYTES", 5 * 64 * 96 * 3)
    for decoder, expected in (("decord", [5, 5, 2]), ("pyav", 12 * [1])):
        with open_video(media) as video:
            sizes = [len(piece.frames) for piece in video.frames(list(range(12)), decoder)]
        assert sizes == expected
    assert CHUNK_BYTES > 3840 * 2160 * 3


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_decoded_small_is_the_jpeg_decoded_whole(orientation: int) -> None:
    """To within a level in the mean."""
    picture = drawing(1, 600, 900)[0]
    smooth = Image.fromarray(picture).resize((1800, 1200), Image.Resampling.BICUBIC)
    exif, kinds = Image.Exif(), []
    exif[0x0112] = orientation
    for kind in ("jpeg", "png"):
        out = io.BytesIO()
        smooth.save(out, kind, exif=exif, quality=95, subsampling=0)
        kinds.append(decode_clip(out.getvalue(), frames=1, height=96, width=128, fps=8, start=0).float())
    assert (kinds[0] - kinds[1]).abs().mean() < 1
    assert (kinds[0] - torch.flip(kinds[1], (-1,))).abs().mean() > 10  # the measure sees a difference


def test_damage_in_the_middle_is_a_bad_sample_or_pictures_for_both() -> None:
    media = bytearray(encode(shape=(48, 64, 96), options={"x264-params": f"bframes=0:keyint=999:{X264}"}))
    middle = media.index(b"mdat") + 4 + (len(media) - media.index(b"mdat")) // 3
    media[middle : middle + 200] = bytes(200)
    results = []
    for decoder in ("decord", "pyav"):
        try:
            results.append(read(bytes(media), list(range(40)), decoder).tobytes())
        except BadSample as bad:
            results.append(bad.reason)
    assert results[0] == results[1]
