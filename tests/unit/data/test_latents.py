"""A member of latents: written, read back, refused where it is not what the index says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from data.batch import Bucket
from data.buckets import eligible
from data.decode import BadSample, ClipInfo
from data.index_file import INDEX, IndexFile, LatentBucket, Latents, StoredStates
from data.latents import Layout, check_of, has_bucket, pack, read_empty, read_into, refuse_latents
from data.pipeline import holdout_batches
from data.shards import Index, LostShard, load_index
from data.writer import ShardWriter, Window
from lingen.config import BucketConfig, DataConfig, StageConfig
from lingen.errors import UserError

BUCKET = Bucket(5, 16, 32)
SHAPE = (3, 2, 2, 4)  # C, T, h, w: ratios of 4 and 8


def about(**more: object) -> Latents:
    words = {
        "autoencoder": "print", "channels": 3, "time": 4, "space": 8, "dtype": "fp16", "source": "s", "windows": 1,
        "buckets": [LatentBucket(frames=5, height=16, width=32, fps=8.0)], "holdout_share": 0.5,
        "text": {"t5": StoredStates(fingerprint="t", length=4, dim=6, dtype="bf16")},
    }  # fmt: skip
    return Latents.model_validate(words | more)


def sample(seed: int, tokens: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    return torch.randn(SHAPE).half(), {"t5": torch.randn(tokens, 6).bfloat16()}


def write(folder: Path, members: list[bytes], latents: Latents | None = None) -> Index:
    """A folder of one shard."""
    folder.mkdir()
    more = {"checks": [check_of(member) for member in members], "sources": [(1.0, 20, 40)] * len(members)}
    index = IndexFile(latents=(latents or about()).model_copy(update=more))
    writer = ShardWriter(folder)
    for n, member in enumerate(members):
        window = Window(f"clip-{n}@x", f"caption {n}", ClipInfo(5, 8.0, 16, 32), 1.0, 2.0)
        writer.add_media(window.key, member, "safetensors", ("txt", b"c"), [window])
    written = writer.close()
    assert written is not None
    index.shards.append(written[0])
    index.samples = written[1]
    (folder / INDEX).write_bytes(index.to_json())
    return load_index(folder)


def read_latents(index: Index, i: int, *, verify: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A sample's latents and states, read into memory that held something else before."""
    assert index.latents is not None
    layout = Layout(index.latents, BUCKET)
    memory = torch.full((2 * layout.bytes,), 0xAA, dtype=torch.uint8)
    read_into(memory, 1, index, i, layout, verify=verify)
    assert (memory[: layout.bytes] == 0xAA).all()
    layout.clear(memory, 0)
    latents, states = layout.read(memory)
    return latents[1], states.rows()[1] if states else {}


