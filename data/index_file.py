"""The schema of index.json, which says what a folder of shards holds: one list a column, one place a sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

INDEX = "index.json"
PARTIAL_INDEX = "index.partial.json"  # what a run that was stopped had written until then

Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Bytes = Annotated[int, Field(ge=1, lt=1 << 62)]  # ... and a Place together fit an int64
Place = Annotated[int, Field(ge=0, lt=1 << 62)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ShardEntry(BaseModel):
    """A tar, and its size as it was written."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    bytes: int


class Columns(BaseModel):
    """The samples. ``frames`` and ``fps`` are those of the part of the media that is the sample."""

    model_config = ConfigDict(extra="forbid")
    key: list[str] = []
    caption: list[str] = []
    frames: list[Count] = []
    fps: list[Rate] = []
    height: list[Count] = []
    width: list[Count] = []
    bytes: list[Bytes] = []
    shard: list[Place] = []
    offset: list[Place] = []
    sha256: list[str] = []
    # The frames shown in [begin, end) seconds after the first one; an end of 0 is the media's own. Both columns are
    # empty where every sample is a whole file.
    begin: list[Seconds] = []
    end: list[Seconds] = []

    def extend(self, other: Columns) -> None:
        """Put another's samples behind these."""
        for name in type(self).model_fields:
            getattr(self, name).extend(getattr(other, name))


class IndexFile(BaseModel):
    """index.json. ``root`` is the folder of the shards where they do not lie beside it: others wrote them."""

    model_config = ConfigDict(extra="forbid")
    format: Literal["lingen-shards-1"] = "lingen-shards-1"
    root: str | None = None
    shards: list[ShardEntry] = []
    samples: Columns = Columns()

    def to_json(self) -> bytes:
        """The file's content; without the windows' columns where nothing is cut."""
        samples = self.samples
        whole = not any(samples.begin) and not any(samples.end)
        left_out: dict[str, bool | dict[str, bool]] = {"samples": {"begin": True, "end": True}} if whole else {}
        if self.root is None:
            left_out["root"] = True
        return self.model_dump_json(exclude=left_out).encode()
