"""Which bucket of a stage a sample belongs in, what is in none and why, and what an empty bucket says."""

from __future__ import annotations

import io
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from data.buckets import assign, split
from data.counts import check_buckets
from data.decode import decode_clip
from data.index_file import Latents
from data.pipeline import StageLoader, holdout_batches
from data.shards import Index
from lingen.config import BucketConfig, DataConfig, StageConfig
from lingen.errors import UserError
from lingen.latents.units import buckets_of, make_units
from lingen.stage_config import with_batches

DATA = DataConfig(path="unused", workers=0, holdout_share=0.0)
Clip = tuple[int, float, int, int]  # frames, rate, height, width


def index_of(clips: Sequence[Clip], latents: Latents | None = None, keys: list[str] | None = None) -> Index:
    frames, fps, height, width = (np.array(column) for column in zip(*clips, strict=True))
    count, zeros = len(clips), np.zeros(len(clips), np.int64)
    return Index(
        path=Path("shards"), shards=["shard-000000.tar"], key=keys or [f"k{n}" for n in range(count)],
        caption=[""] * count, frames=frames, fps=fps.astype(np.float64), height=height, width=width, bytes=zeros + 1,
        shard=zeros, offset=zeros, sha256=[""] * count, begin=np.zeros(count), end=np.zeros(count), fingerprint="f",
        root=Path("shards"), latents=latents,
    )  # fmt: skip


def stage_of(*shapes: str, fps: float = 8.0, **more: object) -> StageConfig:
    """Of buckets by their names, as "17x64x64"."""
    sizes = [map(int, shape.split("x")) for shape in shapes]
    buckets = [BucketConfig(frames=f, height=h, width=w, batch_size=1) for f, h, w in sizes]
    return StageConfig.model_validate({"name": "s", "buckets": buckets, "samples": 8, "lr": 1, "fps": fps} | more)


def bucket_of(clip: Clip, stage: StageConfig, data: DataConfig = DATA) -> list[str]:
    return [name for name, rows in assign(index_of([clip]), stage, data).rows.items() if len(rows)]


@pytest.mark.parametrize(
    ("clip", "shapes", "wanted"),
    [
        ((17, 8, 64, 64), ["17x64x64"], "17x64x64"),
        ((17, 8, 64, 64), ["9x64x64", "17x64x64"], "17x64x64"),  # the longest that it fills
        ((16, 8, 64, 64), ["9x64x64", "17x64x64"], "9x64x64"),  # one frame short of the other
        ((16, 8, 64, 64), ["17x64x64", "33x64x64"], None),
        ((65, 32, 64, 64), ["17x64x64", "33x64x64"], "17x64x64"),  # seconds count, not the source's frames
        ((33, 8, 90, 160), ["33x64x64", "33x64x112", "33x112x64"], "33x64x112"),
        ((33, 8, 160, 90), ["33x64x64", "33x64x112", "33x112x64"], "33x112x64"),
        ((33, 8, 90, 100), ["33x64x64", "33x64x112"], "33x64x64"),
        # 16:9 into a square keeps 0.56 of the picture; half the seconds keep less
        ((33, 8, 90, 160), ["17x64x112", "33x64x64"], "33x64x64"),
        # ... and 3:1 into a square a third
        ((33, 8, 50, 150), ["17x64x192", "33x64x64"], "17x64x192"),
        # one shape at several resolutions: the largest that need not be upscaled, else the smallest
        ((17, 8, 200, 200), ["17x64x64", "17x128x128", "17x256x256"], "17x128x128"),
        ((17, 8, 256, 256), ["17x64x64", "17x128x128", "17x256x256"], "17x256x256"),
        ((17, 8, 256, 200), ["17x64x64", "17x128x128", "17x256x256"], "17x128x128"),  # both sides must do
        ((17, 8, 40, 40), ["17x256x256", "17x64x64", "17x128x128"], "17x64x64"),
        ((17, 8, 100, 100), ["17x64x128", "17x128x64"], "17x64x128"),  # nothing tells them apart: the first
        ((17, 8, 100, 100), ["17x128x64", "17x64x128"], "17x128x64"),
        ((1, 0, 90, 160), ["1x64x64", "1x64x112", "17x64x112"], "1x64x112"),
        ((1, 0, 400, 300), ["1x64x64", "1x80x64", "1x128x96"], "1x128x96"),
        ((1, 0, 64, 64), ["17x64x64"], None),
        ((17, 8, 64, 64), ["1x64x64"], None),
    ],
)
def test_the_bucket_that_keeps_the_most(clip: Clip, shapes: list[str], wanted: str | None) -> None:
    assert bucket_of(clip, stage_of(*shapes)) == ([wanted] if wanted else [])


