"""The shards of a small world of images and clips, made once for all tests of the loader and of what it holds out."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.decode import probe
from data.encode import encode_mp4
from data.shards import Index, Record, load_index, write_shards
from lingen.config import DataConfig

IMAGES, CLIPS = 41, 23


def record(key: str, media: bytes, suffix: str) -> Record:
    return Record(key, f"caption of {key}", media, suffix, probe(media), ("txt", b"caption"))


def image(level: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(stream, "png")
    return stream.getvalue()


def clip(seed: int) -> bytes:
    """Twelve frames whose brightness rises, so that the pixels tell where the window lay."""
    rising = (20 * np.arange(12) + seed).astype(np.uint8)[:, None, None, None]
    return encode_mp4(np.ascontiguousarray(np.broadcast_to(rising, (12, 16, 16, 3))), 8.0)


@pytest.fixture(scope="session")
def mixed_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 images and 23 clips in a shuffled order, six a shard. To be read only: all tests share it."""
    out = tmp_path_factory.mktemp("loader") / "shards"
    records = [record(f"image-{n}", image(n), "png") for n in range(IMAGES)]
    records += [record(f"clip-{n}", clip(n), "mp4") for n in range(CLIPS)]
    random.Random(0).shuffle(records)
    write_shards(records, out, samples_per_shard=6)
    return out


@pytest.fixture
def index(mixed_shards: Path) -> Index:
    """Of these shards."""
    return load_index(mixed_shards)


@pytest.fixture
def data_config(mixed_shards: Path) -> Callable[..., DataConfig]:
    """Make the settings for these shards, with ``changes``."""

    def make(**changes: object) -> DataConfig:
        return DataConfig.model_validate(
            {"path": str(mixed_shards), "workers": 0, "window_shards": 3, "holdout_share": 0.1, "prefetch": 2} | changes
        )

    return make
