"""Small clips with known facts, and the command itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from data.collect.run import collect
from data.collect.words import Words
from data.encode import encode_mp4

Make = Callable[..., Path]


def moving(frames: int = 9, side: int = 32, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """(F, S, S, 3): noise in large blocks that scrolls, bright and never still."""
    blocks = np.random.default_rng(seed).integers(40, 250, (side // 4, side // 4, 3), dtype=np.uint8)
    picture = blocks.repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(picture, 2 * n, axis=1) for n in range(frames)])


def flat(level: int, frames: int = 9, side: int = 32) -> npt.NDArray[np.uint8]:
    """(F, S, S, 3) of one grey."""
    return np.full((frames, side, side, 3), level, np.uint8)


def scenes(levels: tuple[int, ...] = (30, 200, 90), each: int = 24) -> npt.NDArray[np.uint8]:
    """Scenes of one grey each; a small mark moves, so that every frame of a scene differs from the others."""
    pixels = np.concatenate([flat(level, each) for level in levels])
    for n, frame in enumerate(pixels):
        frame[28:, n % each : n % each + 4] = 255
    return pixels


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(INPUT, name="out", **words) -> the output folder."""

    def run(given: Path, name: str = "out", **words: object) -> Path:
        out = tmp_path / name
        collect(Words.model_validate({"input": str(given), "output": str(out), "workers": 1} | words))
        return out

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve good clips."""
    root = tmp_path / "clips"
    root.mkdir()
    for n in range(12):
        (root / f"clip-{n:02d}.mp4").write_bytes(encode_mp4(moving(seed=n), 8.0))
        (root / f"clip-{n:02d}.txt").write_text(f"number {n}")
    return root


def rejected(out: Path) -> list[tuple[str, str]]:
    """(path, reason) of each, after a check that report.json counts the same."""
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    reasons = [line["reason"] for line in lines]
    report = json.loads((out / "report.json").read_text())
    assert report["rejected"] == {reason: reasons.count(reason) for reason in reasons}
    return [(line["path"], line["reason"]) for line in lines]


def content(out: Path) -> dict[str, bytes]:
    """What a run leaves, but for its page and its journal."""
    kept = [*out.glob("*.tar"), out / "index.json", out / "report.json", out / "rejected.jsonl"]
    return {file.name: file.read_bytes() for file in sorted(kept)}