def test_a_video_takes_part_among_the_images_once() -> None:
    stage = stage_of("17x64x64", "1x64x112", "1x64x64", "33x64x112")
    both = DATA.model_copy(update={"video_frames_as_images": True})
    assert bucket_of((33, 8, 90, 160), stage) == ["33x64x112"]
    assert bucket_of((33, 8, 90, 160), stage, both) == ["1x64x112", "33x64x112"]
    short = assign(index_of([(3, 8, 64, 64), (1, 0, 64, 64)]), stage, both)
    assert short.rows["1x64x64"].tolist() == [0, 1] and not short.none  # too short for a video, not for an image


def exactly(clip: Clip, stage: StageConfig) -> list[str]:
    """The rule once more, one clip at a time, in fractions."""
    frames, fps, height, width = clip
    found = []
    for images in (True, False):
        offers = []
        for order, b in enumerate(stage.buckets):
            if (b.frames == 1) != images or (frames == 1) != images:
                continue
            seconds = Fraction(b.frames - 1) / Fraction(stage.fps)
            if not images and seconds > Fraction(frames - 1) / Fraction(fps):
                continue
            ratio = Fraction(width, height) / Fraction(b.width, b.height)
            kept = min(ratio, 1 / ratio) * (1 if images else seconds)
            covers, area = height >= b.height and width >= b.width, b.height * b.width
            offers.append((kept, covers, area if covers else -area, -order))
        if offers:
            found.append(str(stage.buckets[-max(offers)[-1]]))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_clips_as_fractions_say(seed: int) -> None:
    chance = random.Random(seed)
    sides = [16, 32, 48, 64, 96, 128]
    shapes = {(chance.choice([1, 9, 17, 33]), chance.choice(sides), chance.choice(sides)) for _ in range(12)}
    stage = stage_of(*("x".join(map(str, shape)) for shape in chance.sample(sorted(shapes), len(shapes))))
    clips: list[Clip] = []
    for _ in range(2000):
        frames = chance.choice([1, 5, 9, 12, 17, 20, 33, 60])
        size = chance.choice(sides) * chance.randint(1, 4) // 2, chance.choice(sides) * chance.randint(1, 4) // 2
        clips.append((frames, 8.0 if frames > 1 else 0.0, *size))
    rows = assign(index_of(clips), stage, DATA).rows
    found: list[list[str]] = [[] for _ in clips]
    for name, members in rows.items():
        for n in members.tolist():
            found[n].append(name)
    assert found == [exactly(clip, stage) for clip in clips]


def test_what_is_in_no_bucket_is_counted_with_its_reason() -> None:
    clips = [(17, 8, 64, 64), (9, 8, 64, 64), (5, 8, 64, 64), (1, 0, 64, 64)]
    none = {shapes: assign(index_of(clips), stage_of(*shapes), DATA).none for shapes in (
        ("9x64x64", "17x64x64", "1x64x64"), ("17x64x64",), ("1x64x64",)
    )}  # fmt: skip
    assert list(none.values()) == [
        {"shorter than 1.00 s": 1},
        {"shorter than 2.00 s": 2, "images, and no bucket has one frame": 1},
        {"videos, and no bucket has several frames": 3},
    ]


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        (
            ["9x64x64", "17x64x64"],
            r"9x64x64 is empty: the 3 samples .* all nearer to 17x64x64 \(3\); add some of 1.00 s",
        ),
        (["17x64x64", "17x64x112"], r"17x64x112 is empty: .* 17x64x64 \(3\); .* about 112x64 \(width x height\)"),
        (["17x32x32", "17x64x64"], r"17x32x32 is empty: .* 17x64x64 \(3\)"),
        (
            ["17x64x64", "1x32x64", "1x64x64"],
            r"1x32x64 is empty: .* 1x64x64 \(1\); add some of about 64x32",
        ),
        (["17x64x64", "33x64x64"], r"33x64x64 is empty: .*need 4.00 s .* 3 videos .* has 2.00 s; add longer clips"),
        (["17x64x64", "1x64x64"], None),
    ],
)
def test_an_empty_bucket_says_what_would_fill_it(shapes: list[str], why: str | None) -> None:
    index, stage = index_of([*[(17, 8.0, 64, 64)] * 3, (1, 0.0, 64, 64)]), stage_of(*shapes)
    counts = check_buckets(index, [stage], DATA)["s"].buckets
    if why is None:
        assert [count.empty for count in counts.values()] == ["", ""]
        return
    with pytest.raises(UserError, match=why) as refused:
        StageLoader(index, stage, DATA, seed=0, rank=0, world=1, grad_accumulation=1)
    empty = next(count for count in counts.values() if count.empty)
    assert str(refused.value).endswith(f" is empty: {empty.empty}") and not empty.train


