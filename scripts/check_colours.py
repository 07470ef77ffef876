"""Does a model put the asked colour on screen? ``python scripts/check_colours.py checkpoint=DIR out=FILE.json``.

Samples videos of "a COLOUR SHAPE ..." from an export, a run or a checkpoint, and from the same model untrained, and
decides from the pixels whether the asked colour is the dominant saturated one (data/checks.py). Only for models
that were trained on the rendered world.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from lingen.compose import parse
from lingen.errors import UserError, run_main
from lingen.output import make_folder


class Words(BaseModel):
    """The script's words; the shape is by default the largest bucket of the last stage."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    out: str
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    steps: PositiveInt | None = None
    guidance_scale: float | None = Field(None, ge=1.0)
    seeds: PositiveInt = 4  # videos a colour
    batch: PositiveInt = 8
    autoencoder: str | None = None  # where the autoencoder's file is now


def main() -> None:
    """Sample, judge, write."""
    words = parse(Words, sys.argv[1:])
    from data.checks import check_colour
    from data.synthetic import COLORS, SHAPES
    from lingen.pipeline import LinGenPipeline
    from lingen.runfolder import write_aside

    out = Path(words.out)
    if out.is_dir():
        raise UserError(f"out={out} is a folder; name a file such as {out / 'colours.json'}")
    asked = [(colour, SHAPES[seed % len(SHAPES)], seed) for colour, seed in product(COLORS, range(words.seeds))]

    def share(pipeline: LinGenPipeline) -> float:
        hits = 0
        for at in range(0, len(asked), words.batch):
            part = asked[at : at + words.batch]
            videos = pipeline(
                [f"a {colour} {form} moving left" for colour, form, _ in part],
                num_frames=shape.frames,
                height=shape.height,
                width=shape.width,
                num_inference_steps=words.steps,
                guidance_scale=words.guidance_scale,
                seeds=[seed for _, _, seed in part],
                progress=False,
            ).frames  # (B, 3, F, H, W)
            hits += sum(check_colour(v.numpy(), c) for v, (c, _, _) in zip(videos, part, strict=True))
        return hits / len(asked)

    trained = LinGenPipeline.from_pretrained(words.checkpoint, autoencoder=words.autoencoder)
    shape = trained.shape(words.frames, words.height, words.width)
    make_folder(out.parent, words.out)
    found = {"trained": share(trained), "untrained": share(trained.untrained()), "videos": len(asked)}
    print(
        f"the asked colour is on screen in {found['trained']:.0%} of {found['videos']} videos, "
        f"and in {found['untrained']:.0%} from the untrained model"
    )
    write_aside(out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
