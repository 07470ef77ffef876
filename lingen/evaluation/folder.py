"""The folder of one sampled run: what was asked, and each video with what it cost.

    RUN/run.json           name, settings, size, the prompts and seeds of all videos in order
    RUN/00000.mkv          the first video, lossless; what the metrics read
    RUN/00000.mp4          the same for eyes
    RUN/00000.json         its prompt, seed and cost; written last, so a video that has it is whole

Shapes: F frames, H x W pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from data.encode import encode_mp4
from lingen.errors import UserError
from lingen.evaluation.lossless import decode_lossless, encode_lossless
from lingen.files import write_file
from lingen.output import writing
from lingen.runfolder import write_aside

RUN = "run.json"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$"  # of a run: it names a folder, a column and a line of a plot
Kind = TypeVar("Kind", bound=BaseModel)
NonNegative = Annotated[FiniteFloat, Field(ge=0.0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Asked(_Record):
    """One video to sample."""

    prompt: str
    seed: NonNegativeInt


class RunFile(_Record):
    """run.json. Equal settings and seeds make equal videos; a folder holds one such run."""

    name: Annotated[str, Field(pattern=NAME)]
    curve: Annotated[str, Field(max_length=64)] = ""  # runs of one curve are joined by a line in plots
    settings: dict[str, Any]  # all that the videos depend on: weights, steps, solver, guidance, cache
    machine: str  # what the latencies were measured on
    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    fps: PositiveFloat
    videos: Annotated[list[Asked], Field(min_length=1)]


class VideoRecord(_Record):
    """What one video cost. Those of a batch share its time and its memory: seconds are the batch's over its videos."""

    prompt: str
    seed: NonNegativeInt
    sha256: str  # of the lossless file
    batch: PositiveInt  # videos that were sampled together
    denoise_seconds: NonNegative  # of the denoising loop
    seconds: NonNegative  # from the prompt to the pixels: with the text encoders and the decoder
    flops: NonNegativeInt  # that the denoiser executed for this video, counted
    peak_memory: NonNegativeInt | None  # bytes: of the GPU's tensors, else of the process; None: not to be had here
    cache: dict[str, Any] | None  # what the cache skipped, as the pipeline sums it up