@pytest.mark.parametrize("shape", ["17x48x80", "1x80x48", "33x64x64"])
def test_a_clip_of_a_buckets_own_shape_fills_it(shape: str) -> None:
    """What ``why_empty`` promises, whatever other buckets there are."""
    others = ["17x64x64", "33x48x80", "9x48x80", "17x96x160", "17x24x40", "1x64x64", "1x160x96", "33x128x128"]
    stage = stage_of(shape, *(other for other in others if other != shape))
    frames, height, width = map(int, shape.split("x"))
    assert bucket_of((frames, 8.0 if frames > 1 else 0.0, height, width), stage) == [shape]


def test_a_million_rows_take_no_time() -> None:
    count, chance = 10**6, np.random.default_rng(0)
    small = index_of([(1, 0.0, 64, 64)])
    frames = np.where(chance.random(count) < 0.3, 1, chance.integers(2, 1200, count))
    columns = {
        "frames": frames, "fps": np.where(frames > 1, chance.choice([16.0, 24, 29.97, 60], count), 0.0),
        "height": chance.integers(64, 2160, count), "width": chance.integers(64, 3840, count), "key": range(count),
    }  # fmt: skip
    index = Index(**(vars(small) | columns))
    stage = stage_of("1x256x256", "1x256x448", "265x256x448", "265x448x256", "265x512x896", "537x512x896", fps=16.0)
    began = time.process_time()
    assigned = assign(index, stage, DATA)
    assert time.process_time() - began < 5  # 0.2 s where it was measured
    rows = np.concatenate(list(assigned.rows.values()))
    assert len(rows) == len(np.unique(rows)) == count - sum(assigned.none.values())
    assert min(map(len, assigned.rows.values())) > 1000


# Latents: each of a stage's windows is drawn for the bucket that its clip belongs in there.

CLIPS: list[Clip] = [(n, 8.0, h, w) for n in (9, 17, 33) for h, w in ((64, 64), (64, 112), (90, 160))]
CLIPS += [(1, 0.0, 64, 64), (1, 0.0, 90, 160)]


def latents_of(index: Index, stages: list[StageConfig], data: DataConfig = DATA) -> Index:
    """The index that precompute would write of these stages' units."""
    units = make_units(index, stages, data, windows=1, samples_per_shard=4)
    places = [(unit, n) for unit in units for n in range(len(unit.rows))]
    about = Latents(
        autoencoder="a", channels=1, time=8, space=8, dtype="fp32", source="s", windows=1, holdout_share=0.0,
        buckets=list(buckets_of(stages)), sources=[unit.source(index, n) for unit, n in places],
    )  # fmt: skip
    shapes = [
        (unit.bucket.frames, unit.fps if unit.bucket.frames > 1 else 0.0, unit.bucket.height, unit.bucket.width)
        for unit, _ in places
    ]
    return index_of(shapes, about, [unit.key(index, n) for unit, n in places])


@pytest.mark.parametrize("as_images", [False, True])
def test_latents_are_drawn_as_their_clips_are(as_images: bool) -> None:
    """Also where stages share a bucket, but not those beside it."""
    data = DATA.model_copy(update={"video_frames_as_images": as_images})
    stages = [
        stage_of("17x64x64", "17x64x112", "1x64x64"),
        stage_of("17x64x64", "33x64x64", "1x64x64", "1x64x112"),
        stage_of("9x64x112", "33x64x64"),
    ]
    clips = index_of(CLIPS)
    made = latents_of(clips, stages, data)
    for stage in stages:
        pixels, latents = assign(clips, stage, data).rows, assign(made, stage, data)
        for name, rows in pixels.items():
            drawn = [made.key[n] for n in latents.rows[name]]
            assert all(f"@{name}-" in key for key in drawn)
            assert [key.partition("@")[0] for key in drawn] == [clips.key[n] for n in rows]
        assert sum(latents.none.values()) == len(made) - len(set(np.concatenate(list(latents.rows.values()))))
    assert "latents of clips that are another bucket's here" in assign(made, stages[1], data).none


