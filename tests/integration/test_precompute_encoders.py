"""Latents of a VAE of diffusers with several encoders' states, what must be the same from one start to the next, and
that no process outlives the one that started it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import lingen.latents.make
from data.shards import Index, load_index
from data.workers import Job
from lingen.compose import compose
from lingen.errors import LocalError, UserError
from lingen.loop import train
from tests.conftest import ENVIRONMENT, ROOT, World
from tests.integration.test_precompute import make_latents
from tests.runs import Signal, lines
from tests.text_models import save_byt5, save_t5
from tests.vaes import save

VIDEO = ["stage=demo_video", "stage.buckets=[{frames: 9, height: 32, width: 32, batch_size: 8}]", "stage.samples=8"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a Wan in bf16, a T5 and a ByT5 of what is quoted."""
    folder = tmp_path_factory.mktemp("encoders")
    vae = save(folder, "AutoencoderKLWan")
    save_t5(folder / "t5")
    save_byt5(folder / "byt5")
    t5, byt5 = "text.encoders.t5", "text.encoders.byt5"
    return [
        "autoencoder=diffusers", f"autoencoder.path={vae}", "autoencoder.channels=4", "autoencoder.time=4",
        "autoencoder.space=8", "autoencoder.dtype=bf16", "~text.encoders.minilm",
        f"{t5}.path={folder}/t5", f"{t5}.length=9", f"{t5}.dim=8",
        f"{byt5}.path={folder}/byt5", f"{byt5}.length=5", f"{byt5}.dim=8", f"{byt5}.quoted_only=true",
    ]  # fmt: skip


def test_a_vae_of_diffusers_and_several_text_encoders(world: World, encoders: list[str], tmp_path: Path) -> None:
    """A validation finds the same from what was stored as from the clips: of a held-out one both see the middle."""
    out, losses = tmp_path / "latents", []
    assert "64 latents of 1 buckets" in make_latents(
        world, world.shards, out, *VIDEO, *encoders, dtype="fp32", text_states=True
    )
    about = load_index(out).latents
    assert about is not None and list(about.text) == ["t5", "byt5"] and (about.time, about.space) == (4, 8)

    def start(name: str, data: Path, *more: str) -> None:
        given = [f"name={name}", f"runs_dir={tmp_path}", f"data.path={data}", "logger.console=false", *more]
        config = compose([*world.words, *VIDEO, *encoders, *given])
        assert train(config, Signal(tmp_path / name, None)) == 0  # type: ignore[arg-type]
        losses.append(lines(tmp_path / name, "validation")[0]["loss"])

    start("clips", world.shards)
    start("latents", out)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and losses[0] > 0
    with pytest.raises(UserError, match=r"text\.encoders\.t5\.dim=16, but the states in .* are 8 wide; set .*\.dim=8"):
        start("dim", out, "text.encoders.t5.dim=16")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("autoencoder.dtype=fp32", "was begun with autoencoder_dtype=bf16, not fp32"),
        ("autoencoder.tile={width: 16}", "was begun with tile=null, not .*16"),
    ],
)
def test_what_changes_the_bits_may_not_change_amid_a_folder(
    world: World, encoders: list[str], tmp_path: Path, word: str, message: str
) -> None:
    words = [*VIDEO, *encoders]
    make_latents(world, world.shards, tmp_path / "latents", *words)
    with pytest.raises(UserError, match=message):
        make_latents(world, world.shards, tmp_path / "latents", *words, word)


def test_no_process_outlives_the_one_that_was_killed(world: World, tmp_path: Path) -> None:
    own = [f"data={world.shards}", f"out={tmp_path}/latents", "windows=4", "samples_per_shard=1", "batch_size=1"]
    command = [sys.executable, "scripts/precompute.py", *world.words, *VIDEO, *own, "workers=2"]
    first = subprocess.Popen(command, env=os.environ | ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL)
    parts, end = tmp_path / "latents" / "parts", time.monotonic() + 60
    while len(list(parts.glob("*.json"))) < 2 and first.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    others = [process for process in psutil.Process(first.pid).children(recursive=True) if process.is_running()]
    first.kill()
    first.wait()
    assert others and psutil.wait_procs(others, timeout=60)[1] == []
    assert len(list(parts.glob("*.json"))) < 200  # of 256 at most: they ended before their work did


def test_a_lost_shard_is_told_by_whoever_meets_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(index: Index, data: Any, jobs: Iterator[Job]) -> Iterator[tuple[Any, list[Any]]]:
        next(jobs)
        yield SimpleNamespace(lost="shard-000000.tar cannot be read"), []

    monkeypatch.setattr(lingen.latents.make, "decode", decode)
    with pytest.raises(LocalError, match=r"shard-000000\.tar cannot be read"):
        make_latents(world, world.shards, tmp_path / "latents", *VIDEO)
    assert not list((tmp_path / "latents").glob("shard-*"))
