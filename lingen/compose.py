"""From the words of a command line to a validated, frozen ``Config``; and the same for the scripts' small schemas."""

from __future__ import annotations

import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from lingen.config import Config
from lingen.errors import UserError, nearest

HELP = {"-h", "--help"}
OPTIONAL = ("stage", "experiment", "debug")  # groups that may be null
CONF_DIR = Path(__file__).resolve().parent.parent / "conf"

Schema = TypeVar("Schema", bound=BaseModel)


def compose(overrides: list[str]) -> Config:
    """A run of train.py; see ``compose_run``."""
    return compose_run(Config, "config", overrides)


def compose_run(schema: type[Schema], primary: str, overrides: list[str]) -> Schema:
    """Compose ``conf/PRIMARY.yaml`` with Hydra's overrides and validate the result.

    ``stage=NAME`` replaces the curriculum by that one stage, whose keys are then ``stage.KEY``.

    Raises:
        UserError: a group, key, type or value is wrong; the message names the key and what would be right.
    """
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = hydra_compose(primary, [_forced(schema, word) for word in overrides])
        tree = _tree(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    except (ValueError, TypeError, KeyError, IndexError) as error:  # Hydra's own checks miss some words
        raise UserError(f"one of {' '.join(overrides)} cannot be applied: {error}") from error
    return validate(schema, _with_stages(tree, overrides))


def compose_file(schema: type[Schema], group: str, choice: str, words: list[str]) -> Schema:
    """One file of a group that is no part of a run, with its ``GROUP.KEY=VALUE`` words, whose values are YAML.

    Raises:
        UserError: as ``compose``.
    """
    choices = [path.stem for path in (CONF_DIR / group).glob("*.yaml")]
    if choice not in choices:
        raise UserError(f"{group}={choice} does not exist in conf/{group}{nearest(choice, choices)}")
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = hydra_compose(f"{group}/{choice}")
        OmegaConf.set_struct(composed, False)
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise UserError(f"'{word}' is not key=value")
            annotation = _annotation_at(schema, tuple(key.split(".")))
            is_text = annotation is str or _is_optional_text(annotation, value)
            loader = yaml.BaseLoader if annotation == dict[str, str] else yaml.SafeLoader  # text: 010 is not 8
            OmegaConf.update(composed, key, value if is_text else yaml.load(value, loader), force_add=True)
        tree = _tree(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"one of {' '.join(words)} cannot be applied: {error}") from error
    return validate(schema, tree)


def groups(primary: str) -> list[str]:
    """The groups of conf/ that conf/PRIMARY.yaml chooses from, each with its choices: "engine: cpu, zero0, ..."."""
    defaults = yaml.safe_load((CONF_DIR / f"{primary}.yaml").read_text())["defaults"]
    names = [name for entry in defaults if isinstance(entry, dict) for name in entry]
    return [f"{n}: {', '.join(sorted(f.stem for f in (CONF_DIR / n).glob('*.yaml')))}" for n in sorted(names)]


def _with_stages(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Put ``stage``, where it is given, in the place of the curriculum's ``stages``."""
    stage = tree.pop("stage")
    if stage is not None:
        if "name" not in stage:
            raise UserError(f"stage.{next(iter(stage))} needs stage=NAME before it; or write stages.NAME.KEY=...")
        ignored = next((word for word in overrides if re.match(r"[+~]*stages\.", word)), None)
        if ignored is not None:
            raise UserError(f"{ignored}: stage={stage['name']} replaces the curriculum; write stage.KEY=... instead")
        return tree | {"stages": {stage["name"]: stage}}
    for name, body in tree["stages"].items():
        if "name" not in body:  # nothing but what an override set
            known = [other for other in tree["stages"] if other != name]
            raise UserError(f"stages.{name}: the curriculum has no such stage{nearest(name, known)}")
    return tree


def parse(schema: type[Schema], words: list[str]) -> Schema:
    """Validate a script's ``key=value`` words. Values are read as YAML, so ``runs=[a,b]`` is a list; but text stays
    text where the schema asks for it, so that a prompt may hold any character. ``--help`` prints what the script is for
    and its words, and ends it."""
    if HELP & set(words):
        print(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\nwords, with their defaults:\n{_words_of(schema)}")
        raise SystemExit(0)
    tree: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"'{word}' is not key=value{nearest(word, schema.model_fields)}")
        field = schema.model_fields.get(key)
        if field is not None and field.annotation in (str, str | None):
            tree[key] = value
            continue
        try:
            tree[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date, and is none
            raise UserError(f"{key}={value} cannot be read: {error}") from error
    return validate(schema, tree)


def _words_of(schema: type[BaseModel]) -> str:
    """A line for each key of a script: its default, or that it must be given."""
    return "\n".join(
        f"  {key}={'...' if field.is_required() else field.get_default(call_default_factory=True)}"
        for key, field in schema.model_fields.items()
    )


def validate(schema: type[Schema], tree: Any) -> Schema:
    """``tree`` as ``schema``; every problem becomes part of one ``UserError``."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_describe(schema, e) for e in error.errors())) from error


def _forced(schema: type[BaseModel], override: str) -> str:
    """Let a value be set whether or not a YAML file mentions it: the schema, not Hydra, knows which keys exist.

    A value that the schema wants as text is quoted, so that it may hold any character (a path with an umlaut, say).
    """
    key, equals, value = override.partition("=")
    if not equals or re.fullmatch(r"[A-Za-z_][\w.]*", key) is None:
        return override
    if key == "cluster":
        raise UserError(f"{override} is for slurm/launch.py; train.py runs where it is started")
    if (CONF_DIR / key).is_dir():
        choices = [path.stem for path in (CONF_DIR / key).glob("*.yaml")]
        if value not in choices and not (value == "null" and key in OPTIONAL):
            raise UserError(f"{override} does not exist in conf/{key}{nearest(value, choices)}")
        return override
    annotation = _annotation_at(schema, tuple(key.split(".")))
    is_text = annotation is str or _is_optional_text(annotation, value)
    if is_text and not value.startswith(("'", '"')):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        value = f"'{escaped}'"
    return f"++{key}={value}"


def _is_optional_text(annotation: Any, value: str) -> bool:
    return bool(annotation == (str | None)) and value != "null"


def _tree(composed: DictConfig) -> dict[str, Any]:
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError("; ".join(f"{key} is not set; give {key}=VALUE" for key in missing))
    tree = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _describe(schema: type[BaseModel], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        parent = _schema_at(schema, error["loc"][:-1])
        return f"unknown key '{where}'{nearest(str(error['loc'][-1]), parent.model_fields if parent else ())}"
    if error["type"] == "missing":
        return f"{where} is not set; give {where}=VALUE"
    message = re.sub(r"^Value error, ", "", error["msg"])
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return message
    return f"{where}={error['input']}: {message}"


def _schema_at(schema: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The section that a path of keys leads to; a key may also be a place in a list or a name in a dict."""
    here = _section_of(_annotation_at(schema, path))
    return here if _is_section(here) else None


def _annotation_at(schema: type[BaseModel], path: tuple[Any, ...]) -> Any:
    """The type that a path of keys leads to; None where there is no such key."""
    here: Any = schema
    for key in path:
        here = _section_of(here)
        if typing.get_origin(here) in (list, dict):
            here = typing.get_args(here)[-1]
        elif _is_section(here) and str(key) in here.model_fields:
            here = here.model_fields[str(key)].annotation
        else:
            return None
    return here


def _section_of(kind: Any) -> Any:
    """The section of ``SECTION | None``; any other type as it is."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next((part for part in typing.get_args(kind) if _is_section(part)), None)
    return kind


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _explain(error: Exception) -> str:
    """One line out of Hydra's several."""
    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__ or "").split())
    return f"{text}: {cause}" if cause else text