def test_latents_of_a_stage_that_has_nothing_for_a_bucket_are_refused() -> None:
    with pytest.raises(UserError, match=r"stage s: bucket 9x64x64 at fps=8 is empty: .* 17x64x64 \(2\)"):
        make_units(
            index_of([(17, 8.0, 64, 64)] * 2), [stage_of("9x64x64", "17x64x64")], DATA, windows=1, samples_per_shard=4
        )


MakeConfig = Callable[..., DataConfig]


def test_training_and_validation_share_one_assignment(index: Index, data_config: MakeConfig) -> None:
    """Clips of 1.4 s and images, all square, and one shape twice: each is in one bucket, on one side."""
    stage, data = stage_of("5x8x8", "9x8x8", "9x16x16", "1x8x8", "1x8x16"), data_config(holdout_share=0.4)
    own, _ = split(index, 0.4)
    rows = assign(index, stage, data).rows
    assert [len(rows[name]) for name in ("5x8x8", "9x8x8", "9x16x16", "1x8x8", "1x8x16")] == [0, 0, 23, 41, 0]
    for name in ("9x16x16", "1x8x8"):
        bucket = next(bucket for bucket in stage.buckets if str(bucket) == name)
        batches = holdout_batches(index, stage, bucket, data, limit=99, batch_size=1, rank=0, world=1)
        held_out = {batch.keys[0] for batch in batches}
        assert held_out == {index.key[n] for n in rows[name] if not own[n]} and held_out
    empty = next(bucket for bucket in stage.buckets if str(bucket) == "5x8x8")
    assert not list(holdout_batches(index, stage, empty, data, limit=99, batch_size=1, rank=0, world=1))


def test_a_token_budget_keeps_the_shares_on_all_ranks(index: Index, data_config: MakeConfig) -> None:
    shapes = [{"frames": 1, "height": 8, "width": 8, "share": 2}, {"frames": 5, "height": 8, "width": 8, "share": 1}]
    given = {"name": "s", "buckets": shapes, "samples": 10**6, "lr": 1, "token_budget": 65, "batch_multiple": 12}
    stage = with_batches(StageConfig.model_validate(given | {"fps": 8}), lambda bucket: bucket.frames)
    assert [bucket.batch_size for bucket in stage.buckets] == [60, 12]  # 65 and 13 would fit

    def loader(rank: int, world: int) -> StageLoader:
        return StageLoader(index, stage, data_config(), seed=0, rank=rank, world=world, grad_accumulation=1)

    drawn = []
    for rank, world in ((0, 1), (1, 2), (2, 3), (3, 4)):
        steps = iter(loader(rank, world))
        drawn.append([str(next(steps)[0].bucket) for _ in range(30)])
        assert Counter(drawn[-1]) == {"1x8x8": 20, "5x8x8": 10}
        assert all(abs(Counter(drawn[-1][:n])["5x8x8"] - n / 3) < 1 for n in range(30))
    assert drawn[1:] == drawn[:1] * 3
    with pytest.raises(UserError, match=r"batch_size=60.* 8 ranks \* .*; set stages.s.batch_multiple=24"):
        loader(0, 8)


@pytest.mark.parametrize(("height", "width"), [(100, 200), (200, 100), (90, 160), (120, 120)])
@pytest.mark.parametrize("shape", [(48, 48), (32, 80), (80, 32)])
def test_a_circle_stays_round_in_any_bucket(height: int, width: int, shape: tuple[int, int]) -> None:
    picture, stream = Image.new("RGB", (width, height)), io.BytesIO()
    radius = 20
    ImageDraw.Draw(picture).ellipse(
        [width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius], fill=(255, 255, 255)
    )
    picture.save(stream, "png")
    pixels = decode_clip(stream.getvalue(), frames=1, height=shape[0], width=shape[1], fps=8, start=0)
    lit = pixels[0, 0] > 127  # (h, w)
    scale = max(shape[0] / height, shape[1] / width)  # the picture covers the bucket, and no more
    for extent, side in ((lit.any(1).sum(), shape[0]), (lit.any(0).sum(), shape[1])):
        assert abs(int(extent) - min(side, 2 * radius * scale)) <= 2
    middle = lit.nonzero().double().mean(0) + 0.5
    assert (middle - torch.tensor(shape) / 2).abs().max() <= 1  # what is cut off is cut off on both sides
