"""What is held out to validate on, and what fills a bucket."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from data.batch import Batch
from data.buckets import split
from data.counts import check_buckets
from data.pipeline import StageLoader, holdout_batches
from data.shards import Index
from lingen.config import BucketConfig, DataConfig, StageConfig
from lingen.errors import UserError

MakeConfig = Callable[..., DataConfig]
IMAGES, CLIPS = 41, 23  # what the shards of ``index`` hold
STAGE = StageConfig(
    name="stage",
    buckets=[BucketConfig(frames=frames, height=8, width=8, batch_size=2) for frames in (1, 5)],
    samples=8,
    lr=1e-3,
    fps=8,
)
VIDEO = STAGE.buckets[1]


@pytest.mark.parametrize(
    ("frames", "fps", "data", "message"),
    [
        (33, 8, {}, r"bucket 33x8x8 is empty: 33 frames at fps=8 need 4.00 s .* has 1.38 s"),
        (1, 8, {"holdout_share": 0.9999}, "held out"),
    ],
)
def test_an_empty_bucket_is_refused(
    index: Index, data_config: MakeConfig, frames: int, fps: float, data: dict[str, object], message: str
) -> None:
    bucket = BucketConfig(frames=frames, height=8, width=8, batch_size=4)
    stage = StageConfig(name="s", buckets=[bucket], samples=8, lr=1, fps=fps)
    with pytest.raises(UserError, match=message):
        StageLoader(index, stage, data_config(**data), seed=0, rank=0, world=1, grad_accumulation=1)


def test_check_buckets(index: Index, data_config: MakeConfig) -> None:
    counts, none = check_buckets(index, [STAGE], data_config())["stage"]
    images, clips = counts["1x8x8"], counts["5x8x8"]
    assert images.train + images.holdout == IMAGES and clips.train + clips.holdout == CLIPS
    assert clips.holdout > 0 and not none
    nothing = check_buckets(index, [STAGE], data_config(holdout_share=0.0))["stage"].buckets
    assert nothing["5x8x8"] == (CLIPS, 0, "")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_holdout_is_one_fixed_set_for_every_world(index: Index, data_config: MakeConfig, world: int) -> None:
    data = data_config(holdout_share=0.5)

    def batches(rank: int, world: int, limit: int = 7) -> list[Batch]:
        return list(holdout_batches(index, STAGE, VIDEO, data, limit=limit, batch_size=2, rank=rank, world=world))

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


def test_holdout_of_nothing_is_empty(index: Index, data_config: MakeConfig) -> None:
    data = data_config(holdout_share=0.0)
    assert list(holdout_batches(index, STAGE, VIDEO, data, limit=7, batch_size=2, rank=0, world=2)) == []
