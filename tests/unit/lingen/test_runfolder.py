from __future__ import annotations

import resource
from pathlib import Path

import pytest

from lingen.compose import compose
from lingen.errors import UserError
from lingen.runfolder import dump_config, read_config, refuse_other_experiment, run_folder, write_aside

BASE = ["name=a", "data.path=x", "autoencoder.path=y"]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Of a run whose folder holds its config.yaml."""
    given = [*BASE, f"runs_dir={tmp_path}"]
    config = compose(given)
    write_aside(run_folder(config) / "config.yaml", dump_config(config))
    return given


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("model.mate.expand=1", r"model\.mate\.expand=2, not 1"),
        ("flow.logit_std=0.5", r"flow\.logit_std=1\.0, not 0\.5"),
        ("ema.rampup=0.5", r"ema\.rampup=0\.05, not 0\.5"),
        ("autoencoder.channels=4", r"autoencoder\.channels=16, not 4"),
        ("text.encoders.minilm.length=9", r"text\.encoders\.minilm\.length=32, not 9"),
    ],
)
def test_what_makes_another_experiment_is_named(word: str, named: str, words: list[str]) -> None:
    with pytest.raises(UserError, match=rf"^name=a: .*/a holds a run with {named}; choose another name"):
        refuse_other_experiment(compose([*words, word]))


@pytest.mark.parametrize(
    "word",
    [
        *("data.path=moved", "autoencoder.path=moved", "data.workers=7", "data.verify_checksums=false"),
        *("text.cache=1", "text.encoders.minilm.path=moved"),
        *("validation.every_steps=9", "optim.weight_decay=0.5", "stages.demo_video.lr=1e-5", "engine=zero2"),
    ],
)
def test_what_may_change_from_start_to_start(word: str, words: list[str]) -> None:
    changed = compose([*words, word])
    assert changed != compose(words)
    refuse_other_experiment(changed)


@pytest.mark.parametrize(
    ("text", "named"), [("a: [", "is not YAML"), ("{}", "is not set"), ("sed: 0", "did you mean 'seed'")]
)
def test_a_config_of_another_kind_is_refused(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match=r"config\.yaml cannot be read: No such file"):
        read_config(path)
    path.write_text(text)
    with pytest.raises(UserError, match=named):
        read_config(path)


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_aside(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(UserError, match="file cannot be written: File too large"):
            write_aside(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    write_aside(path, "new")
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file"]
