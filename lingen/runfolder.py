"""The folder of a run: runs/NAME/{config.yaml,metrics.jsonl,checkpoints/STAGE/...,export/STAGE/...}."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml

from lingen.compose import validate
from lingen.config import Config, RunConfig
from lingen.errors import UserError
from lingen.files import write_file
from lingen.tae_config import TaeRunConfig

Kind = TypeVar("Kind", bound=RunConfig)
SCRIPTS = {True: "scripts/train_autoencoder.py", False: "train.py"}  # whose configuration has a section tae, or not
# What a run may not change from one start to the next: with another value it would be another experiment.
FIXED = ("seed", "model", "size", "flow", "autoencoder", "text", "ema", "data", "validation", "tae", "losses")
# ... except for where a file lies, and what only a start's speed depends on.
FREE: dict[str, Any] = {
    "autoencoder": {"path", "subfolder", "tile"},  # its fingerprint is compared
    "text": {"cache": True, "encoders": {"__all__": {"path"}}},  # each encoder's fingerprint is compared
    "data": {  # the index's fingerprint is compared, and both decoders give the same pixels
        "path",
        "workers",
        "prefetch",
        "max_bad_share",
        "verify_checksums",
        "decoder",
        "worker_memory_mb",
        "cache_dir",
        "cache_gb",
    },
    "validation": {"every_steps", "batch_size"},
    "losses": {"perceptual": {"path"}},  # its fingerprint is compared
}


def run_folder(config: RunConfig) -> Path:
    """runs/NAME."""
    return Path(config.runs_dir) / config.name


def stage_folder(config: RunConfig, stage: str) -> Path:
    """Where a stage's checkpoints are."""
    return run_folder(config) / "checkpoints" / stage


def export_folder(config: RunConfig, stage: str) -> Path:
    """Where a finished stage's EMA weights are."""
    return run_folder(config) / "export" / stage


def architecture(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint's weights fit: the model, its size, and the latents and text that it sees; or an autoencoder
    and its discriminator."""
    if isinstance(config, TaeRunConfig):
        opponent = config.losses.adversarial
        shape = opponent.model_dump(include={"width", "levels"}) if opponent else None
        return {"tae": config.tae.model_dump(mode="json"), "discriminator": shape}
    assert isinstance(config, Config)
    return {
        "model": config.model.model_dump(mode="json"),
        "size": config.size.model_dump(mode="json"),
        "latent": config.autoencoder.model_dump(mode="json", include={"channels", "time", "space"}),
        "text": config.text.model_dump(include={"encoders": {"__all__": {"dim", "projection"}}})["encoders"],
    }


def read_config(path: Path) -> Config:
    """The config.yaml of a run of train.py, or of an export of one; see ``read_config_as``."""
    return read_config_as(Config, path)


def read_config_as(schema: type[Kind], path: Path) -> Kind:
    """The config.yaml of a run or an export.

    Raises:
        UserError: it is missing or does not fit the schema.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if isinstance(tree, dict) and ("tae" in tree) != ("tae" in schema.model_fields):
        raise UserError(f"{path} is of a run of {SCRIPTS['tae' in tree]}")
    return validate(schema, tree)


def write_aside(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` is either the old file or the whole new one, also after a crash.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name a folder that can") from error


def refuse_other_experiment(config: RunConfig) -> None:
    """A run folder holds one experiment.

    Raises:
        UserError: the folder's config.yaml differs in a part that would make this another experiment.
    """
    path = run_folder(config) / "config.yaml"
    if not path.exists():
        return
    difference = other_experiment(read_config_as(type(config), path), config)
    if difference is not None:
        raise UserError(
            f"name={config.name}: {run_folder(config)} holds a run with {difference}; choose another name, or the "
            "settings it was started with"
        )


def other_experiment(before: Kind, now: Kind) -> str | None:
    """In what ``now`` is another experiment than ``before``: "seed=0, not 1". None where it is the same."""
    for section in FIXED:
        if section not in type(now).model_fields:
            continue
        there, here = (_comparable(section, getattr(config, section)) for config in (before, now))
        if there != here:
            return _difference(section, there, here)
    return None


def with_earlier_stages(config: Kind) -> Kind:
    """``config`` and the stages that the run folder knows from earlier commands, in the order they came."""
    path = run_folder(config) / "config.yaml"
    earlier = read_config_as(type(config), path).stages if path.exists() else {}
    return config.model_copy(update={"stages": {**earlier, **config.stages}})


def _comparable(section: str, value: Any) -> Any:
    return value.model_dump(mode="json", exclude=FREE.get(section)) if hasattr(value, "model_dump") else value


def _difference(path: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
        return _difference(f"{path}.{key}", before.get(key), now.get(key))
    return f"{path}={before}, not {now}"


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML; ``read_config_as`` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
