"""See what a stage feeds the model: one HTML page of clips as they are cropped and resampled, with their captions.

    python scripts/preview_data.py data=SHARDS out=PAGE.html stage=NAME|curriculum=NAME
        [autoencoder=... autoencoder.path=...] [samples=8] [side=256]

The samples come from the loader that training has, in its order: the first ones of each bucket. With an autoencoder its
reconstruction stands beside each; shards of latents are decoded. All other words are a run's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from data.latents import refuse_other_latents
from data.shards import load_index
from lingen.autoencoders import load_autoencoder
from lingen.compose import HELP, compose, parse
from lingen.errors import UserError, run_main
from lingen.files import write_file
from lingen.latents.make import find_device
from lingen.output import make_folder, writing
from lingen.preview.collect import view_stage
from lingen.preview.page import render

NAMES_ONE = ("autoencoder", "experiment")  # words that may say where an autoencoder is


class Words(BaseModel):
    """The script's own words; all others are a run's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: str  # shards, of clips or of latents
    out: str  # the page
    samples: PositiveInt = 8  # of a bucket
    side: int = Field(256, ge=16)  # pixels of the longer side of what is shown; larger clips are made smaller


def main(words: list[str]) -> None:
    """Write the page.

    Raises:
        UserError: the words, the shards or the autoencoder cannot be used, or the page cannot be written.
    """
    own = [word for word in words if word in HELP or word.partition("=")[0] in Words.model_fields]
    asked, rest = parse(Words, own), [word for word in words if word not in own]
    reconstruct = any(word.startswith(NAMES_ONE) for word in rest)
    unnamed = [] if reconstruct else ["autoencoder.path=none"]  # its ratios are all that is needed
    config = compose(["name=preview", *rest, *unnamed, f"data.path={asked.data}"])
    index, device = load_index(asked.data), find_device(config, 0)
    if index.latents is not None and not reconstruct:
        raise UserError(f"data={asked.data} holds latents: name the autoencoder that made them, to decode them")
    make_folder(Path(asked.out).parent, asked.out)
    autoencoder = load_autoencoder(config.autoencoder, device) if reconstruct else None
    if index.latents is not None and autoencoder is not None:
        refuse_other_latents(index, autoencoder.fingerprint, config.autoencoder.path, config.data.holdout_share)
    views = [
        view_stage(config, stage, index, autoencoder, device, samples=asked.samples) for stage in config.stages.values()
    ]
    title = f"What the model is fed: {', '.join(config.stages)}"
    with writing(asked.out):
        page = render(views, index, title=title, words=words, side=asked.side)
        write_file(Path(asked.out), page)
    shown = sum(len(bucket.samples) for view in views for bucket in view.buckets)
    print(f"{asked.out}: {shown} samples of {len(views)} stages, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
