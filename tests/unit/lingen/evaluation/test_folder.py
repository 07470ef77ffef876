"""Run folders: lossless, resumable, and refused where they are not whole or cannot be compared."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lingen.errors import UserError
from lingen.evaluation.folder import Asked, RunFile, begin_run, read_run, read_runs
from lingen.evaluation.lossless import decode_lossless, encode_lossless

from .conftest import FRAMES, SIZE, Make, clip, spoilt


def test_videos_come_back_bit_for_bit(make_run: Make) -> None:
    run = read_run(make_run("a", noise=40))
    for n in range(4):
        assert torch.equal(run.pixels(n), spoilt(clip(n)[0], 40, n))
    odd = torch.randint(0, 256, (3, 5, 17, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode_lossless(encode_lossless(odd, 7.5)), odd)
    assert run.mp4(0)[4:8] == b"ftyp" and [record.seed for record in run.records] == [0, 1, 2, 3]


def test_an_interrupted_run_goes_on_where_it_was(make_run: Make) -> None:
    folder = make_run("a")
    file = read_run(folder).file
    assert begin_run(folder, file) == []
    (folder / "00002.json").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 4 videos, first 00002 \('.*', seed 2\)"):
        read_run(folder)
    kept = (folder / "00001.mkv").stat().st_mtime_ns
    assert begin_run(folder, file) == [2]
    make_run("a")
    assert read_run(folder).records[2].seed == 2 and (folder / "00001.mkv").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"steps": 10}}, "steps=30, not 10"),
        ({"fps": 12.0}, r"fps=8\.0, not 12\.0"),
        ({"machine": "another"}, "machine=test, not another"),
        ({"videos": [Asked(prompt="x", seed=0)]}, "videos=4 of other prompts or seeds, not 1"),
    ],
)
def test_a_folder_holds_one_run(make_run: Make, change: dict[str, Any], message: str) -> None:
    folder = make_run("a")
    with pytest.raises(UserError, match=f"holds another run: {message}"):
        begin_run(folder, read_run(folder).file.model_copy(update=change))


def test_a_damaged_video_is_named(make_run: Make) -> None:
    folder = make_run("a")
    run = read_run(folder)
    whole = (folder / "00001.mkv").read_bytes()
    (folder / "00001.mkv").write_bytes(whole[:-40])
    with pytest.raises(UserError, match=r"00001\.mkv is not the video that was sampled"):
        run.pixels(1)
    with pytest.raises(ValueError, match=r"cannot be decoded|has no frames"):
        decode_lossless(whole[:200])
    record = json.loads((folder / "00003.json").read_text())
    for change, message in (({"seconds": -1}, "seconds"), ({"flops": "many"}, "flops"), ({"seed": 9}, "seed 9")):
        (folder / "00003.json").write_text(json.dumps(record | change))
        with pytest.raises(UserError, match=rf"00003.json.*{message}"):
            read_run(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json"):
        read_run(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 3}, "a has 4 videos, b 3; compare runs of the same prompts and seeds"),
        ({"height": 48}, f"a has videos of {FRAMES}x{SIZE}x{SIZE}, b of {FRAMES}x48x{SIZE}"),
        ({"fps": 16.0}, "a has 8 frames/s, b 16"),
        ({"videos": [Asked(prompt=clip(n)[1], seed=(0, 1, 3, 3)[n]) for n in range(4)]}, "00002 has seed 2 in a but 3"),
        ({"videos": [Asked(prompt=clip(n)[1] + ", !"[n], seed=n) for n in range(2)] * 2}, "00000 is '.*' in a but"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_compared_are_refused(make_run: Make, fields: dict[str, Any], message: str) -> None:
    folders = [str(make_run("a")), str(make_run("b", **fields))]
    with pytest.raises(UserError, match=message):
        read_runs(folders)


def test_runs_have_names_of_their_own(make_run: Make, tmp_path: Any) -> None:
    a = str(make_run("a"))
    with pytest.raises(UserError, match="both called a; give labels"):
        read_runs([a, a])
    assert [run.name for run in read_runs([a, a], ["one", "two"])] == ["one", "two"]
    with pytest.raises(UserError, match=r"labels=\[one\] names 1 runs of 2"):
        read_runs([a, a], ["one"])
    with pytest.raises(UserError, match="labels: name"):
        read_runs([a, a], ["../one", "two"])
    with pytest.raises(UserError, match="is no folder of sampled videos"):
        read_runs([str(tmp_path)])
    with pytest.raises(ValueError, match="name"):
        RunFile.model_validate(read_run(a).file.model_dump() | {"name": "../x"})
