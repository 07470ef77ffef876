"""Training our own autoencoder: the loop of train.py, on tiny runs, and what comes out of it. Mostly in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lingen.tae_export
from data.pipeline import holdout_batches
from data.shards import load_index
from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders import load_autoencoder, to_float
from lingen.checkpoint import assemble
from lingen.compose import compose, compose_run
from lingen.config import BucketConfig, DataConfig, StageConfig
from lingen.errors import UserError
from lingen.loop import dry_run, train
from lingen.tae_config import TaeRunConfig
from tests.conftest import Command
from tests.runs import Signal, lines
from tests.unit.lingen.autoencoders.test_tae import vgg

Start = Callable[..., Path]
STAGES = ("tae_demo_image", "tae_demo_video")
SMALL = [
    "tae.width=4", "tae.multipliers=[1,2,2,2]", "tae.channels=4", "data.workers=0", "logger.wandb=disabled",
    "logger.console=false", "validation.every_steps=2", "validation.samples=4", "checkpoint.every_steps=2",
    "losses.adversarial.from_samples=8", "losses.adversarial.width=4", "losses.adversarial.levels=2",
    "export.samples=16", "export.shown=2", *(f"stages.{stage}.samples=16" for stage in STAGES),
    "stages.tae_demo_image.buckets=[{frames: 1, height: 32, width: 32, batch_size: 4}]",
    "stages.tae_demo_video.buckets=[{frames: 9, height: 32, width: 32, batch_size: 4, share: 3},"
    "{frames: 1, height: 32, width: 32, batch_size: 4}]",
]  # fmt: skip


def words(world: Any, tmp_path: Path, *more: str, name: str = "run") -> list[str]:
    return [f"name={name}", f"runs_dir={tmp_path}", f"data.path={world.shards}", *SMALL, *more]


@pytest.fixture
def start(world: Any, tmp_path: Path) -> Start:
    """Train in this process and return the run's folder; ``stop_at`` is a step that a signal comes in."""

    def run(*more: str, name: str = "run", stop_at: int | None = None) -> Path:
        config = compose_run(TaeRunConfig, "train_autoencoder", words(world, tmp_path, *more, name=name))
        stop = Signal(tmp_path / name, stop_at)
        assert train(config, stop) == (75 if stop_at else 0)  # type: ignore[arg-type]
        return tmp_path / name

    return run


def trained(run: Path) -> list[tuple[Any, ...]]:
    """Each step with its losses."""
    keys = ("step", "stage", "bucket", "loss", "grad_norm", "l1", "kl", "outlier", "adversarial", "discriminator")
    return [tuple(record[key] for key in keys) for record in lines(run, "train")]


def test_a_stopped_run_goes_on_bit_for_bit(start: Start) -> None:
    reference = start(name="reference")
    for stop_at in (2, 3, 6):  # at a checkpoint; amid two, when the game has begun; in the second stage
        run = start(stop_at=stop_at)
        assert trained(run)[-1][0] == stop_at
    assert start() == run and trained(run) == trained(reference)
    assert len(trained(run)) == 8 and {bucket for _, _, bucket, *_ in trained(run)} == {"9x32x32", "1x32x32"}
    ours, theirs = (lines(folder, "validation") for folder in (run, reference))
    for key in ("step", "at", "loss", "bucket_psnr"):
        assert [record[key] for record in ours] == [record[key] for record in theirs]
    for part in STAGES:
        made, expected = (load_file(folder / "export" / part / "model.safetensors") for folder in (run, reference))
        assert made.keys() == expected.keys() and all(tensor.equal(expected[name]) for name, tensor in made.items())


def test_the_game_begins_at_its_sample_and_checkpoints_hold_both(start: Start) -> None:
    run = start("until=tae_demo_image")
    judged = [record["discriminator"] for record in lines(run, "train")]
    assert judged[:2] == [0, 0] and all(loss > 0 for loss in judged[2:]) and len(judged) == 4
    before, after = (assemble(run / "checkpoints" / "tae_demo_image" / f"step_0000000{n}", "master") for n in (2, 4))
    for player in ("autoencoder.", "discriminator."):
        names = [name for name in before if name.startswith(player) and "qkv" not in name]
        assert any(not before[name].equal(after[name]) for name in names)
    past = [name for name in after if name.endswith("time.weight")]
    assert past and all((after[name][:, :, :-1] == 0).all() for name in past)  # images alone
    exported = load_file(run / "export" / "tae_demo_image" / "model.safetensors")
    assert not [name for name in exported if not name.startswith(("encoder.", "decoder.", "latent."))]


