"""VBench (Huang et al., arXiv 2311.17982), run in an environment of its own, on the videos of our runs.

OUT/vbench/RUN/videos/PROMPT-0.mp4 ...   the names by which VBench knows the prompts
OUT/vbench/RUN/log                       what the command said
OUT/vbench/RUN/results/*_eval_results.json   {dimension: [score, [{video_path, video_results}, ...]]}
OUT/vbench/RUN/done.json                 of which videos and dimensions the results are; with it they are kept
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from lingen.errors import UserError, nearest
from lingen.evaluation.folder import SampledRun
from lingen.evaluation.statistics import Floats
from lingen.output import writing
from lingen.runfolder import write_aside

PERCENT = ("imaging_quality",)  # VBench's values of a video are of 100, though the others are shares
LONGEST_NAME = 255  # bytes, on the file systems we know
# Those that need nothing but the videos and their names; the others need VBench's own prompts.
ANY_PROMPTS = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
    "imaging_quality",
)  # fmt: skip
DIMENSIONS = (
    *ANY_PROMPTS, "temporal_flickering", "object_class", "multiple_objects", "human_action", "color",
    "spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip


class VBenchConfig(BaseModel):
    """vbench={command: /envs/vbench/bin/vbench, dimensions: [motion_smoothness]}"""

    model_config = ConfigDict(extra="forbid", frozen=True)
    command: str  # the program of an environment that has VBench
    dimensions: Annotated[list[str], Field(min_length=1)] = list(ANY_PROMPTS)
    mode: Literal["custom_input", "vbench_standard"] = "custom_input"  # the other: VBench's own prompts, 5 videos each
    full_info: str | None = None  # VBench_full_info.json; None: where the command has its own


def check(config: VBenchConfig) -> str:
    """The program's path.

    Raises:
        UserError: it is not to be found, or the dimensions are not VBench's, or not for such prompts.
    """
    program = shutil.which(config.command)
    if program is None:
        raise UserError(
            f"vbench.command={config.command} is no program that can be run; name the vbench of its environment"
        )
    known = ANY_PROMPTS if config.mode == "custom_input" else DIMENSIONS
    for name in config.dimensions:
        if name not in DIMENSIONS:
            raise UserError(f"vbench.dimensions: VBench has no {name}{nearest(name, DIMENSIONS)}")
        if name not in known:
            raise UserError(f"vbench.dimensions: {name} needs VBench's own prompts and vbench.mode=vbench_standard")
    if config.full_info is not None and not Path(config.full_info).is_file():
        raise UserError(f"vbench.full_info={config.full_info} is no file; name VBench_full_info.json")
    return str(Path(program).absolute())


def file_names(run: SampledRun) -> list[str]:
    """The name of each video, PROMPT-I.mp4, I counting the videos of one prompt from 0.

    Raises:
        UserError: a prompt cannot be a file's name.
    """
    seen: Counter[str] = Counter()
    names = []
    for asked in run.file.videos:
        name = f"{asked.prompt}-{seen[asked.prompt]}.mp4"
        seen[asked.prompt] += 1
        if "/" in name or "\0" in name or len(os.fsencode(name)) > LONGEST_NAME:
            raise UserError(
                f"vbench: '{asked.prompt[:60]}' cannot name a file, as VBench wants a prompt to: too long, or a /"
            )
        names.append(name)
    return names


def score_run(run: SampledRun, config: VBenchConfig, out: Path) -> dict[str, Floats]:
    """Each dimension's values of the run's videos, (N,), NaN where VBench has none; from earlier results, if these
    are of the same videos.

    Raises:
        UserError: as ``check`` and ``file_names``; the command failed, or left no results that can be read.
    """
    program, names, folder = check(config), file_names(run), out / "vbench" / run.name
    videos, results, done = folder / "videos", folder / "results", folder / "done.json"
    sums = [record.sha256 for record in run.records]
    asked = {**config.model_dump(exclude={"command"}), "videos": hashlib.sha256("".join(sums).encode()).hexdigest()}
    if not (done.exists() and json.loads(done.read_text()) == asked):
        with writing(out):
            for old in (videos, results):
                shutil.rmtree(old, ignore_errors=True)
                old.mkdir(parents=True)
            done.unlink(missing_ok=True)
            for n, name in enumerate(names):
                (videos / name).write_bytes(run.mp4(n))
        _call(program, config, videos, results, folder / "log")
        read_results(results, config.dimensions, names)  # before they are said to be good
        write_aside(done, json.dumps(asked))
    return read_results(results, config.dimensions, names)


def _call(program: str, config: VBenchConfig, videos: Path, results: Path, log: Path) -> None:
    words = [program, "evaluate", "--videos_path", str(videos.resolve()), "--output_path", str(results.resolve())]
    words += ["--mode", config.mode, "--dimension", *config.dimensions]
    if config.full_info is not None:
        words += ["--full_json_dir", str(Path(config.full_info).resolve())]
    with log.open("wb") as said:
        code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=log.parent).returncode
    if code:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
        raise UserError(f"vbench.command={config.command} ended with {code}: {last[:200]} (all of it in {log})")


def read_results(folder: Path, dimensions: list[str], names: list[str]) -> dict[str, Floats]:
    """The values by dimension, (N,) in the order of ``names``.

    Raises:
        UserError: there are no results, or not of these dimensions and videos.
    """
    files = sorted(folder.glob("*_eval_results.json"))
    if len(files) != 1:
        raise UserError(
            f"vbench: {folder} has {len(files)} files *_eval_results.json, where one run of VBench leaves one"
        )
    try:
        tree: Any = json.loads(files[0].read_bytes())
        found = {
            dimension: _values(tree[dimension][1], names) / (100 if dimension in PERCENT else 1)
            for dimension in dimensions
        }
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"vbench: {files[0]} is not what VBench writes for these dimensions: {error!r}") from error
    empty = next((dimension for dimension, values in found.items() if np.isnan(values).all()), None)
    if empty is not None:
        raise UserError(f"vbench: {files[0]} has no value of {empty} for any of the {len(names)} videos")
    return found


def _values(entries: list[dict[str, Any]], names: list[str]) -> Floats:
    by_name = {Path(entry["video_path"]).name: entry["video_results"] for entry in entries}
    return np.array([float(by_name.get(name, np.nan)) for name in names])
