"""The pipeline as a user of diffusers meets it: its arguments, its folder, its caches, and what it refuses."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lingen.pipeline
import scripts.sample
from lingen.autoencoders import load_autoencoder
from lingen.compose import compose, parse
from lingen.errors import UserError
from lingen.export import Origin
from lingen.flow import generator
from lingen.models import make_model
from lingen.pipeline import LinGenPipeline
from lingen.runfolder import dump_config
from lingen.text.encoders import load_text_encoders

SMALL: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 3, "progress": False}
FORMS: tuple[Any, ...] = "uint8", "pt", "np", "pil"
LONG = "a red circle moving left " * 12


def export(folder: Path, name: str, world: Any) -> Path:
    """A model of random weights, all of which matter, as a training exports it."""
    config = compose([f"name={name}", *world.words, f"model={name}", "stage=demo_video"])
    torch.manual_seed(0)
    model = make_model(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    origin = Origin(
        stage="demo_video", step=7, samples=56, tokens=560, checkpoint_sha256="0", lineage=[],
        autoencoder_fingerprint=load_autoencoder(config.autoencoder, "cpu").fingerprint,
        text_fingerprint=load_text_encoders(config.text, "cpu").fingerprints,
    )  # fmt: skip
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "export.json").write_text(origin.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, world: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: export(folder / name, name, world) for name in ("lingen", "dit")}


@pytest.fixture(scope="module")
def pipelines(exports: dict[str, Path]) -> dict[str, LinGenPipeline]:
    return {name: LinGenPipeline.from_pretrained(folder) for name, folder in exports.items()}


@pytest.fixture(params=["lingen", "dit"])
def pipe(request: pytest.FixtureRequest, pipelines: dict[str, LinGenPipeline]) -> LinGenPipeline:
    return pipelines[request.param]


@pytest.fixture
def dit(pipelines: dict[str, LinGenPipeline]) -> LinGenPipeline:
    return pipelines["dit"]


def differ(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_a_video_depends_on_its_prompt_and_seed_alone(pipe: LinGenPipeline, solver: Any) -> None:
    prompts, negatives = ["a red circle", "a blue star", "a red circle"], ["", "green", ""]
    both = pipe(prompts, negatives, seeds=[1, 2, 3], solver=solver, **SMALL).frames
    alone = pipe(prompts[1], negatives[1], seeds=2, solver=solver, **SMALL).frames
    assert both.shape == (3, 3, 9, 32, 48) and both.dtype == torch.uint8
    assert differ(both[1], alone[0]) <= 1  # a sum's order may differ with the batch
    assert differ(both[0], both[2]) > 1 and differ(both[0], both[1]) > 1


def test_noise_comes_from_generators_or_seeds(dit: LinGenPipeline) -> None:
    words = SMALL | {"output_type": "latent"}
    seeded = dit(["a", "b"], seeds=[4, 5], **words).frames
    own = dit(["a", "b"], generator=[generator("cpu", "sample", seed) for seed in (4, 5)], **words).frames
    assert torch.equal(seeded, own)
    in_turn = torch.Generator().manual_seed(3)
    together = dit(["a", "a"], generator=in_turn, **words).frames
    assert not torch.equal(together[0], together[1])
    first = dit("a", generator=torch.Generator().manual_seed(3), **words).frames
    assert torch.allclose(together[:1], first, atol=1e-4)
    assert torch.equal(dit("a", **words).frames, dit("a", seeds=0, **words).frames)


def test_frames_come_in_the_form_that_is_asked_for(dit: LinGenPipeline) -> None:
    found = {kind: dit("a red circle", output_type=kind, **SMALL).frames for kind in FORMS}
    assert found["pt"].shape == (1, 9, 3, 32, 48) and found["pt"].min() >= 0 and found["pt"].max() <= 1
    assert isinstance(found["np"], np.ndarray) and found["np"].shape == (1, 9, 32, 48, 3)
    pictures = np.stack([np.asarray(frame) for frame in found["pil"][0]])
    bytes_ = found["uint8"][0].permute(1, 2, 3, 0).numpy()  # (F, H, W, 3)
    assert np.array_equal(pictures, bytes_)
    assert np.array_equal((found["np"][0] * 255).round(), bytes_)
    assert np.array_equal(found["pt"][0].permute(0, 2, 3, 1).numpy(), found["np"][0])
    latents = dit("a red circle", output_type="latent", **SMALL).frames
    assert latents.shape == (1, 16, 2, 4, 6) and latents.dtype == torch.float32
    decoded = dit.autoencoder.decode(latents)
    assert torch.equal(((decoded + 1) * 127.5).round().to(torch.uint8), found["uint8"])


def test_guidance_in_two_passes_is_that_in_one_batch(pipe: LinGenPipeline) -> None:
    words = SMALL | {"output_type": "latent", "negative_prompt": "green"}
    one, two = (pipe(["a", "b"], guidance=mode, **words).frames for mode in ("batch", "two_passes"))
    assert torch.allclose(one, two, atol=1e-3 * one.abs().max())
    assert not torch.allclose(one, pipe(["a", "b"], guidance_scale=1.0, **words).frames, atol=1e-2)


def test_a_callback_sees_each_step_and_may_change_it(dit: LinGenPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def watch(pipe: LinGenPipeline, step: int, sigma: float, tensors: dict[str, torch.Tensor]) -> Any:
        assert pipe is dit and tensors["latents"].shape == (1, 16, 2, 4, 6)
        seen.append((step, sigma))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    words = SMALL | {"shift": 1.0, "output_type": "latent"}
    latents = dit("a", callback_on_step_end=watch, **words).frames
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [sigma for _, sigma in seen] == pytest.approx([2 / 3, 1 / 3, 0])
    assert not latents.any()


def summary(pipe: LinGenPipeline) -> Any:
    """Of the last generation, as it is now."""
    return pipe.cache_summary


def test_a_cache_is_turned_on_and_off(pipe: LinGenPipeline) -> None:
    plain = pipe(["a", "b"], seeds=[1, 2], **SMALL).frames
    assert summary(pipe) is None
    try:
        pipe.enable_cache("never")
        assert torch.equal(pipe(["a", "b"], seeds=[1, 2], **SMALL).frames, plain)
        assert summary(pipe).flops_ratio == 1.0
        with pytest.raises(UserError, match=r"the cache never is on; call disable_cache\(\) first"):
            pipe.enable_cache("never")
        pipe.disable_cache()
        pipe.enable_cache({"policy": "fixed", "period": 2})
        skipped = pipe(["a", "b"], seeds=[1, 2], solver="heun", guidance="two_passes", **SMALL).frames
        assert summary(pipe).contexts.keys() == {"text", "negative"} and summary(pipe).calls == 5
        assert summary(pipe).flops_ratio < 1.0 and not torch.equal(skipped, plain)

        def stop(pipe: LinGenPipeline, step: int, sigma: float, tensors: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pipe("a", callback_on_step_end=stop, **SMALL)
        assert summary(pipe) is None
        again = pipe(["a", "b"], seeds=[1, 2], solver="heun", guidance="two_passes", **SMALL).frames
        assert torch.equal(again, skipped)
        pipe.disable_cache()
        pipe.enable_cache({"policy": "fixed", "sites": {"self" if pipe.config.model.mate else "te": 2}})
        with pytest.raises(UserError, match="this model has no site"):
            pipe("a", **SMALL)
    finally:
        pipe.disable_cache()
    assert torch.equal(pipe(["a", "b"], seeds=[1, 2], **SMALL).frames, plain)


def test_a_saved_pipeline_can_be_moved(pipe: LinGenPipeline, tmp_path: Path, world: Any) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    (moved / "README.md").open("a").write("It may be used for anything.")
    assert {path.name for path in tmp_path.iterdir()} == {"moved"}
    there = LinGenPipeline.from_pretrained(moved)
    for path in (there.config.autoencoder.path, there.config.text.encoders["minilm"].path):
        assert path.startswith(str(moved))
    weights, before = there.model.state_dict(), pipe.model.state_dict()
    assert weights.keys() == before.keys() and all(torch.equal(weights[name], before[name]) for name in before)
    assert there.origin == pipe.origin and there.stage == pipe.stage
    assert torch.equal(there("a red circle", **SMALL).frames, pipe("a red circle", **SMALL).frames)
    page = (moved / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in page and "56 samples" in page and "`demo_video`" in page
    with pytest.raises(UserError, match="exists; name a new one"):
        pipe.save_pretrained(moved)
    pipe.save_pretrained(tmp_path / "lean", copy=False)
    assert not (tmp_path / "lean" / "autoencoder").exists()
    assert LinGenPipeline.from_pretrained(tmp_path / "lean").config.autoencoder.path == str(world.autoencoder)


def test_half_a_download_is_named(dit: LinGenPipeline, exports: dict[str, Path], tmp_path: Path) -> None:
    dit.save_pretrained(tmp_path / "saved")
    for part in ("model.safetensors", "autoencoder/model.safetensors", "text_encoders/minilm/tokenizer.json"):
        folder = Path(shutil.copytree(tmp_path / "saved", tmp_path / "half"))
        content = (folder / part).read_bytes()
        (folder / part).write_bytes(content[: len(content) // 2])
        with pytest.raises(
            UserError, match=rf"{part} has \d+ bytes, not {len(content)}; the folder is|it may be incomplete"
        ):
            LinGenPipeline.from_pretrained(folder)
        (folder / part).unlink()
        with pytest.raises(UserError, match=rf"{part} is missing.*; the .* is incomplete|{part} is missing or damaged"):
            LinGenPipeline.from_pretrained(folder)
        shutil.rmtree(folder)
    contents = tmp_path / "saved" / "pipeline.json"
    contents.write_text(contents.read_text().replace('"autoencoder/model.safetensors"', '"../autoencoder"'))
    with pytest.raises(UserError, match=r"pipeline\.json is damaged"):  # a path that leaves the folder
        LinGenPipeline.from_pretrained(tmp_path / "saved")
    folder = Path(shutil.copytree(exports["dit"], tmp_path / "export"))
    for part in ("config.yaml", "export.json", "model.safetensors"):
        (folder / part).rename(tmp_path / part)
        with pytest.raises(UserError, match=f"{part} is missing or damaged; the export is incomplete"):
            LinGenPipeline.from_pretrained(folder)
        (tmp_path / part).rename(folder / part)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="it may be incomplete"):
        LinGenPipeline.from_pretrained(folder)


def test_weights_of_another_architecture_are_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports["dit"], tmp_path / "mixed"))
    shutil.copy(exports["lingen"] / "model.safetensors", folder)
    with pytest.raises(
        UserError, match=r"another architecture than its configuration, which is dit of .* such as blocks"
    ):
        LinGenPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompt": []}, "prompt: give one at least"),
        ({"prompt": ["a", 7]}, "prompt: 7 is no text"),
        ({"seeds": 1.5}, r"seeds: 1\.5 is no whole number"),
        ({"prompt": LONG}, r"prompt='a red circle .* tokens, and text.encoders.minilm takes \d+; shorten it"),
        ({"negative_prompt": LONG}, "negative_prompt='a red circle"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 for 1 prompts"),
        ({"seeds": [1, 2]}, "seeds: 2 for 1 prompts"),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 for 1 prompts"),
        ({"generator": torch.Generator(), "seeds": 1}, "generator and seeds both"),
        ({"num_frames": -7}, "frames=-7"),
        ({"num_frames": 10}, "frames=10 is not 8"),
        ({"height": 0}, "height=0"),
        ({"num_inference_steps": 0}, "steps=0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"output_type": "gif"}, "output_type=gif is none of uint8"),
    ],
)
def test_what_cannot_be_made_is_refused(dit: LinGenPipeline, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dit(**({"prompt": "a"} | SMALL | words))


def test_a_long_prompt_is_cut_where_that_is_asked_for(dit: LinGenPipeline) -> None:
    cut = dit(LONG, truncate=True, **SMALL).frames
    assert torch.equal(dit(LONG + "a blue star", truncate=True, **SMALL).frames, cut)


@pytest.mark.parametrize(("room", "what"), [(10_000, "denoising"), (10**6, "decoding")])
def test_what_does_not_fit_is_refused_before_it_begins(
    dit: LinGenPipeline, monkeypatch: pytest.MonkeyPatch, room: int, what: str
) -> None:
    monkeypatch.setattr(lingen.pipeline, "free_memory", lambda device: room)
    monkeypatch.setattr(dit.text, "encode", None)
    words = SMALL | ({} if what == "denoising" else {"num_frames": 65})
    with pytest.raises(UserError, match=rf"frames=\d+ height=32 width=48: {what} 1 such videos needs .* GB free; try"):
        dit("a", **words)


def run_script(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    scripts.sample.main()


def test_the_script_keeps_whole_files_and_goes_on(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\n\na blue star\nA red: circle\n")
    words = [f"checkpoint={exports['dit']}", f"prompts={prompts}", f"out={out}", "seeds=[3, 5]", "batch=4"]
    words += ["frames=1", "height=32", "width=32", "steps=1"]
    sample, calls = LinGenPipeline.__call__, list[list[str]]()

    def once(self: LinGenPipeline, prompt: Any, *more: Any, **rest: Any) -> Any:
        calls.append(prompt)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, prompt, *more, **rest)

    monkeypatch.setattr(LinGenPipeline, "__call__", once)
    with pytest.raises(KeyboardInterrupt):
        run_script(monkeypatch, *words)
    first = {path: path.read_bytes() for path in out.iterdir()}
    assert len(first) == 8 and not any(path.name.startswith(".") for path in first)
    run_script(monkeypatch, *words)
    assert "4 videos are there already and are kept" in capsys.readouterr().err
    assert calls[-1] == ["A red: circle"] * 2 and all(path.read_bytes() == content for path, content in first.items())
    assert len({path.stem for path in out.iterdir()}) == 6
    run_script(monkeypatch, *words)
    assert len(calls) == 3  # nothing is left to do
    run_script(monkeypatch, *words, "overwrite=true")
    assert len(calls) == 5


def test_a_dry_run_says_what_it_would_take(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"checkpoint={exports['lingen']}", "prompt=x", f"out={tmp_path / 'out'}", "dry_run=true", "device=cuda"]
    run_script(monkeypatch, *words, "frames=65", "batch=3", "cache={policy: fixed, period: 2}")
    said = capsys.readouterr().out
    assert said.startswith("3 videos of 65x64x64 at once on cuda: ") and " GB (weights " in said and "cache " in said
    assert not (tmp_path / "out").exists()
    for word, message in (
        ("device=tpu", "device=tpu is no device"),
        ("cache=nowhere", "cache=nowhere does not exist"),
        ("cache={policy: fixed, sites: {self: 2}}", "this model has no site 'self'"),
    ):
        with pytest.raises(UserError, match=message):
            run_script(monkeypatch, *words, word)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give prompt=TEXT, or prompts=FILE"),
        (["prompt=a", "prompts=[b]"], "give prompt=TEXT, or prompts=FILE"),
        (["prompt=a", "seeds=[1]", "count=2"], "seeds stands for seed and count"),
        (["prompt=a", "batch=0"], "batch=0"),
        (["prompt=a", "solver=rk4"], "solver=rk4"),
        (["prompt=a", "emulated_steps=0"], "emulated_steps=0"),
        (["prompt=a", "tile={frames: 1}"], "tile.frames=1"),
    ],
)
def test_words_of_the_script_that_do_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(scripts.sample.Words, ["checkpoint=x", "out=x", *words])


@pytest.mark.parametrize("content", [None, b"\n \n", b"\xff\xfe"])
def test_a_file_of_prompts_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"prompts=.*prompts\.txt (cannot be read|holds no prompt)"):
        parse(scripts.sample.Words, ["checkpoint=x", "out=x", f"prompts={file}"]).all_prompts()
