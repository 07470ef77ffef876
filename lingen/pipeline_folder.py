"""A pipeline as a folder that can be copied: an export, its autoencoder and text encoders, and a page about it.

DIR/{model.safetensors,config.yaml,export.json,pipeline.json,README.md}, and where they were copied
DIR/autoencoder/ and DIR/text_encoders/NAME/
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file

from lingen.autoencoder_config import AutoencoderConfig
from lingen.autoencoders.diffusers import vae_folder
from lingen.compose import validate
from lingen.config import Config
from lingen.errors import UserError, nearest
from lingen.export import CONFIG, ORIGIN, WEIGHTS, Origin
from lingen.files import rename, sync_path
from lingen.model_config import Name
from lingen.output import writing
from lingen.runfolder import dump_config
from lingen.text.load import encoder_files

CONTENTS, CARD = "pipeline.json", "README.md"


class Contents(BaseModel):
    """What a saved pipeline's folder holds; paths lie below it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    autoencoder: Name | None  # None: where config.yaml says; so are the text encoders that are not named
    text_encoders: dict[str, Name]
    files: dict[Name, int]  # bytes; the page is not among them


def save(
    folder: Path, config: Config, weights: Mapping[str, torch.Tensor], origin: Origin, card: str, *, copy: bool
) -> None:
    """Write a pipeline's folder whole: aside, and renamed as the last thing.

    Raises:
        UserError: it exists, or cannot be written.
    """
    if folder.exists():
        raise UserError(f"folder={folder} exists; name a new one")
    aside = folder.with_name(f".{folder.name}.tmp")
    with writing(folder, "folder"):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, aside / WEIGHTS)
        (aside / CONFIG).write_text(dump_config(config))
        (aside / ORIGIN).write_text(origin.model_dump_json(indent=1))
        (aside / CARD).write_text(card)
        autoencoder = _copy_autoencoder(config.autoencoder, aside) if copy else None
        text = {name: _copy_encoder(name, config, aside) for name in config.text.encoders if copy}
        files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
        kept = [path for path in files if path != aside / CARD]  # the page is for its maker to complete
        sizes = {path.relative_to(aside).as_posix(): path.stat().st_size for path in kept}
        contents = Contents(autoencoder=autoencoder, text_encoders=text, files=sizes)
        (aside / CONTENTS).write_text(contents.model_dump_json(indent=1))
        for path in (*files, aside / CONTENTS, *(path for path in aside.rglob("*") if path.is_dir()), aside):
            sync_path(path)
        rename(aside, folder)


def located(
    folder: Path, config: Config, autoencoder: str | None, encoders: Mapping[str, str], tile: Mapping[str, Any] | None
) -> Config:
    """``config`` with its autoencoder and text encoders where they are now: where the caller says, in ``folder``, or
    where the training found them.

    Raises:
        UserError: a file of ``folder`` is missing or not whole; there is no such encoder; the autoencoder cannot work
            in such tiles.
    """
    contents = _read(folder)
    for name in encoders:
        if name not in config.text.encoders:
            raise UserError(
                f"encoders.{name}: this model has no such text encoder{nearest(name, config.text.encoders)}"
            )
    paths = {name: str(folder / path) for name, path in contents.text_encoders.items()} | dict(encoders)
    moved = {
        name: encoder.model_copy(update={"path": paths.get(name, encoder.path)})
        for name, encoder in config.text.encoders.items()
    }
    latents = config.autoencoder.model_dump()
    if autoencoder is not None:
        latents["path"] = autoencoder
    elif contents.autoencoder is not None:
        latents |= {"path": str(folder / contents.autoencoder), "subfolder": ""}
    if tile is not None:
        latents["tile"] = tile
    text = config.text.model_copy(update={"encoders": moved})
    return config.model_copy(update={"text": text, "autoencoder": validate(AutoencoderConfig, latents)})


def _read(folder: Path) -> Contents:
    """What ``folder`` says that it holds; nothing where it is no saved pipeline, but an export or a checkpoint."""
    try:
        contents = Contents.model_validate_json((folder / CONTENTS).read_bytes())
    except FileNotFoundError:
        return Contents(autoencoder=None, text_encoders={}, files={})
    except (OSError, ValidationError) as error:
        raise UserError(f"{folder / CONTENTS} is damaged; copy {folder} again") from error
    for name, size in contents.files.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            found = "is missing" if there is None else f"has {there} bytes, not {size}"
            raise UserError(f"{folder / name} {found}; the folder is incomplete, copy or download it again")
    return contents


def _copy_autoencoder(config: AutoencoderConfig, to: Path) -> str:
    """Where it lies below ``to`` now."""
    (to / "autoencoder").mkdir()
    if config.kind == "diffusers":
        source = vae_folder(config)
        for path in (*source.glob("*.json"), *source.glob("*.safetensors")):
            shutil.copyfile(path, to / "autoencoder" / path.name)
        return "autoencoder"
    file = Path(config.path) / WEIGHTS if Path(config.path).is_dir() else Path(config.path)
    shutil.copyfile(file, to / "autoencoder" / WEIGHTS)
    return f"autoencoder/{WEIGHTS}"


def _copy_encoder(name: str, config: Config, to: Path) -> str:
    """Where it lies below ``to`` now."""
    place = to / "text_encoders" / name
    place.mkdir(parents=True)
    for path in encoder_files(name, config.text.encoders[name]):
        shutil.copyfile(path, place / path.name)
    return f"text_encoders/{name}"


def card(config: Config, origin: Origin, parameters: int) -> str:
    """The page that a model's folder begins with, as hubs of models show it."""
    (stage,) = config.stages.values()
    shapes = ", ".join(f"{b.frames}x{b.height}x{b.width}" for b in stage.buckets)
    encoders = ", ".join(f"`{name}` ({encoder.length} tokens)" for name, encoder in config.text.encoders.items())
    before = ", ".join(f"`{entry['stage']}`" for entry in origin.lineage[:-1]) or "none"
    name = {"lingen": "LinGen", "dit": "DiT"}[config.model.name]
    ae = config.autoencoder
    ratios, known_by = f"{ae.time}x{ae.space}x{ae.space}", origin.autoencoder_fingerprint[:12]
    return f"""---
library_name: lingen
pipeline_tag: text-to-video
tags: [text-to-video, flow-matching, {config.model.name}]
---
# {config.name}

A {name} of {parameters / 1e6:,.1f} million parameters ({config.depth} layers, {config.size.d_model} wide) that
makes videos of a text.

    from lingen.pipeline import LinGenPipeline

    pipe = LinGenPipeline.from_pretrained("DIR")  # this folder
    video = pipe("a prompt").frames[0]  # (3, F, H, W) uint8

or `python scripts/sample.py checkpoint=DIR prompt="a prompt" out=OUT`.

| | |
| --- | --- |
| last stage of the training | `{origin.stage}`: frames x height x width {shapes}, {stage.fps:g} frames a second |
| trained on | {origin.samples:,} samples, {origin.tokens:,} tokens, {origin.step:,} steps of that stage |
| stages before it | {before} |
| weights | their exponential average |
| autoencoder | {ae.kind}, {ratios}, {ae.channels} channels, fingerprint `{known_by}` |
| text encoders | {encoders} |
| sampler | {config.sampler.steps} steps, {config.sampler.solver}, guidance {config.sampler.guidance_scale:g} |

What the training data were, what the model may be used for and under which licence is for its maker to say here.
"""
