"""Every wrong word on a command line becomes one message that names the key and what would be right."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict

from lingen.compose import CONF_DIR, compose, parse
from lingen.config import latent_shape, token_grid
from lingen.errors import UserError
from lingen.runfolder import dump_config, read_config

BASE = ["name=a", "data.path=x", "autoencoder.path=y"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model=ditt"], ["model=ditt", "did you mean 'dit'"]),
        (["stage=demo_vidio"], ["stage=demo_vidio", "did you mean 'demo_video'"]),
        (["engin=zero1"], ["engin", "did you mean 'engine'"]),
        (["optim.weight_decy=1"], ["optim.weight_decy", "did you mean 'weight_decay'"]),
        (["optim.weight_decay=much"], ["optim.weight_decay=much", "number"]),
        (["stages.demo_video.lr=-1"], ["stages.demo_video.lr=-1", "greater than 0"]),
        (["stages.demo_video.bukets=[]"], ["stages.demo_video.bukets", "did you mean 'buckets'"]),
        (["stages.demo_image.buckets.0.frames=16"], ["stages.demo_image", "frames=16", "8*k + 1", "9 or 17"]),
        (["stages.demo_image.buckets.0.height=72"], ["height=72", "multiple of 16", "64 or 80"]),
        (["stages.demo_image.buckets.0.width=8"], ["width=8", "multiple of 16", "nearest: 16"]),
        (["stages.demo_image.buckets.0.batch_size=63", "engine.grad_accumulation=2"], ["batch_size=63", "grad_accum"]),
        (["engine.zero_stage=2"], ["engine.zero_stage", "deepspeed"]),
        (["name=../up"], ["name=../up", "relative"]),
        (["name=/abs"], ["name=/abs", "relative"]),
        (["validation.sigmas=6"], ["validation.sigmas=6", "validation.bins=4"]),
        (["model.mate=null"], ["model.mate", "model=lingen"]),
        (["size.d_model=100"], ["d_model=100", "head_dim"]),
        (["nonsense"], ["nonsense"]),
        (["model=null"], ["model=null does not exist", "dit, lingen"]),
        (["model=[lingen,dit]"], ["does not exist"]),
        (["stage.samples=8"], ["stage.samples needs stage=NAME"]),
        (["stage=demo_video", "stages.demo_video.lr=1"], ["stages.demo_video.lr=1", "stage.KEY"]),
        (["stages.demo_imag.lr=1"], ["stages.demo_imag", "did you mean 'demo_image'"]),
        (["stages.demo_image.name=other"], ["stages.demo_image.name=other"]),
        (["stages.demo_image.buckets.x.frames=8"], ["stages.demo_image.buckets.x.frames=8"]),
        (["stages.demo_image.buckets.5.frames=8"], ["buckets.5.frames=8", "out of range"]),
        (["stages.demo_image.lr=inf"], ["stages.demo_image.lr=inf", "finite"]),
        (["optim.betas=[0.9,1]"], ["optim.betas.1=1", "less than 1"]),
        (["seed=99999999999999999999"], ["seed=9999"]),
        (["model.mate.mamba_head_dim=48"], ["mamba_head_dim=48", "expand=2"]),
    ],
)
def test_a_wrong_word_is_named(words: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose(BASE + words)
    for part in parts:
        assert part in str(caught.value)


def test_every_missing_value_is_named() -> None:
    with pytest.raises(UserError, match=r"autoencoder\.path is not set.*data\.path is not set.*name is not set"):
        compose([])


def test_a_stage_replaces_the_curriculum() -> None:
    config = compose([*BASE, "stage=demo_video", "stage.samples=32", "init_from=somewhere"])
    assert list(config.stages) == ["demo_video"]
    assert config.stages["demo_video"].samples == 32


def test_a_path_may_hold_any_character() -> None:
    path = "/data/ü (a)=[x]~'q' {b}, #c"
    config = compose([*BASE, f"data.path={path}", "name=2024", "init_from=/a b"])
    assert (config.data.path, config.name, config.init_from) == (path, "2024", "/a b")


def test_a_stage_can_be_taken_out() -> None:
    assert list(compose([*BASE, "~stages.demo_video"]).stages) == ["demo_image", "demo_video_128"]


def test_a_default_that_no_file_mentions_can_be_set() -> None:
    assert compose([*BASE, "flow.logit_std=0.5"]).flow.logit_std == 0.5


@pytest.mark.parametrize("size", sorted(path.stem for path in (CONF_DIR / "size").glob("*.yaml")))
@pytest.mark.parametrize("model", ["lingen", "dit"])
def test_every_size_composes(size: str, model: str) -> None:
    config = compose([*BASE, f"size={size}", f"model={model}"])
    assert config.size.name == size
    assert config.depth == getattr(config.size.depth, model)


@pytest.mark.parametrize("group", ["curriculum", "stage", "engine", "experiment", "debug"])
def test_every_choice_composes(group: str) -> None:
    for path in sorted((CONF_DIR / group).glob("*.yaml")):
        assert compose([*BASE, f"{group}={path.stem}"]).stages, path


def test_a_stage_file_is_named_as_its_stage() -> None:
    for path in sorted((CONF_DIR / "stage").glob("*.yaml")):
        assert list(compose([*BASE, f"stage={path.stem}"]).stages) == [path.stem]


def test_the_written_config_reads_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = compose([*BASE, "model=dit", "optim.weight_decay=0.3"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert read_config(tmp_path / "config.yaml") == config


def test_shapes_of_latents_and_tokens() -> None:
    config = compose([*BASE, "size=4b"])
    assert latent_shape(config, 265, 512, 896) == (34, 64, 112)
    assert token_grid(config, 265, 512, 896) == (34, 32, 56)
    assert token_grid(config, 1, 256, 256) == (1, 16, 16)


class Words(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: str = ""
    runs: list[str] = []
    steps: int = 1


def test_script_words() -> None:
    words = parse(Words, ["prompt=a: b, {c} [d] #e", "runs=[x,y]", "steps=3"])
    assert (words.prompt, words.runs, words.steps) == ("a: b, {c} [d] #e", ["x", "y"], 3)


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("step=3", "did you mean 'steps'"),
        ("steps", "not key=value"),
        ("steps=x", "steps=x"),
        ("runs=[", "runs=["),
        ("steps=2024-13-45", "2024-13-45"),
    ],
)
def test_wrong_script_words(word: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Words, [word])
    assert part in str(caught.value)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_names_every_word(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Words(BaseModel):
        out: str
        steps: int = 3

    with pytest.raises(SystemExit) as ended:
        parse(Words, [word])
    assert ended.value.code == 0
    assert capsys.readouterr().out.endswith("  out=...\n  steps=3\n")
