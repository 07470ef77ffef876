"""What a start may build on: lineage, exports, records, broken samples. In one process, on tiny runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.shards import load_index
from lingen.compose import compose
from lingen.errors import UserError
from lingen.export import load_trained
from lingen.loop import train
from tests.runs import Signal, lines

STAGES = ["demo_image", "demo_video"]
Start = Callable[..., Path]


VIDEO = "[{frames: 9, height: 32, width: 32, batch_size: 4}]"


@pytest.fixture
def start(world: Any, tmp_path: Path) -> Start:
    """Run a command in this process and return the run's folder; ``stop_at`` is a step that a signal comes in."""

    def run(*words: str, name: str = "run", stop_at: int | None = None) -> Path:
        folder = tmp_path / name
        small = [
            "~stages.demo_video_128", "validation.every_steps=2", "checkpoint.every_steps=2", "model=dit",
            *(f"stages.{s}.samples=16" for s in STAGES),
            "stages.demo_image.buckets.0.batch_size=4", f"stages.demo_video.buckets={VIDEO}",
        ]  # fmt: skip
        if any(word.startswith("stage=") for word in words):
            small = small[1:4]
        config = compose([f"name={name}", f"runs_dir={tmp_path}", *world.words, "logger.console=false", *small, *words])
        stop = Signal(folder, stop_at)
        code = train(config, stop)  # type: ignore[arg-type]
        assert code == (75 if stop_at else 0)
        return folder

    return run


def trained(run: Path) -> list[tuple[int, str, float]]:
    return [(r["step"], r["stage"], r["loss"]) for r in lines(run, "train")]


