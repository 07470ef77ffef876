"""Latents instead of clips: the same losses, whoever made them and however often they were stopped; what is refused."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.buckets import assign
from data.decode import ClipInfo, decode_clip, probe
from data.encode import encode_mp4
from data.shards import Index, Record, load_index, read_member, write_shards
from data.writer import ShardWriter
from lingen.compose import compose
from lingen.config import DataConfig
from lingen.dist import Place
from lingen.errors import UserError
from lingen.latents.folder import Folder
from lingen.latents.make import Words, precompute
from lingen.loop import train
from tests.conftest import ENVIRONMENT, ROOT, World
from tests.runs import Signal, lines

VIDEO = ["stage=demo_video", "stage.buckets=[{frames: 17, height: 64, width: 64, batch_size: 8}]", "stage.samples=48"]
SHARES = {17: 2, 9: 1, 1: 1}  # of the steps, by a bucket's frames


def record(index: Index, n: int) -> Record:
    info = ClipInfo(int(index.frames[n]), float(index.fps[n]), int(index.height[n]), int(index.width[n]))
    suffix = "mp4" if info.frames > 1 else "png"
    return Record(index.key[n], index.caption[n], read_member(index, n), suffix, info, ("txt", b"caption"))


@pytest.fixture(scope="module")
def videos(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's 64 videos alone, each exactly as long as the bucket: there is one window."""
    out = tmp_path_factory.mktemp("precompute") / "videos"
    index = load_index(world.shards)
    write_shards((record(index, n) for n in np.flatnonzero(index.frames > 1)), out, samples_per_shard=16)
    return out


def make_latents(world: World, data: Path, out: Path, *words: str, **own: Any) -> str:
    """Precompute in this process."""
    config = compose(["name=precompute", *world.words, f"data.path={data}", *(words or VIDEO)])
    asked = Words.model_validate({"data": str(data), "out": str(out), "workers": 1, "samples_per_shard": 16} | own)
    return precompute(asked, config, Place(0, 1, 0))


@pytest.fixture(scope="module")
def latents(world: World, videos: Path) -> Path:
    """Of the videos, in fp32, with the captions' states. To be read only."""
    out = videos.with_name("latents")
    said = make_latents(world, videos, out, dtype="fp32", text_states=True)
    assert "64 latents of 1 buckets in 4 shards" in said and "rejected: 0" in said
    return out


@pytest.fixture
def run(world: World, tmp_path: Path) -> Callable[..., list[list[float]]]:
    """Train on some shards: the losses, the gradient norms and the validation losses."""

    def start(name: str, data: Path, *words: str) -> list[list[float]]:
        small = [f"data.path={data}", "logger.console=false", "validation.every_steps=3", *VIDEO]
        config = compose([f"name={name}", f"runs_dir={tmp_path}", *world.words, *small, *words])
        assert train(config, Signal(tmp_path / name, None)) == 0  # type: ignore[arg-type]
        steps, held_out = lines(tmp_path / name, "train"), lines(tmp_path / name, "validation")
        return [[r["loss"] for r in steps], [r["grad_norm"] for r in steps], [r["loss"] for r in held_out]]

    return start