def test_the_export_is_an_autoencoder_for_train(start: Start, world: Any, tmp_path: Path) -> None:
    export = start() / "export" / "tae_demo_video"
    given = ["autoencoder=tae", f"autoencoder.path={export}", "autoencoder.channels=4", "autoencoder.dtype=fp32"]
    config = compose(
        [
            "name=video", f"runs_dir={tmp_path}", "debug=smoke", f"data.path={world.shards}", *given,
            "stage=demo_video", "stage.samples=8", "stage.buckets=[{frames: 9, height: 32, width: 32, batch_size: 4}]",
            "model=dit", "logger.console=false",
        ]
    )  # fmt: skip
    assert train(config, Signal(tmp_path / "video", None)) == 0  # type: ignore[arg-type]
    (transfer,) = lines(tmp_path / "video", "transfer")
    autoencoder = load_autoencoder(config.autoencoder, "cpu")
    assert transfer["autoencoder_fingerprint"] == autoencoder.fingerprint
    assert all(math.isfinite(record["loss"]) for record in lines(tmp_path / "video", "train"))


def one_bucket() -> StageConfig:
    bucket = BucketConfig(frames=1, height=32, width=32, batch_size=4)
    return StageConfig(name="s", buckets=[bucket], samples=4, lr=1, fps=8)


def test_latents_are_whitened_over_what_the_stage_draws(start: Start, world: Any) -> None:
    export = start("until=tae_demo_image", "export.samples=64") / "export" / "tae_demo_image"
    autoencoder = load_autoencoder(AutoencoderConfig(kind="tae", path=str(export), channels=4), "cpu")
    stage = one_bucket()
    data = DataConfig(path=world.shards.as_posix(), workers=0, holdout_share=0.999)  # nearly all of them, in fact
    batches = holdout_batches(
        load_index(world.shards), stage, stage.buckets[0], data, limit=64, batch_size=64, rank=0, world=1
    )
    latents = torch.cat([autoencoder.encode(batch.pixels[batch.valid]) for batch in batches])
    assert len(latents) > 50
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.3
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.3