def test_a_member_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = [sample(n, tokens=n) for n in range(3)]  # the first has no token
    index = write(tmp_path / "latents", [pack(latents, tokens, "print") for latents, tokens in made])
    for n, (latents, tokens) in enumerate(made):
        got, states = read_latents(index, n)
        assert got.dtype == torch.float16 and torch.equal(got, latents)
        assert states["t5"].dtype == torch.bfloat16 and torch.equal(states["t5"], tokens["t5"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_holds_latents_states_and_empty_holes(tmp_path: Path, workers: int) -> None:
    made = [sample(n, tokens=1 + n % 3) for n in range(6)]
    members = [pack(latents, tokens, "print") for latents, tokens in made]
    members[4] = b"no safetensors at all"
    index = write(tmp_path / "latents", members, about(holdout_share=0.99))
    data = DataConfig(path=str(index.path), workers=workers, holdout_share=0.9999)
    shape = BucketConfig(frames=5, height=16, width=32, batch_size=1)
    stage = StageConfig(name="s", buckets=[shape], samples=1, lr=1, fps=8)
    log = tmp_path / "bad.jsonl"
    batches = list(holdout_batches(index, stage, shape, data, limit=6, batch_size=4, rank=0, world=1, bad_log=log))
    seen = 0
    for batch in batches:
        assert batch.latents is not None and batch.states is not None and batch.lost is None
        assert batch.latents.shape[1:] == SHAPE and batch.pixels.numel() == 0 and batch.pixels.dtype == torch.uint8
        for n, row in enumerate(batch.states.rows()):
            number = int(batch.keys[n][5])
            latents, tokens = made[number]
            assert batch.valid[n] == (number != 4)
            good = bool(batch.valid[n])
            assert torch.equal(batch.latents[n], latents if good else torch.zeros_like(latents))
            assert torch.equal(row["t5"], tokens["t5"][: None if good else 0])
            assert batch.captions[n] == (f"caption {number}" if good else "")
            seen += 1
    assert seen == 6 and '"no safetensors"' in (tmp_path / "bad-rank0.jsonl").read_text()


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (b"\0", "no safetensors"),
        (b'\x08\x00\x00\x00\x00\x00\x00\x00{"a":1} ', "no safetensors"),
        (b"\xff" * 64, "no safetensors"),
        (save({"latents": torch.zeros(SHAPE).half()}), "other latents"),  # no states
        (save({"text.t5": torch.zeros(1, 6).bfloat16()}), "other latents"),  # no latents
        (pack(torch.zeros(SHAPE), {"t5": torch.zeros(1, 6).bfloat16()}, ""), "other latents"),  # fp32
        (pack(torch.zeros(3, 2, 2, 5).half(), {"t5": torch.zeros(1, 6).bfloat16()}, ""), "other latents"),
        (pack(torch.zeros(SHAPE).half(), {"t5": torch.zeros(5, 6).bfloat16()}, ""), "other latents"),  # too long
        (pack(torch.zeros(SHAPE).half(), {"t5": torch.zeros(1, 7).bfloat16()}, ""), "other latents"),
        (pack(torch.zeros(SHAPE).half(), {"t5": torch.zeros(1, 6)}, ""), "other latents"),
        (pack(torch.zeros(SHAPE).half(), {"clip": torch.zeros(1, 6).bfloat16()}, ""), "other latents"),
    ],
)
def test_what_the_index_does_not_say_is_refused(tmp_path: Path, member: bytes, reason: str) -> None:
    index = write(tmp_path / "latents", [member])
    with pytest.raises(BadSample) as bad:
        read_latents(index, 0)
    assert bad.value.reason == reason


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    index = write(tmp_path / "latents", [pack(*sample(0), "print")])
    with (index.shard_paths[0]).open("r+b") as shard:
        shard.seek(int(index.offset[0] + index.bytes[0] - 1))
        shard.write(b"\x55")
    with pytest.raises(BadSample, match="wrong checksum"):
        read_latents(index, 0)
    read_latents(index, 0, verify=False)
    with (index.shard_paths[0]).open("r+b") as shard:
        shard.seek(int(index.offset[0] + 8))
        shard.write(b"\x55")  # of the header
    with pytest.raises(BadSample, match="wrong checksum"):
        read_latents(index, 0)
    with pytest.raises(BadSample, match="no safetensors"):
        read_latents(index, 0, verify=False)


def test_the_sha256_decides_where_the_check_differs(tmp_path: Path) -> None:
    latents, tokens = sample(0)
    index = write(tmp_path / "latents", [pack(latents, tokens, "print")])
    assert index.latents is not None
    index.latents.checks[0] ^= 1
    got, states = read_latents(index, 0)
    assert torch.equal(got, latents) and torch.equal(states["t5"], tokens["t5"])


@pytest.mark.parametrize("counts", [(0, 3), (1, 1), (2, 3), (3, 0)])
def test_parts_that_begin_amid_a_word(tmp_path: Path, counts: tuple[int, int]) -> None:
    """Tokens of 10 and of 6 bytes: the check is of the whole all the same, and no copy of the member is made."""
    text = {name: StoredStates(fingerprint=name, length=3, dim=dim, dtype="bf16") for name, dim in (("a", 5), ("b", 3))}
    tokens = {name: torch.randn(count, text[name].dim).bfloat16() for name, count in zip("ab", counts, strict=True)}
    latents = sample(0)[0]
    index = write(tmp_path / "latents", [pack(latents, tokens, "print")], about(text=text))
    for wrong in ("00" * 32, index.sha256[0]):
        got, states = read_latents(replace(index, sha256=[wrong]), 0)
        assert torch.equal(got, latents) and all(torch.equal(states[name], tokens[name]) for name in text)