def content(folder: Path) -> dict[str, bytes]:
    """What a finished folder holds."""
    assert not list(folder.glob("*.tmp")) and not (folder / "parts").exists()
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_latents_give_the_losses_of_the_pixels(
    run: Callable[..., list[list[float]]], videos: Path, latents: Path
) -> None:
    words = ["logger.every_steps=1", "flow.caption_dropout=0.5", "text.encoders.minilm.dropout=0.2"]
    from_pixels = run("pixels", videos, *words)
    from_latents = run("latents", latents, *words, "data.workers=1")
    assert len(from_pixels[0]) == 6 and len(from_pixels[2]) >= 3
    for ours, theirs in zip(from_latents, from_pixels, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.fixture(scope="module")
def mixed(videos: Path, world: World) -> Path:
    """Clips of 17 frames, then of 9, then images: 16 of each, a shard each, as their latents will lie."""
    index, records = load_index(world.shards), []
    for n in np.flatnonzero(index.frames > 1)[:32]:
        if len(records) < 16:
            records.append(record(index, n))
            continue
        pixels = decode_clip(read_member(index, n), frames=9, height=64, width=64, fps=8, start=0)
        media = encode_mp4(pixels.permute(1, 2, 3, 0).contiguous().numpy(), 8.0)
        records.append(Record(index.key[n], index.caption[n], media, "mp4", probe(media), ("txt", b"caption")))
    records += [record(index, n) for n in np.flatnonzero(index.frames == 1)[:16]]
    write_shards(records, videos.with_name("mixed"), samples_per_shard=16)
    return videos.with_name("mixed")


def test_latents_of_several_buckets_give_the_losses_of_the_pixels(
    run: Callable[..., list[list[float]]], world: World, mixed: Path
) -> None:
    """A clip of 17 frames would do for 9, too; from either it is trained on in one bucket alone."""
    shapes = [f"{{frames: {n}, height: 64, width: 64, batch_size: 4, share: {share}}}" for n, share in SHARES.items()]
    words = ["stage=demo_video", f"stage.buckets=[{', '.join(shapes)}]", "stage.samples=32", "data.holdout_share=0.2"]
    latents = mixed.with_name("mixed-latents")
    said = make_latents(world, mixed, latents, *words, dtype="fp32")
    assert "48 latents of 3 buckets in 3 shards" in said
    stage = compose(["name=n", *world.words, *words]).stages["demo_video"]
    for path in (mixed, latents):
        index, data = load_index(path), DataConfig(path=str(path))
        assert [rows.tolist() for rows in assign(index, stage, data).rows.values()] == [
            list(range(16)), list(range(16, 32)), list(range(32, 48)),
        ]  # fmt: skip
    from_pixels, from_latents = (run(path.name, path, *words[1:], "logger.every_steps=1") for path in (mixed, latents))
    assert len(from_pixels[0]) == 8
    for ours, theirs in zip(from_latents, from_pixels, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_the_index_says_what_the_latents_are(world: World, videos: Path, latents: Path) -> None:
    index, source = load_index(latents), load_index(videos)
    about = index.latents
    assert about is not None and about.source == source.fingerprint and about.dtype == "fp32"
    assert [str(bucket) for bucket in about.buckets] == ["17x64x64 at fps=8"]
    assert index.key == [f"{key}@17x64x64-0-0" for key in source.key] and index.caption == source.caption
    assert np.array_equal(index.key_hash, source.key_hash)  # the same samples are held out
    assert np.allclose(index.begin, 0) and np.allclose(index.end, 17 / 8)
    assert len(about.mean) == len(about.std) == 16 and all(0.5 < one < 2 for one in about.std)
    assert set(about.text) == {"minilm"} and (latents / "empty.safetensors").exists()


def test_processes_and_restarts_make_the_same_bytes(
    world: World, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, stopped, three = tmp_path / "reference", tmp_path / "stopped", tmp_path / "three"
    make_latents(world, videos, reference)
    wanted = content(reference)
    words = [*world.words, *VIDEO, f"data={videos}", f"out={three}", "samples_per_shard=16", "workers=2"]
    command = [sys.executable, "scripts/precompute.py", *words]
    of_two = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}  # as torchrun says it: workers=2 counts for nothing
    together = [
        subprocess.Popen(command, env=os.environ | ENVIRONMENT | launcher, cwd=ROOT) for launcher in ({}, of_two)
    ]
    add, added = Folder.add, []

    def add_twice(self: Folder, number: int, part: Any) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(number)
        add(self, number, part)

    monkeypatch.setattr(Folder, "add", add_twice)
    with pytest.raises(KeyboardInterrupt):
        make_latents(world, videos, stopped)
    monkeypatch.undo()
    with pytest.raises(UserError, match="not complete"):
        load_index(stopped)
    before = {n: (stopped / f"shard-{n:06d}.tar").stat().st_mtime_ns for n in added}
    make_latents(world, videos, stopped)
    assert {n: (stopped / f"shard-{n:06d}.tar").stat().st_mtime_ns for n in added} == before and len(before) == 2
    assert content(stopped) == wanted
    assert [process.wait(timeout=120) for process in together] == [0, 0] and content(three) == wanted
    make_latents(world, videos, three)  # there is nothing left to do
    assert content(three) == wanted


def test_a_full_disk_leaves_whole_shards(
    world: World, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, out = ShardWriter.close, tmp_path / "latents"

    def full(self: ShardWriter) -> Any:
        if self.number == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return close(self)

    monkeypatch.setattr(ShardWriter, "close", full)
    with pytest.raises(UserError, match=r"out=.*cannot be written: No space left"):
        make_latents(world, videos, out)
    assert [path.name for path in out.glob("shard-*")] == ["shard-000000.tar"]
    monkeypatch.undo()
    make_latents(world, videos, out)
    assert len(load_index(out)) == 64


def test_broken_clips_are_left_out_and_counted(world: World, videos: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(videos, damaged)
    index = load_index(damaged)
    with index.shard_paths[0].open("r+b") as shard:
        for n in (1, 3):
            shard.seek(int(index.offset[n]) + 100)
            shard.write(b"\0" * 64)
    with pytest.raises(UserError, match=r"2 of 64 samples are bad.*wrong checksum.*max_bad_share=0"):
        make_latents(world, damaged, tmp_path / "latents", *VIDEO, "data.max_bad_share=0")
    assert "rejected: 2" in make_latents(world, damaged, tmp_path / "latents")
    made = load_index(tmp_path / "latents")
    assert len(made) == 62 and index.key[1] in (tmp_path / "latents" / "rejected.jsonl").read_text()


def test_windows_are_spread_and_held_out_clips_have_their_middle(world: World, videos: Path, tmp_path: Path) -> None:
    words = ["stage=demo_video", "stage.buckets=[{frames: 9, height: 32, width: 32, batch_size: 8}]"]
    make_latents(world, videos, tmp_path / "latents", *words, windows=3)
    index = load_index(tmp_path / "latents")
    windows: dict[str, list[float]] = {}
    for key, begin, end in zip(index.key, index.begin, index.end, strict=True):
        windows.setdefault(key.partition("@")[0], []).append(float(begin))
        assert end - begin == pytest.approx(9 / 8)
    held_out = {key.partition("@")[0] for n, key in enumerate(index.key) if index.key_hash[n] < 0.05 * 2**64}
    assert 0 < len(held_out) < 64 == len(windows)
    for key, begins in windows.items():  # a second to move in
        assert begins == pytest.approx([0.5] if key in held_out else [1 / 6, 3 / 6, 5 / 6])


def test_several_stages_share_a_folder(world: World, tmp_path: Path) -> None:
    said = make_latents(world, world.shards, tmp_path / "latents", "curriculum=demo", "~stages.demo_video_128")
    assert "128 latents of 2 buckets in 8 shards" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage.fps=4"], "holds no latents for 17x64x64 at fps=4, but for 17x64x64 at fps=8"),
        (["stage.buckets=[{frames: 9, height: 64, width: 64, batch_size: 8}]"], "holds no latents for 9x64x64"),
        (["data.holdout_share=0.1"], r"data.holdout_share=0.1, .* set data.holdout_share=0.05"),
        (["text.encoders.minilm.length=8"], "text.encoders.minilm: .* made the states in data.path="),
        (["autoencoder.path={other}"], r"holds latents of another autoencoder .* than autoencoder.path="),
    ],
)
def test_a_run_that_does_not_fit_its_latents_is_refused(
    run: Callable[..., list[list[float]]], latents: Path, videos: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    if words[0].startswith("autoencoder"):
        fit = ["scripts/fit_autoencoder.py", f"data={videos}", f"out={tmp_path / 'other'}", "clips=16", "heldout=1"]
        subprocess.run([sys.executable, *fit], cwd=ROOT, env=os.environ | ENVIRONMENT, check=True, capture_output=True)
        words = [f"autoencoder.path={tmp_path / 'other'}"]
    with pytest.raises(UserError, match=message):
        run("refused", latents, *words)
    assert not (tmp_path / "refused").exists()


def test_bad_words_are_refused(world: World, videos: Path, latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds latents, and this needs the shards"):
        make_latents(world, latents, tmp_path / "out")
    with pytest.raises(UserError, match="holds other shards"):
        make_latents(world, videos, videos.with_name("videos"))
    with pytest.raises(UserError, match="was begun with dtype=fp32, not bf16"):
        make_latents(world, videos, latents, dtype="bf16", text_states=True)
    with pytest.raises(UserError, match=r"bucket 65x64x64 at fps=8 is empty: .*8\.00 s of footage"):
        long = ["stage=demo_video", "stage.buckets=[{frames: 65, height: 64, width: 64, batch_size: 8}]"]
        make_latents(world, videos, tmp_path / "out", *long)
