"""The schema of index.json, which says what a folder of shards holds: one list a column, one place a sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

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


class LatentBucket(BaseModel):
    """A shape in pixels that clips were brought to before they were encoded; the rate of an image is 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    frames: Count
    height: Count
    width: Count
    fps: Rate

    def __str__(self) -> str:
        rate = f" at fps={self.fps:g}" if self.fps else ""
        return f"{self.frames}x{self.height}x{self.width}{rate}"


class StoredStates(BaseModel):
    """A text encoder whose token states lie beside the latents."""

    model_config = ConfigDict(extra="forbid")
    fingerprint: str
    length: Count  # most tokens of a caption
    dim: Count
    dtype: Literal["fp32", "bf16"]


class Latents(BaseModel):
    """How latents were made, and of what. A sample of theirs is one window of one clip in one bucket: its frames, rate
    and size are the bucket's, and [begin, end) is the window, in seconds after the source's first frame."""

    model_config = ConfigDict(extra="forbid")
    autoencoder: str  # the fingerprint
    channels: Count
    time: Count
    space: Count
    dtype: Literal["fp16", "bf16", "fp32"]
    source: str  # the fingerprint of the index of the clips
    buckets: list[LatentBucket]
    windows: Count  # a clip and bucket, at most; of a held-out clip there is the middle one alone
    holdout_share: Annotated[float, Field(ge=0, lt=1)]
    text: dict[str, StoredStates] = {}  # by the encoder's name; empty where no states are stored
    empty_sha256: str = ""  # of the file with the states of the empty caption
    mean: list[float] = []  # of each channel, over all samples
    std: list[float] = []
    checks: list[int] = []  # of each sample's bytes (``data.latents.check_of``): a sha256 takes longer
    # Of the clip that each sample is a window of: seconds from its first frame to its last, height, width. They decide
    # which bucket of a stage the clip belongs in.
    sources: list[tuple[Seconds, Count, Count]] = []

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a bucket's latents."""
        return self.channels, (frames - 1) // self.time + 1, height // self.space, width // self.space


class IndexFile(BaseModel):
    """index.json. ``root`` is the folder of the shards where they do not lie beside it: others wrote them."""

    model_config = ConfigDict(extra="forbid")
    format: Literal["lingen-shards-1"] = "lingen-shards-1"
    root: str | None = None
    latents: Latents | None = None  # None: the media are videos and images
    shards: list[ShardEntry] = []
    samples: Columns = Columns()

    @field_validator("root")
    @classmethod
    def _no_command(cls, root: str | None) -> str | None:
        """Whoever made a data set must not run what they like where it is read."""
        if root is not None and root.startswith("pipe:"):
            raise ValueError("it is a command, which only data.path may name")
        return root

    def to_json(self) -> bytes:
        """The file's content; without the windows' columns where nothing is cut."""
        samples = self.samples
        whole = not any(samples.begin) and not any(samples.end)
        left_out: dict[str, bool | dict[str, bool]] = {"samples": {"begin": True, "end": True}} if whole else {}
        left_out |= {name: True for name in ("root", "latents") if getattr(self, name) is None}
        return self.model_dump_json(exclude=left_out).encode()