def damaged(world: Any, out: Path, is_bad: Callable[[int, str], bool]) -> Path:
    """The world's shards with the middle byte of some members flipped."""
    shutil.copytree(world.shards, out)
    index = load_index(out)
    for n, key in enumerate(index.key):
        if is_bad(n, key):
            with (out / index.shards[index.shard[n]]).open("r+b") as shard:
                shard.seek(int(index.offset[n] + index.bytes[n] // 2))
                byte = shard.read(1)
                shard.seek(-1, 1)
                shard.write(bytes([byte[0] ^ 0xFF]))
    return out


def test_a_signal_saves_after_the_very_step_it_came_in(start: Start) -> None:
    reference = start(name="reference")
    run = start(stop_at=2)  # a step that is to be validated, too
    assert [step for step, *_ in trained(run)] == [1, 2]
    assert (run / "checkpoints" / "demo_image" / "step_00000002" / "manifest.json").exists()
    assert start() == run and trained(run) == trained(reference)
    moments = [
        [(r["step"], r["stage"], r["at"], r["loss"]) for r in lines(r_, "validation")] for r_ in (run, reference)
    ]
    assert moments[0] == moments[1]


def test_a_signal_in_the_last_step_leaves_the_rest_to_the_next_start(start: Start) -> None:
    reference = start(name="reference")
    for last in (4, 8):  # of either stage
        run = start(stop_at=last)
        assert lines(run, "validation")[-1]["at"] == "interval" or last == 4
        assert trained(run)[-1][0] == last
    assert start() == run and trained(run) == trained(reference)
    assert [r["loss"] for r in lines(run, "validation")] == [r["loss"] for r in lines(reference, "validation")]


def test_the_stage_that_init_from_names_may_go_on(start: Start) -> None:
    source = start("stages.demo_image.samples=400", name="source", stop_at=3)
    words = ["stage=demo_video", "stage.samples=16", f"stage.buckets={VIDEO}"]
    words.append(f"init_from={source}/checkpoints/demo_image")
    run = start(*words, stop_at=2)
    for step, stop_at in ((4, 3), (15, None)):  # what we began with is kept first, then pruned
        start("stages.demo_image.samples=400", name="source", stop_at=step)
        assert (source / "checkpoints" / "demo_image" / "step_00000003").exists() == (step == 4)
        start(*words, stop_at=stop_at)
    assert trained(run)[-1][0] == 3 + 4


def test_records_of_a_start_that_died_early_are_not_kept(start: Start) -> None:
    first = start(name="first")
    run = start("checkpoint.every_steps=100", stop_at=3)
    shutil.rmtree(run / "checkpoints")
    start(
        "stage=demo_image",
        "stage.samples=8",
        "stage.buckets.0.batch_size=4",
        f"init_from={first}/checkpoints/demo_image",
    )
    assert [step for step, *_ in trained(run)] == [5, 6]


def test_a_chain_in_one_folder_is_remembered_and_may_be_rerun(start: Start) -> None:
    image = ["stage=demo_image", "stage.samples=8", "stage.buckets.0.batch_size=4"]
    run = start(*image)
    start("stage=demo_video", "stage.samples=8", f"stage.buckets={VIDEO}", f"init_from={run}/checkpoints/demo_image")
    start(*image)  # nothing is left of it to do
    assert len(trained(run)) == 4
    assert load_trained(run / "checkpoints" / "demo_image").config.stages.keys() == {"demo_image"}


def test_a_finished_stage_is_not_made_longer(start: Start) -> None:
    start()
    with pytest.raises(UserError, match=r"stages\.demo_video\.samples=32, but .* finished that stage after 16"):
        start("stages.demo_video.samples=32")


def test_a_damaged_checkpoint_is_neither_exported_nor_sampled(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = start()
    shutil.rmtree(run / "export")
    (shard,) = (run / "checkpoints" / "demo_image" / "step_00000004").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    start()
    assert not (run / "export" / "demo_image").exists() and (run / "export" / "demo_video").exists()
    assert f"demo_image is not exported: {shard.parent}: {shard.name} does not have" in capsys.readouterr().err
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load_trained(run / "checkpoints" / "demo_image")


def test_finished_stages_may_be_cleared_away(start: Start) -> None:
    run = start()
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints" / "demo_image")
    assert start() == run and (run / "metrics.jsonl").read_bytes() == before


def test_a_stage_does_not_go_on_from_another_past(start: Start) -> None:
    run = start()
    shutil.rmtree(run / "checkpoints" / "demo_image")
    with pytest.raises(UserError, match=r"demo_video is at step 8, further than step 0.*another name"):
        start("stage=demo_image", "stage.samples=8", "stage.buckets.0.batch_size=4")
    kept = run / "checkpoints" / "demo_video"
    kept.rename(run / "aside")
    start("stage=demo_image", "stage.samples=8", "stage.buckets.0.batch_size=4")
    (run / "aside").rename(kept)
    with pytest.raises(UserError, match=r"was not trained from .*demo_image.*remove .*demo_video"):
        start()


def test_a_checkpoint_of_another_stage_is_not_taken_for_ones_own(start: Start) -> None:
    source = start(name="source")
    other = start(stop_at=2)
    (there,) = (source / "checkpoints" / "demo_video").glob("step_00000008")
    shutil.copytree(there, other / "checkpoints" / "demo_image" / there.name)
    with pytest.raises(UserError, match=r"step_00000008 is a checkpoint of stage demo_video, not of demo_image"):
        start()


def test_another_rate_or_bucket_amid_a_stage_is_refused(start: Start) -> None:
    start(stop_at=6)
    with pytest.raises(UserError, match=r"stages\.demo_video\.fps=5, but .* is amid that stage at 8"):
        start("stages.demo_video.fps=5")
    more = "[{frames: 9, height: 32, width: 32, batch_size: 4}, {frames: 1, height: 32, width: 32, batch_size: 4}]"
    with pytest.raises(UserError, match=r"buckets are 9x32x32, 1x32x32, but .* is amid that stage with 9x32x32, which"):
        start(f"stages.demo_video.buckets={more}")


def test_another_init_from_under_the_same_name_is_refused(start: Start) -> None:
    first, second = start(name="first"), start("seed=1", name="second")
    words = ["stage=demo_video", "stage.samples=8", f"stage.buckets={VIDEO}"]
    start(*words, f"init_from={first}/checkpoints/demo_image")
    with pytest.raises(UserError, match=r"was not trained from .*second"):
        start(*words, f"init_from={second}/checkpoints/demo_image")
    shutil.rmtree(first)
    start(*words, f"init_from={first}/checkpoints/demo_image")  # gone, and no longer needed


def test_a_retrained_stage_is_exported_anew(start: Start) -> None:
    run = start()
    before = load_trained(run / "export" / "demo_image").weights
    shutil.rmtree(run / "checkpoints")
    start("stages.demo_image.lr=1e-5")
    after = load_trained(run / "export" / "demo_image")
    assert any(not weight.equal(after.weights[name]) for name, weight in before.items())
    origin = json.loads((run / "export" / "demo_image" / "export.json").read_text())
    assert origin["step"] == 4 and origin["samples"] == 16


def test_a_missing_export_is_made_by_the_next_start(start: Start) -> None:
    run = start()
    shutil.rmtree(run / "export")
    start()
    assert load_trained(run).config.stages.keys() == {"demo_video"}
    for part in ("model.safetensors", "config.yaml"):
        (run / "export" / "demo_video" / part).unlink()
        start()
        assert load_trained(run / "export" / "demo_video").config.stages.keys() == {"demo_video"}


def test_a_stage_made_shorter_than_its_checkpoint_is_finished(start: Start) -> None:
    run = start("stages.demo_video.samples=400", stop_at=8)
    start("stages.demo_video.samples=8")
    assert [r["at"] for r in lines(run, "validation")][-1] == "end" and (run / "export" / "demo_video").is_dir()


def test_what_would_change_the_data_or_the_validation_is_refused(start: Start) -> None:
    start()
    for word, part in (
        ("data.holdout_share=0.3", "holdout_share=0.05, not 0.3"),
        ("validation.sigmas=4", "sigmas=2, not 4"),
    ):
        with pytest.raises(UserError, match=part):
            start(word)
    start("data.prefetch=2", "validation.batch_size=2")


def test_a_broken_sample_is_masked_and_named_and_the_run_goes_on(start: Start, world: Any, tmp_path: Path) -> None:
    shards = damaged(world, tmp_path / "shards", lambda n, _: n % 8 == 0)
    run = start(f"data.path={shards}", "data.max_bad_share=0.5", "data.holdout_share=0.3")
    assert min(r["valid"] for r in lines(run, "train")) < 4
    named = [json.loads(line) for line in (run / "bad_samples-rank0.jsonl").read_text().splitlines()]
    assert {hole["reason"] for hole in named} == {"wrong checksum"}
    assert any(hole["step"] is None for hole in named) and any(hole["step"] is not None for hole in named)
    (tmp_path / "full" / "bad_samples-rank0.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"bad_samples-rank0\.jsonl cannot be written \(Is a directory\)"):
        start(f"data.path={shards}", "data.max_bad_share=0.5", "data.holdout_share=0.3", name="full")


def test_too_many_broken_samples_end_the_run_however_often_it_is_started(
    start: Start, world: Any, tmp_path: Path
) -> None:
    shards = damaged(world, tmp_path / "shards", lambda n, _: n % 3 == 0)
    words = [f"data.path={shards}", "data.holdout_share=0.3", "stages.demo_image.samples=120"]
    start(*words, stop_at=20)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"samples read are bad \(.*wrong checksum.*data\.max_bad_share=0\.05.*bad_samples"
        ):
            start(*words)


def test_a_batch_of_holes_alone_changes_nothing(start: Start, world: Any, tmp_path: Path) -> None:
    shards = damaged(world, tmp_path / "shards", lambda _, key: key.startswith("image"))
    words = [f"data.path={shards}", "data.max_bad_share=1", "validation.every_steps=0", "~stages.demo_video"]
    run = start(*words)
    assert {(r["valid"], r["loss"]) for r in lines(run, "train")} == {(0, None)}
    weights = [load_trained(path).weights for path in sorted((run / "checkpoints" / "demo_image").iterdir())]
    assert all(weight.equal(weights[1][name]) for name, weight in weights[0].items())


def test_a_held_out_set_of_holes_alone_is_an_error(start: Start, world: Any, tmp_path: Path) -> None:
    shards = damaged(world, tmp_path / "shards", lambda _, key: key.startswith("image"))
    with pytest.raises(UserError, match=r"every held-out sample of bucket 1x64x64 is broken"):
        start(f"data.path={shards}", "data.max_bad_share=1")


def test_a_run_folder_that_cannot_be_written_is_one_line(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* cannot hold a lease: Not a directory"):
        start(f"runs_dir={tmp_path}/file")


def test_a_dry_run_looks_at_init_from(start: Start) -> None:
    with pytest.raises(UserError, match="/nowhere"):
        compose_and_plan(start)


def compose_and_plan(start: Start) -> None:
    from lingen.loop import dry_run

    words = ["name=x", "data.path=x", "autoencoder.path=x", "init_from=/nowhere", "dry_run=true"]
    dry_run(compose(words))