@pytest.mark.parametrize(
    "header",
    [
        '{"latents":{"dtype":"F16","shape":[3,2,2,4],"data_offsets":[8,104]}}',
        '{"latents":{"dtype":"F16","shape":[3,2,2,4],"data_offsets":[0,90]}}',
        '{"latents":{"dtype":"F16","shape":[3,2,2,4.0],"data_offsets":[0,96]}}',
        '{"latents":{"dtype":"F16","shape":[3,-2,-2,4],"data_offsets":[0,96]}}',
        '{"latents":{"dtype":["F16"],"shape":[3,2,2,4],"data_offsets":[0,96]}}',
        '{"latents":{"dtype":"F16","shape":[3,2,2,4]}}',
        '{"latents":7}',
        "[]",
        "7",
        "[" * 5000,
    ],
)
def test_headers_that_lie(tmp_path: Path, header: str) -> None:
    member = len(header).to_bytes(8, "little") + header.encode() + bytes(96)
    index = write(tmp_path / "latents", [member], about(text={}))
    with pytest.raises(BadSample, match="no safetensors"):
        read_latents(index, 0)


def test_a_shard_that_was_cut_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.time.sleep", lambda _: None)
    index = write(tmp_path / "latents", [pack(*sample(0), "print")])
    with index.shard_paths[0].open("r+b") as shard:
        shard.truncate(int(index.offset[0] + index.bytes[0] - 1))
    with pytest.raises(LostShard, match="it was cut"):
        read_latents(index, 0)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4096, 4099])
def test_a_check_sees_each_bit(size: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    padded = content + bytes(-size % 8)
    words = [int.from_bytes(padded[at : at + 8], "little") for at in range(0, len(padded), 8)]
    assert check_of(content) == sum(words) % 2**64
    for bit in range(0, 8 * size, 1 + 8 * size // 100):
        other = bytearray(content)
        other[bit // 8] ^= 1 << bit % 8
        assert check_of(bytes(other)) != check_of(content)


def test_a_layout_keeps_samples_apart() -> None:
    layout = Layout(about(), BUCKET)
    memory = torch.full((3 * layout.bytes,), 0xAA, dtype=torch.uint8)
    made = [sample(n) for n in range(3)]
    for n in (2, 0, 1):
        member = pack(*made[n], "print")

        def read(part: memoryview, at: int, member: bytes = member) -> None:
            part[:] = member[at : at + len(part)]

        assert layout.fill(memory, n, len(member), read, verify=True) == check_of(member)
    latents, states = layout.read(memory)
    assert states is not None and torch.equal(latents, torch.stack([one for one, _ in made]))
    assert all(torch.equal(row["t5"], tokens["t5"]) for row, (_, tokens) in zip(states.rows(), made, strict=True))
    layout.clear(memory, 1)
    latents, states = layout.read(memory)
    assert states is not None and not latents[1].any() and [len(row["t5"]) for row in states.rows()] == [2, 0, 2]
    assert torch.equal(latents[2], made[2][0])


def test_latents_fill_their_own_bucket_alone(tmp_path: Path) -> None:
    index = write(tmp_path / "latents", [pack(*sample(0), "print")])
    data = DataConfig(path=str(index.path))
    fitting = [
        list(eligible(index, bucket, fps=fps, data=data))
        for bucket, fps in ((BUCKET, 8.0), (BUCKET, 4.0), (Bucket(5, 16, 16), 8.0), (Bucket(1, 16, 32), 8.0))
    ]
    assert fitting == [[0], [], [], []]
    ours = BucketConfig(frames=5, height=16, width=32, batch_size=1)
    assert has_bucket(about(), ours, 8.0) and not has_bucket(about(), ours, 4.0)


def test_clips_and_latents_are_told_apart(tmp_path: Path, index: Index) -> None:
    made = write(tmp_path / "latents", [pack(*sample(0), "print")])
    refuse_latents(index, "data=DIR")
    with pytest.raises(UserError, match="data=DIR holds latents"):
        refuse_latents(made, "data=DIR")
    with pytest.raises(UserError, match=r"empty\.safetensors cannot be read"):
        read_empty(made)
    assert np.array_equal(made.begin, [1.0]) and np.array_equal(made.end, [2.0])
