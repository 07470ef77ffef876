"""What is held out to validate on, and what fills a bucket."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.batch import Batch
from data.buckets import split
from data.decode import probe
from data.encode import encode_mp4
from data.pipeline import StageLoader, check_buckets, holdout_batches
from data.shards import Index, Record, load_index, write_shards
from lingen.config import BucketConfig, DataConfig, StageConfig
from lingen.errors import UserError

IMAGES, CLIPS = 9, 23


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loader") / "shards"
    records = [record(f"image-{n}", image(n), "png") for n in range(IMAGES)]
    records += [record(f"clip-{n}", clip(n), "mp4") for n in range(CLIPS)]
    random.Random(0).shuffle(records)
    write_shards(records, out, samples_per_shard=6)
    return out


@pytest.fixture
def index(folder: Path) -> Index:
    return load_index(folder)


def config(folder: Path, **changes: object) -> DataConfig:
    return DataConfig.model_validate(
        {"path": str(folder), "workers": 0, "window_shards": 3, "holdout_share": 0.1, "prefetch": 2} | changes
    )


STAGE = StageConfig(
    name="stage",
    buckets=[BucketConfig(frames=frames, height=8, width=8, batch_size=2) for frames in (1, 5)],
    samples=8,
    lr=1e-3,
    fps=8,
)


@pytest.mark.parametrize(
    ("frames", "fps", "data", "message"),
    [
        (33, 8, {}, r"bucket 33x8x8 is empty: 33 frames at fps=8 need 4.00 s .* has 1.38 s"),
        (1, 8, {"holdout_share": 0.9999}, "held out"),
    ],
)
def test_an_empty_bucket_is_refused(
    index: Index, folder: Path, frames: int, fps: float, data: dict[str, object], message: str
) -> None:
    bucket = BucketConfig(frames=frames, height=8, width=8, batch_size=4)
    stage = StageConfig(name="s", buckets=[bucket], samples=8, lr=1, fps=fps)
    with pytest.raises(UserError, match=message):
        StageLoader(index, stage, config(folder, **data), seed=0, rank=0, world=1, grad_accumulation=1)


def test_check_buckets(index: Index, folder: Path) -> None:
    counts = check_buckets(index, [STAGE], config(folder))["stage"]
    assert sum(counts["1x8x8"]) == IMAGES and sum(counts["5x8x8"]) == CLIPS
    assert counts["5x8x8"].holdout > 0
    nothing = check_buckets(index, [STAGE], config(folder, holdout_share=0.0))["stage"]
    assert nothing["5x8x8"] == (CLIPS, 0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_holdout_is_one_fixed_set_for_every_world(index: Index, folder: Path, world: int) -> None:
    bucket, data = BucketConfig(frames=5, height=8, width=8, batch_size=1), config(folder, holdout_share=0.5)

    def batches(rank: int, world: int, limit: int = 7) -> list[Batch]:
        return list(holdout_batches(index, bucket, 8.0, data, limit=limit, batch_size=2, rank=rank, world=world))

    def valid_rows(some: list[Batch]) -> dict[int, tuple[str, bytes]]:
        return {
            int(b.positions[n]): (b.keys[n], b.pixels[n].numpy().tobytes())
            for b in some
            for n in range(len(b.keys))
            if b.valid[n]
        }

    alone = valid_rows(batches(0, 1))
    assert sorted(alone) == list(range(7)) and len({key for key, _ in alone.values()}) == 7
    ranks = [batches(rank, world) for rank in range(world)]
    merged: dict[int, tuple[str, bytes]] = {}
    for some in ranks:
        merged |= valid_rows(some)
    assert merged == alone
    assert len({tuple(len(batch.keys) for batch in some) for some in ranks}) == 1  # equal steps on all ranks
    _, holdout = split(index, 0.5)
    assert all(holdout[index.key.index(key)] for key, _ in alone.values())
    fewer = valid_rows(batches(0, 1, limit=3))
    assert fewer == {n: alone[n] for n in range(3)}


def test_holdout_of_nothing_is_empty(index: Index, folder: Path) -> None:
    bucket = BucketConfig(frames=5, height=8, width=8, batch_size=1)
    data = config(folder, holdout_share=0.0)
    assert list(holdout_batches(index, bucket, 8.0, data, limit=7, batch_size=2, rank=0, world=2)) == []