def test_an_export_that_was_not_finished_is_made_by_the_next_start(start: Start, monkeypatch: Any) -> None:
    real = lingen.tae_export.page
    monkeypatch.setattr(lingen.tae_export, "page", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises((UserError, OSError), match="No space left"):
        start("until=tae_demo_image")
    monkeypatch.setattr(lingen.tae_export, "page", real)
    run = start("until=tae_demo_image")
    assert (run / "export" / "tae_demo_image" / "export.json").exists() and len(trained(run)) == 4


def test_a_few_hundred_steps_reconstruct(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """300 steps took 16.0 dB to 20.5 on held-out images."""
    image = "stages.tae_demo_image"
    run = start(
        "until=tae_demo_image", "tae.width=8", "tae.channels=16", f"{image}.samples=1200", f"{image}.lr=5e-4",
        "losses.adversarial.from_samples=1000", "validation.every_steps=1000", "checkpoint.every_steps=1000",
        "logger.console=true",
    )  # fmt: skip
    first, last = (record["bucket_psnr"]["1x32x32"] for record in lines(run, "validation"))
    assert last > first + 3, (first, last)
    assert f"PSNR 1x32x32 {last:.2f} dB" in " ".join(capsys.readouterr().out.split())
    page = (run / "export" / "tae_demo_image" / "reconstruction.html").read_text()
    assert page.count('alt="source of') == page.count('alt="result of') == 2 and "1x32x32" in page
    origin = json.loads((run / "export" / "tae_demo_image" / "export.json").read_text())
    assert origin["samples"] == 1200 and origin["stage"] == "tae_demo_image"


# ------------------------------------------------------------------------------------ several ranks


def test_two_ranks_train_as_one(start: Start, world: Any, tmp_path: Path, python: Command) -> None:
    alone = start("until=tae_demo_video")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = python(*torchrun, "scripts/train_autoencoder.py", *words(world, tmp_path, name="two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "perceptual off" in done.stdout and "adversarial 0.5 adaptive from sample 8" in done.stdout
    assert done.stdout.count("held-out PSNR") == 2
    for one, two in zip(trained(alone), trained(tmp_path / "two"), strict=True):
        assert one[:3] == two[:3] and two[3:] == pytest.approx(one[3:], rel=2e-3, abs=1e-5)


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["losses.perceptual.path=/nowhere.safetensors"], r"losses\.perceptual\.path=/nowhere\.safetensors does not"),
        (["data.path=/nowhere"], "/nowhere"),
        (["tae.time=3"], r"tae\.time=3 must be a power of 2"),
        (["tae.width=6"], r"tae\.width=6"),
        (["losses.wieght=1"], r"unknown key 'losses\.wieght'"),
        (["losses.kl=-1"], r"losses\.kl=-1"),
        (["engine=zero3"], r"engine\.zero_stage=3 gathers"),
        (["engine.sequence_parallel=2"], r"engine\.sequence_parallel shares out"),
        (["stages.tae_demo_image.timestep_shift=2"], r"timestep_shift is of a diffusion"),
        (["stages.tae_demo_video.buckets.0.frames=10"], r"frames=10 is not 8\*k \+ 1"),
        (["stages.tae_demo_image.buckets.0.height=36"], r"height=36 is not a multiple of 8"),
        (["validation.sigmas=8"], r"unknown key 'validation\.sigmas'"),
        (["autoencoder=pca"], "autoencoder"),
        (["until=demo"], "until=demo is none of the stages"),
    ],
)
def test_bad_words_are_one_line(start: Start, more: list[str], says: str) -> None:
    if more[0].startswith("stages.tae_demo_video.buckets.0"):
        more = ["stages.tae_demo_video.buckets=[{frames: 10, height: 32, width: 32, batch_size: 4}]"]
    if more[0].startswith("stages.tae_demo_image.buckets.0"):
        more = ["stages.tae_demo_image.buckets=[{frames: 1, height: 36, width: 32, batch_size: 4}]"]
    with pytest.raises(UserError, match=says) as caught:
        start(*more)
    assert "\n" not in str(caught.value)


def test_one_folder_holds_one_experiment(start: Start, world: Any, tmp_path: Path) -> None:
    run = start(stop_at=2)
    for word, part in (("losses.kl=1e-3", "losses.kl=1e-06, not 0.001"), ("tae.width=8", "tae.width=4, not 8")):
        with pytest.raises(UserError, match=part):
            start(word)
    video = compose(["name=run", f"runs_dir={tmp_path}", *world.words, "~stages.demo_video_128"])
    with pytest.raises(UserError, match=r"config\.yaml is of a run of scripts/train_autoencoder\.py"):
        train(video, Signal(run, None))  # type: ignore[arg-type]


def test_another_perceptual_network_amid_a_stage_is_refused(start: Start, tmp_path: Path) -> None:
    save_file(vgg(lpips=True), tmp_path / "vgg.safetensors")
    word = f"losses.perceptual.path={tmp_path}/vgg.safetensors"
    run = start(word, stop_at=2)
    assert all(record["perceptual"] > 0 for record in lines(run, "train"))
    save_file(vgg(), tmp_path / "vgg.safetensors")
    with pytest.raises(UserError, match=r"losses\.perceptual\.path holds another network"):
        start(word)


def test_a_channel_that_says_nothing_is_no_latent(start: Start, monkeypatch: Any) -> None:
    monkeypatch.setattr(lingen.tae_export, "LEAST_STD", 1e9)
    with pytest.raises(UserError, match=r"channels \[0, 1, 2, 3\] of the latents are the same in all of 16 clips"):
        start("until=tae_demo_image")


def test_the_plan_costs_nothing(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["tae=movie_gen", "curriculum=tae", "engine.device=cuda", "engine.dtype=bf16"]
    given = [f"name=plan runs_dir={tmp_path} data.path={world.shards}".split(), plan]
    config = compose_run(TaeRunConfig, "train_autoencoder", [word for part in given for word in part])
    assert dry_run(config) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "16 channels" in out and "17x256x256" in out and "tae_video_256: " in out
    assert not (tmp_path / "plan").exists()


def test_pixels_of_the_page_are_the_autoencoders(start: Start, world: Any) -> None:
    """The PSNR of the page is that of what ``load_autoencoder`` gives."""
    export = start("until=tae_demo_image") / "export" / "tae_demo_image"
    autoencoder = load_autoencoder(AutoencoderConfig(kind="tae", path=str(export), channels=4), "cpu")
    stage, data = one_bucket(), DataConfig(path=str(world.shards))
    batches = holdout_batches(
        load_index(world.shards), stage, stage.buckets[0], data, limit=1, batch_size=1, rank=0, world=1
    )
    pixels = next(batches).pixels
    error = (autoencoder.decode(autoencoder.encode(pixels)) - to_float(pixels)).square().mean().item()
    assert f"{10 * math.log10(4 / error):.2f} dB" in (export / "reconstruction.html").read_text()