@dataclass(frozen=True)
class SampledRun:
    """A finished run folder."""

    path: Path
    file: RunFile
    records: list[VideoRecord]  # in the order of ``file.videos``

    @property
    def name(self) -> str:
        """How tables and pages call it."""
        return self.file.name

    def pixels(self, number: int) -> torch.Tensor:
        """Video ``number``, (3, F, H, W) uint8.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.path / f"{stem(number)}.mkv"
        media = _read(path)
        if hashlib.sha256(media).hexdigest() != self.records[number].sha256:
            raise UserError(f"{path} is not the video that was sampled; remove it and its .json, and sample it again")
        try:
            video = decode_lossless(media)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        size = (3, self.file.frames, self.file.height, self.file.width)
        if tuple(video.shape) != size:
            raise UserError(f"{path} has {tuple(video.shape)}, not the {size} of {self.path / RUN}")
        return video

    def mp4(self, number: int) -> bytes:
        """Video ``number`` for eyes."""
        return _read(self.path / f"{stem(number)}.mp4")


def stem(number: int) -> str:
    """The file name of a video, without its ending."""
    return f"{number:05d}"


def begin_run(folder: Path, file: RunFile) -> list[int]:
    """Make the folder, or go on with it. Returns the numbers of the videos that are not there yet.

    Raises:
        UserError: the folder holds another run, or cannot be written.
    """
    path = folder / RUN
    if path.exists():
        there = _parse(RunFile, path)
        if there != file:
            raise UserError(f"{folder} holds another run: {_difference(there, file)}; name another folder, or variant")
    else:
        write_aside(path, file.model_dump_json(indent=1) + "\n")
    return [n for n in range(len(file.videos)) if not (folder / f"{stem(n)}.json").exists()]


def _difference(there: RunFile, here: RunFile) -> str:
    before, now = ({**file.model_dump(mode="json"), "settings": None, **file.settings} for file in (there, here))
    key = next((key for key in {**before, **now} if before.get(key) != now.get(key)), "its settings")
    if key == "videos":
        return f"videos={len(there.videos)} of other prompts or seeds, not {len(here.videos)}"
    return f"{key}={before.get(key)}, not {now.get(key)}"


def write_video(folder: Path, number: int, video: torch.Tensor, fps: float, cost: dict[str, Any]) -> None:
    """Write video ``number``, (3, F, H, W) uint8, for metrics and for eyes, and then its record; ``cost`` has the
    fields of ``VideoRecord`` but for the checksum."""
    media = encode_lossless(video, fps)
    record = VideoRecord(sha256=hashlib.sha256(media).hexdigest(), **cost)
    with writing(folder):
        write_file(folder / f"{stem(number)}.mkv", media)
        write_file(folder / f"{stem(number)}.mp4", encode_mp4(video.permute(1, 2, 3, 0).contiguous().numpy(), fps))
        write_file(folder / f"{stem(number)}.json", (record.model_dump_json(indent=1) + "\n").encode())


def read_run(folder: str | Path) -> SampledRun:
    """A run folder, whole.

    Raises:
        UserError: it is none, or videos are missing.
    """
    path = Path(folder)
    if not (path / RUN).is_file():
        raise UserError(f"runs: {folder} is no folder of sampled videos ({RUN} is missing); evaluate.py writes them")
    file = _parse(RunFile, path / RUN)
    endings = ("json", "mkv", "mp4")
    missing = [n for n in range(len(file.videos)) if not all((path / f"{stem(n)}.{e}").exists() for e in endings)]
    if missing:
        first = file.videos[missing[0]]
        raise UserError(
            f"runs: {folder} lacks {len(missing)} of {len(file.videos)} videos, first {stem(missing[0])} "
            f"('{first.prompt}', seed {first.seed}); sample it to its end first"
        )
    records = [_parse(VideoRecord, path / f"{stem(n)}.json") for n in range(len(file.videos))]
    for n, (record, asked) in enumerate(zip(records, file.videos, strict=True)):
        if (record.prompt, record.seed) != (asked.prompt, asked.seed):
            raise UserError(
                f"{path / stem(n)}.json is of ('{record.prompt}', seed {record.seed}), not of what {RUN} asks"
            )
    return SampledRun(path, file, records)


def read_runs(folders: list[str], labels: list[str] | None = None) -> list[SampledRun]:
    """Run folders that can be compared: the same prompts and seeds, the same size, and names of their own.

    ``labels`` are other names for them.

    Raises:
        UserError: one is not whole, or they cannot be compared.
    """
    runs = [read_run(folder) for folder in folders]
    if labels is not None:
        if len(labels) != len(runs):
            raise UserError(f"labels=[{','.join(labels)}] names {len(labels)} runs of {len(runs)}")
        runs = [_renamed(run, name) for run, name in zip(runs, labels, strict=True)]
    for n, run in enumerate(runs):
        twin = next((other for other in runs[:n] if other.name == run.name), None)
        if twin is not None:
            raise UserError(f"runs: {twin.path} and {run.path} are both called {run.name}; give labels=[A,B,...]")
    for run in runs[1:]:
        _refuse_other(runs[0], run)
    return runs


def _renamed(run: SampledRun, name: str) -> SampledRun:
    try:
        file = RunFile.model_validate(run.file.model_dump() | {"name": name})
    except ValidationError as error:
        raise _damaged(error, "labels") from error
    return SampledRun(run.path, file, run.records)


def _refuse_other(one: SampledRun, other: SampledRun) -> None:
    """Raise a UserError that says why two runs cannot be compared."""
    sizes = [f"{run.file.frames}x{run.file.height}x{run.file.width}" for run in (one, other)]
    if sizes[0] != sizes[1]:
        raise UserError(f"runs: {one.name} has videos of {sizes[0]}, {other.name} of {sizes[1]}; compare equal sizes")
    if one.file.fps != other.file.fps:
        raise UserError(f"runs: {one.name} has {one.file.fps:g} frames/s, {other.name} {other.file.fps:g}")
    if len(one.file.videos) != len(other.file.videos):
        counts = f"{one.name} has {len(one.file.videos)} videos, {other.name} {len(other.file.videos)}"
        raise UserError(f"runs: {counts}; compare runs of the same prompts and seeds")
    for n, (a, b) in enumerate(zip(one.file.videos, other.file.videos, strict=True)):
        if a.prompt != b.prompt:
            raise UserError(f"runs: video {stem(n)} is '{a.prompt}' in {one.name} but '{b.prompt}' in {other.name}")
        if a.seed != b.seed:
            raise UserError(f"runs: video {stem(n)} has seed {a.seed} in {one.name} but {b.seed} in {other.name}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _parse(kind: type[Kind], path: Path) -> Kind:
    try:
        return kind.model_validate_json(_read(path))
    except ValidationError as error:
        raise _damaged(error, path) from error


def _damaged(error: ValidationError, where: Path | str) -> UserError:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return UserError(f"{where}: {key + ': ' if key else ''}{first['msg']} (got {str(first['input'])[:80]!r})")
