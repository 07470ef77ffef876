"""Sampling as a user does it: from a run, an export, a checkpoint; other shapes; bad words."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lingen.errors import UserError
from lingen.pipeline import LinGenPipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, world: Any, python: Any) -> Path:
    """A DiT after two steps."""
    runs = tmp_path_factory.mktemp("sampled")
    done = python(
        "train.py", "name=dit", f"runs_dir={runs}", *world.words, "model=dit", "stage=demo_video", "stage.samples=8",
        "stage.buckets.0.batch_size=4", "stage.buckets.1.batch_size=4", "validation.every_steps=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return runs / "dit"


@pytest.fixture(scope="module")
def pipeline(run: Path) -> LinGenPipeline:
    return LinGenPipeline.from_pretrained(run)


def test_the_script_writes_a_video_and_a_contact_sheet(run: Path, python: Any, tmp_path: Path) -> None:
    words = ["scripts/sample.py", f"checkpoint={run}", "prompt=a red circle: ../../moving, left", f"out={tmp_path}"]
    done = python(*words, "steps=2", "count=2", "seed=5", "kernels={attention: torch}")
    assert done.returncode == 0, done.stderr
    assert "attention torch" in done.stderr and "ssd torch" in done.stderr
    names = sorted(p.name for p in tmp_path.iterdir())
    stem = "a-red-circle-moving-left"
    assert names == [f"{stem}-5.mp4", f"{stem}-5.png", f"{stem}-6.mp4", f"{stem}-6.png"]
    with av.open(str(tmp_path / names[0])) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 8
    assert np.stack(frames).shape == (17, 64, 64, 3)
    with Image.open(tmp_path / names[1]) as sheet:
        assert sheet.size == (4 * 66 - 2, 4 * 66 - 2)


def test_a_video_depends_on_its_seed_and_prompt_alone(pipeline: LinGenPipeline) -> None:
    shape = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 3, "progress": False}
    prompts = ["a red circle", "a blue star", "a red circle"]
    both = pipeline(prompts, seeds=[1, 2, 3], **shape).frames  # type: ignore[arg-type]
    alone = pipeline(prompts[1], seeds=2, **shape).frames  # type: ignore[arg-type]
    assert both.shape == (3, 3, 9, 32, 48) and both.dtype == torch.uint8
    assert (both[1].int() - alone[0].int()).abs().max() <= 1  # a sum's order may differ with the batch
    assert not torch.equal(both[0], both[2])


def test_a_video_that_is_not_finite_is_said(pipeline: LinGenPipeline) -> None:
    def spoil(pipe: LinGenPipeline, step: int, sigma: float, tensors: Any) -> Any:
        tensors["latents"][1] = float("nan")

    shape = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 2, "progress": False}
    with pytest.warns(UserWarning, match="not all numbers are finite in the video of 'b'"):
        frames = pipeline(["a", "b"], seeds=[1, 2], callback_on_step_end=spoil, **shape).frames  # type: ignore[arg-type]
    assert torch.equal(frames[0], pipeline(["a", "b"], seeds=[1, 2], **shape).frames[0])  # type: ignore[arg-type]


def test_guidance_of_one_is_the_text_alone(pipeline: LinGenPipeline) -> None:
    shape = {"num_frames": 1, "height": 32, "width": 32, "num_inference_steps": 2, "progress": False}
    plain = pipeline(["a red circle"], guidance_scale=1.0, negative_prompt="a blue star", **shape).frames  # type: ignore[arg-type]
    other = pipeline(["a red circle"], guidance_scale=1.0, negative_prompt="", **shape).frames  # type: ignore[arg-type]
    assert torch.equal(plain, other)


def test_every_way_to_name_the_weights_gives_the_same(run: Path, pipeline: LinGenPipeline) -> None:
    stage = run / "checkpoints" / "demo_video"
    (step,) = stage.iterdir()
    for path in (run / "export" / "demo_video", stage, step):
        other = LinGenPipeline.from_pretrained(path)
        assert all(
            torch.equal(p, q) for p, q in zip(pipeline.model.parameters(), other.model.parameters(), strict=True)
        )
        assert other.stage == pipeline.stage


def test_bf16_samples_are_close_to_fp32(run: Path, pipeline: LinGenPipeline) -> None:
    half = LinGenPipeline.from_pretrained(run, dtype="bf16")
    assert {p.dtype for p in half.model.parameters()} == {p.dtype for p in half.untrained().model.parameters()}
    assert next(half.model.parameters()).dtype == torch.bfloat16
    shape = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 2, "progress": False}
    videos = [p(["a red circle"], **shape).frames.float() for p in (half, pipeline)]  # type: ignore[arg-type]
    assert (videos[0] - videos[1]).abs().mean() < 4  # of 255; so few steps of training may leave no difference at all


def test_the_untrained_model_is_another(pipeline: LinGenPipeline) -> None:
    fresh = pipeline.untrained().model.state_dict()
    assert any(not torch.equal(p, fresh[name]) for name, p in pipeline.model.state_dict().items())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["frames=16"], ["frames=16", "9 or 17"]),
        (["height=70"], ["height=70", "64 or 80"]),
        (["width=8"], ["width=8", "16"]),
        (["steps=0"], ["steps=0"]),
        (["guidance_scale=0.5"], ["guidance_scale=0.5"]),
        (["checkpoint=/nowhere"], ["/nowhere", "neither an export"]),
        (["autoencoder=/nowhere"], ["/nowhere", "does not exist"]),
        (["promt=a"], ["did you mean 'prompt'"]),
        (["device=gpu"], ["device=gpu", "cpu"]),
        (["kernels={conv: triton}"], ["kernels.conv=triton cannot run here", "it needs a GPU"]),
        (["kernels={conf: torch}"], ["kernels.conf", "did you mean 'conv'"]),
        (["out=/proc/nowhere"], ["out=/proc/nowhere cannot be written"]),
    ],
)
def test_bad_words_are_one_line(words: list[str], parts: list[str], run: Path, python: Any, tmp_path: Path) -> None:
    given = {"checkpoint": str(run), "prompt": "x", "out": str(tmp_path / "out")}
    given |= dict(word.split("=", 1) for word in words)
    done = python("scripts/sample.py", *(f"{key}={value}" for key, value in given.items()))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_half_written_export_is_refused(run: Path, tmp_path: Path) -> None:
    export = run / "export" / "demo_video"
    (tmp_path / "config.yaml").write_text((export / "config.yaml").read_text())
    whole = (export / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="incomplete"):
        LinGenPipeline.from_pretrained(tmp_path)


def test_prompts_that_lose_more_than_punctuation_keep_names_of_their_own() -> None:
    name = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "sample.py"))["file_name"]
    assert name("A red circle: ../../moving, left\n—", 0) == "a-red-circle-moving-left-0"
    assert name("?!", -3) == "video--3" and name("a" * 60, 1) == "a" * 60 + "-1"
    long = "a red circle moving left over a blue square that moves right, "
    lossy = ["日本語", "красный круг", "a 🔴", "a 🔵", "über", "a ber", long + "x", long + "y"]
    names = [name(prompt, 7) for prompt in lossy]
    assert len(set(names)) == len(lossy)
    assert all(re.fullmatch(r"[a-z0-9-]{1,60}(-[0-9a-f]{6})?-7", found) for found in names)
    assert re.fullmatch("video-[0-9a-f]{6}-7", names[0])


def test_prompts_of_punctuation_have_names_of_their_own(tmp_path: Path) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "sample.py"))
    (tmp_path / "prompts").write_bytes("\ufeffvideo\n?!\n...\n".encode())  # as editors on Windows write it
    words = script["Words"](checkpoint="x", out="x", prompts=str(tmp_path / "prompts"))
    found = script["jobs"](words, tmp_path)
    assert [prompt for prompt, _, _ in found] == ["video", "?!", "..."]
    assert len({name for _, _, name in found}) == 3


def test_an_out_that_cannot_be_written_is_named_before_sampling(run: Path, python: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    words = [f"checkpoint={run}", "steps=100000"]  # would take hours
    for script, out in (
        (["scripts/sample.py", "prompt=x"], tmp_path / "file"),
        (["scripts/check_colours.py"], tmp_path / "file" / "x.json"),
        (["scripts/check_colours.py"], tmp_path),
    ):
        done = python(*script, *words, f"out={out}")
        assert done.returncode == 2 and done.stderr.startswith(f"error: out={out} "), done.stderr
        assert done.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_colours_are_judged_with_the_autoencoder_that_is_named(
    run: Path, world: Any, python: Any, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.safetensors"
    shutil.copy(world.autoencoder, moved)
    out = tmp_path / "new" / "colours.json"
    words = ["scripts/check_colours.py", f"checkpoint={run}", f"out={out}", "seeds=1", "batch=3", "steps=1", "frames=1"]
    missing = python(*words, "autoencoder=nowhere")
    assert missing.returncode == 2 and "autoencoder.path=nowhere does not exist" in missing.stderr
    assert not out.parent.exists()
    done = python(*words, f"autoencoder={moved}")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(out.read_text())) == {"trained", "untrained", "videos"}


@pytest.mark.parametrize("device", ["cuda:99", "cuda:-1", "mps", "meta", "cpu:0", ""])
def test_a_device_that_is_not_here_is_refused(device: str, run: Path) -> None:
    with pytest.raises(UserError, match=f"device={device} is not to be seen here; give one of cpu"):
        LinGenPipeline.from_pretrained(run, device=device)


def test_a_precision_that_does_not_exist_is_refused() -> None:
    for name in ("fp16", torch.float16):
        with pytest.raises(UserError, match=f"dtype={name} is none of fp32, bf16"):
            LinGenPipeline.from_pretrained("/nowhere", dtype=name)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="/nowhere is neither"):
        LinGenPipeline.from_pretrained("/nowhere", device=torch.device("cpu"))  # the device is one


def test_what_fits_is_worked_out_once_a_size(pipeline: LinGenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def predict(config: Any, shape: Any, sampler: Any, **how: Any) -> int:
        asked.append(shape.frames)
        return 10**15 if shape.frames == 17 else 1

    monkeypatch.setattr("lingen.pipeline.predict_denoising", predict)
    small = {"height": 48, "width": 32, "num_inference_steps": 1, "progress": False}
    for frames in (1, 9, 1, 9):
        pipeline("a", num_frames=frames, **small)  # type: ignore[arg-type]
    assert asked == [1, 9]
    for _ in range(2):
        with pytest.raises(UserError, match="denoising 1 such videos"):
            pipeline("a", num_frames=17, **small)  # type: ignore[arg-type]


def test_a_refused_move_moves_nothing(pipeline: LinGenPipeline) -> None:
    with pytest.raises(UserError, match="dtype=fp16 is none of fp32, bf16"):
        pipeline.to("cpu", "fp16")  # type: ignore[arg-type]
    assert pipeline.dtype == torch.float32


def test_as_many_seeds_as_prompts(pipeline: LinGenPipeline) -> None:
    with pytest.raises(UserError, match="seeds: 2 for 3 prompts"):
        pipeline(["a", "b", "c"], seeds=[1, 2])


def test_another_autoencoder_is_refused(run: Path, world: Any, python: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    done = python("scripts/fit_autoencoder.py", f"data={world.shards}", f"out={other}", "clips=8")
    assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match=f"autoencoder.path={other} holds another autoencoder"):
        LinGenPipeline.from_pretrained(run, autoencoder=str(other))
