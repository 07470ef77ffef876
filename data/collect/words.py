"""The words of ``scripts/make_shards.py``."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from data.collect.entries import printable
from lingen.config import Share

Level = Annotated[float, Field(ge=0, le=255, allow_inf_nan=False)]  # of a pixel
Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# These change how the work is done, and not what comes out of it: a run may go on with others.
FREE = {"output", "max_bad_share", "workers", "file_seconds"}


class Words(BaseModel):
    """What to read, how to cut it, what to leave out."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    input: str  # a folder of files, a folder of .tar shards, or a manifest
    output: str
    manifest: str | None = None  # of the files in the folder ``input``
    shards: Literal["index", "rewrite"] = "index"  # others' .tar shards: point into them, or write them anew
    samples_per_shard: PositiveInt = 256  # a shard also ends at 1 GiB
    max_bad_share: Share = 0.05  # of all samples; where more are bad (and more than one), the run stops; 0 allows none
    workers: PositiveInt = os.cpu_count() or 1
    file_seconds: PositiveFloat = 3600  # a file that takes longer is given up
    # how videos are cut
    scenes: bool = False  # at changes of scene
    scene_threshold: Limit = 27.0  # how much must change; scenedetect's ContentDetector explains it
    window_seconds: Limit | None = None  # into windows of this length; a shorter one is left at each end
    # what is left out
    min_side: PositiveInt = 16  # pixels of the shorter side
    min_seconds: AtLeast = 0.0
    max_seconds: Limit | None = None
    min_fps: AtLeast = 0.0
    max_fps: Limit | None = None
    min_caption: PositiveInt = 1  # characters
    max_caption: PositiveInt = 1_000_000
    min_luma: Level = 0.0  # mean brightness, 0 is black and 255 white
    min_motion: Level = 0.0  # mean change of a pixel between a few frames spread over a video
    max_megabytes: PositiveInt = Field(1024, le=2047)  # of a file: each sample in it is read with the whole

    @field_validator("input", "output", "manifest")
    @classmethod
    def _written(cls, path: str | None) -> str | None:
        if path is not None and path != printable(path):
            raise ValueError("the path is not UTF-8, and could not be written down; rename what it names")
        return path

    @model_validator(mode="after")
    def _ordered(self) -> Words:
        for low, high in (("min_seconds", "max_seconds"), ("min_fps", "max_fps"), ("min_caption", "max_caption")):
            if getattr(self, high) is not None and getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low):g} is above {high}={getattr(self, high):g}: nothing fits")
        return self

    @property
    def cuts(self) -> bool:
        return self.scenes or self.window_seconds is not None

    @property
    def looks(self) -> bool:
        """Whether pixels decide."""
        return self.min_luma > 0 or self.min_motion > 0

    def binding(self) -> dict[str, Any]:
        """The words that shape the output."""
        return self.model_dump(exclude=FREE)
