"""The command that fits the autoencoder to shards, and what it says where it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from data.decode import ClipInfo
from data.encode import encode_mp4
from data.shards import Record, write_shards
from data.synthetic import render_clip
from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders import load_autoencoder

ROOT = Path(__file__).parents[2]


def _fit(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "fit_autoencoder.py"), *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=120)


def _record(number: int, media: bytes) -> Record:
    info = ClipInfo(frames=9, fps=8.0, height=32, width=32)
    return Record(f"clip-{number:03d}", "a clip", media, "mp4", info, ("txt", b"a clip"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 clips of 9x32x32, of which one is broken."""
    folder = tmp_path_factory.mktemp("shards")
    clips = (encode_mp4(render_clip(0, i, frames=9, size=32)[0], 8.0) for i in range(40))
    write_shards((_record(i, b"broken" if i == 7 else media) for i, media in enumerate(clips)), folder)
    return folder


SMALL = ("channels=8", "time=4", "frames=9", "height=32", "width=32", "holdout_share=0.3")


def test_it_fits_measures_and_writes(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "ae.safetensors"
    done = _fit(f"data={shards}", f"out={out}", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "left out: 1 (cannot be decoded)" in done.stdout
    with safe_open(out, framework="np") as file:
        metadata = file.metadata()
    assert f"clips of 9x32x32 {float(metadata['psnr']):.2f} dB, images not measured" in done.stdout
    assert float(metadata["psnr"]) > 20
    assert (metadata["kind"], metadata["channels"], metadata["time"], metadata["space"]) == ("pca", "8", "4", "8")
    config = AutoencoderConfig(kind="pca", path=str(out), channels=8, time=4, space=8)
    fingerprint = load_autoencoder(config, "cpu").fingerprint
    assert [p.name for p in out.parent.iterdir()] == [out.name]

    again = _fit(f"data={shards}", f"out={out}", *SMALL)
    assert again.returncode == 2 and f"out={out} exists" in again.stderr
    out.unlink()
    assert _fit(f"data={shards}", f"out={out}", *SMALL).returncode == 0
    assert load_autoencoder(config, "cpu").fingerprint == fingerprint


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("channels=8", "time=4", "frames=17"), "frames=17 at fps=8 need 2 s of footage, which no clip"),
        (("frames=16",), "frames=16 must be 8*k + 1"),
        (("height=60",), "height=60 must be a multiple of space=8"),
        (
            ("holdout_share=0.99999", "channels=8", "time=4", "frames=9"),
            "holdout_share=0.99999 holds out all 40 samples",
        ),
        (("chanels=8",), "unknown key 'chanels'; did you mean 'channels'?"),
    ],
)
def test_bad_words_are_named(shards: Path, tmp_path: Path, words: tuple[str, ...], named: str) -> None:
    done = _fit(f"data={shards}", f"out={tmp_path / 'ae.safetensors'}", *words)
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_shards_without_a_good_sample_are_refused(tmp_path: Path) -> None:
    write_shards((_record(i, np.random.default_rng(i).bytes(500)) for i in range(3)), tmp_path / "shards")
    done = _fit(f"data={tmp_path / 'shards'}", f"out={tmp_path / 'ae.safetensors'}", *SMALL)
    assert done.returncode == 2 and "there is nothing to fit to (" in done.stderr


def test_an_out_that_cannot_be_written_is_named_before_the_fit(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "ae.safetensors", Path("/proc/nowhere/ae.safetensors")):
        done = _fit(f"data={shards}", f"out={out}", *SMALL)
        assert done.returncode == 2 and done.stderr.startswith(f"error: out={out} cannot be written: ")
        assert "fitting" not in done.stdout + done.stderr  # its bar


def test_images_that_are_all_held_out_are_said(tmp_path: Path) -> None:
    info = ClipInfo(frames=1, fps=0.0, height=32, width=32)
    images = (Record(f"image-{i}", "an image", b"-", "png", info, ("txt", b"an image")) for i in range(5))
    write_shards(images, tmp_path / "shards")
    done = _fit(f"data={tmp_path / 'shards'}", f"out={tmp_path / 'ae'}", *SMALL[:-1], "holdout_share=0.99999")
    assert done.returncode == 2 and "holdout_share=0.99999 holds out all 5 samples" in done.stderr
