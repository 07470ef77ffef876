"""Launching and launching again, with pretended commands of Slurm; what is refused before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lingen import lease
from lingen.cluster import slurm, submit
from lingen.cluster.record import StageRecord, read_chain, write_stage
from lingen.cluster.submit import launch
from lingen.errors import UserError
from lingen.lease import Lease
from lingen.runfolder import architecture

RUN = Path("runs/a")


def finish(run: Path, stage: str, there: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A final checkpoint, as far as its manifest tells; that it is whole is the checkpoint's own test."""
    folder = run / "checkpoints" / stage / "step_00000008"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"final": true}')
    monkeypatch.setattr("lingen.cluster.checks.newest_folder", lambda f: folder if f.name == stage else None)
    monkeypatch.setattr(
        "lingen.cluster.checks.read_manifest", lambda _: SimpleNamespace(final=True, architecture=there)
    )


def submissions(fake: Any) -> list[str]:
    return [call for call in fake.calls if call.startswith("sbatch")]


def test_a_chain_is_submitted_stage_after_stage(fake: Any, words: Any) -> None:
    launch(words.plan("models=[lingen,dit]"))
    here = Path.cwd() / "runs/a"
    after = "--kill-on-invalid-dep=yes"
    assert submissions(fake) == [
        f"sbatch --parsable {here}/lingen/chain/demo_image.sbatch",
        f"sbatch --parsable --dependency=afterok:11 {after} {here}/lingen/chain/demo_video.sbatch",
        f"sbatch --parsable {here}/dit/chain/demo_image.sbatch",
        f"sbatch --parsable --dependency=afterok:13 {after} {here}/dit/chain/demo_video.sbatch",
    ]
    chain = read_chain(RUN / "dit")
    assert chain is not None and (chain.name, chain.model) == ("a/dit", "dit")
    assert [(stage.stage, stage.job) for stage in chain.stages] == [("demo_image", 13), ("demo_video", 14)]
    script = (RUN / "dit/chain/demo_video.sbatch").read_text()
    assert "model=dit" in script and "name=a/dit" in script and "until=demo_video" in script
    assert fake.text("tested").startswith("#!/bin/bash")


def test_what_is_in_the_queue_stays(fake: Any, words: Any, capsys: pytest.CaptureFixture[str]) -> None:
    launch(words.plan())
    fake.set("queue", "11|RUNNING|None|n[1-2]\n12|PENDING|Dependency|")
    launch(words.plan())
    assert len(submissions(fake)) == 2
    assert "nothing to submit" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"job 11 \(demo_image\) is in the queue with another script"):
        launch(words.plan("engine.grad_accumulation=2"))


def test_only_what_is_missing_is_submitted(fake: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(words.plan("until=demo_image"))
    fake.set("queue", "11|RUNNING|None|n1")
    launch(words.plan())
    assert "--dependency=afterok:11" in submissions(fake)[-1]
    finish(RUN, "demo_image", architecture(words.plan()[0][0].chain.config), monkeypatch)
    fake.set("queue", "11|COMPLETING|None|n1")  # it wrote its last checkpoint, and still holds the lease
    launch(words.plan())
    assert "--dependency=afterok:11" in submissions(fake)[-1]
    fake.set("queue", "")
    launch(words.plan())
    assert "--dependency" not in submissions(fake)[-1] and "demo_video" in submissions(fake)[-1]
    chain = read_chain(RUN)
    assert chain is not None and [stage.stage for stage in chain.stages] == ["demo_image", "demo_video"]


def test_a_job_that_waits_for_one_that_is_gone_is_replaced(fake: Any, words: Any) -> None:
    launch(words.plan())
    fake.set("queue", "12|PENDING|DependencyNeverSatisfied|")
    launch(words.plan())
    assert [call.split()[0] for call in fake.calls] == ["sbatch"] * 4 + ["scancel"] and fake.calls[-1] == "scancel 12"
    fake.set("queue", "14|RUNNING|None|n1")
    with pytest.raises(UserError, match=r"job 14 \(demo_video\) is RUNNING, and demo_image before it is neither"):
        launch(words.plan())


def test_a_stopped_stage_that_slurm_still_tidies_up_is_submitted_again(fake: Any, words: Any) -> None:
    launch(words.plan("until=demo_image"))
    fake.set("queue", "11|COMPLETING|None|n1")
    write_stage(RUN, StageRecord("demo_image", 11, state="stopped", reason="the disk was full"))
    launch(words.plan("until=demo_image"))
    assert len(submissions(fake)) == 2


def test_checkpoints_of_another_architecture(fake: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(RUN, "demo_image", {"model": {"name": "dit"}}, monkeypatch)
    for more in ([], ["until=demo_image"]):
        message = refused(words, *more)
        assert "checkpoints/demo_image/step_00000008 holds another architecture" in message
    assert not submissions(fake)


def test_two_launches_at_the_same_moment(fake: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = words.plan()
    with monkeypatch.context() as patched:  # the other one submits while this one still looks
        patched.setattr(submit, "refuse_scripts", lambda _: launch_with(planned, patched))
        with pytest.raises(UserError, match="a: somebody else launched or cancelled it just now"):
            launch(planned)
    assert len(submissions(fake)) == 2
    held = Lease.take(RUN / "chain")
    try:
        with pytest.raises(UserError, match=r"runs/a/chain is written by .* pid "):
            launch(words.plan("until=demo_image"))
    finally:
        held.release()
    assert len(submissions(fake)) == 2


def launch_with(planned: Any, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(submit, "refuse_scripts", lambda _: None)
    launch(planned)


def test_jobs_that_cannot_be_taken_back_are_named(fake: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.set("room", 11)
    monkeypatch.setattr(slurm, "cancel", refuse_to_cancel)
    message = refused(words)
    assert (
        "QOSMaxSubmitJobPerUserLimit; the jobs submitted before it are still there: no controller; scancel 11"
        in message
    )


def refuse_to_cancel(_: Any) -> None:
    raise UserError("no controller")


def test_nodes_that_are_down_are_waited_for(fake: Any, words: Any) -> None:
    fake.set("refusal", "allocation failure: Requested node configuration is not available")
    launch(words.plan())
    assert len(submissions(fake)) == 2


def test_all_or_nothing(fake: Any, words: Any) -> None:
    fake.set("room", 13)
    with pytest.raises(UserError, match="QOSMaxSubmitJobPerUserLimit; the 3 jobs submitted before it were cancelled"):
        launch(words.plan("models=[lingen,dit]"))
    assert fake.calls[-1] == "scancel 13 12 11"
    assert not (RUN / "lingen/chain/chain.json").exists()


def refused(words: Any, *more: str) -> str:
    with pytest.raises(UserError) as caught:
        launch(words.plan(*more))
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["cluster.partition=cpo"], ["cluster.partition=cpo does not exist", "did you mean 'cpu'"]),
        (["cluster.nodes=4"], ["stage demo_image asks for 4 nodes", "has 2 with 0 GPUs and 1 CPUs"]),
        (["cluster.cpus_per_task=8"], ["cluster.cpus_per_task=8", "at most 4"]),
        (
            ["cluster.partition=gpu", "cluster.tasks_per_node=null", "cluster.gpus_per_node=16", "cluster.nodes=1"],
            ["cluster.gpus_per_node=16", "partition gpu has at most 8"],
        ),
        (
            ["cluster.tasks_per_node=3"],
            ["stage demo_image on 2 nodes", "batch_size=16", "not a multiple of 6 ranks"],
        ),
        (
            ["cluster.mem=3M"],
            ["on each rank, and cluster.mem a process is 0.00315 GB", "cluster.stages.demo_image.words"],
        ),
        (
            ["model=dit", "size.head_dim=8", "cluster.stages.demo_image.words=[engine.sequence_parallel=4]"],
            ["engine.sequence_parallel=4 does not divide the 2 processes"],
        ),
        (["data.path=nowhere"], ["nowhere"]),
        (["autoencoder.path=nowhere"], ["nowhere"]),
        (["init_from=nowhere"], ["init_from=nowhere"]),
        (["engine.device=cuda"], ["engine.device=cuda", "cluster.gpus_per_node=0"]),
        (["models=[lingen,dti]"], ["models.1=dti"]),
        (["models=[dit,dit]"], ["names a model twice"]),
        (["models=[dit]", "model=dit"], ["model=dit and models=[dit]"]),
        (["cluster=slrm"], ["cluster=slrm does not exist"]),
        (["cluster=h100"], ["cluster.partition is not set"]),
        (["cluster.nods=2"], ["unknown key 'cluster.nods'", "did you mean 'nodes'"]),
        (["cluster.stages.demo_vidio.nodes=2"], ["cluster.stages.demo_vidio", "did you mean 'demo_video'"]),
        (["cluster.stages.demo_image.words=[seed=1]"], ["cluster.stages.demo_image.words=[seed=1]", "seed=0, not 1"]),
        (["cluster.stages.demo_image.words=[until=demo_video]"], ["until and engine.device are set by the launch"]),
        (["cluster.stages.demo_image.words=[engine.zero=1]"], ["stage demo_image: unknown key 'engine.zero'"]),
        (["cluster.time=soon"], ["cluster.time=soon", "12:00:00"]),
        (["cluster.time=0:0:0"], ["longer than nothing"]),
        (["cluster.time=5"], ["cluster.time=5 is not longer than cluster.signal_s=300"]),
        (["cluster.stages={demo_image: {time: 2:00:00}}"], ["must stand in quotes"]),
        (["cluster.partition=a b"], ["one word of plain characters"]),
        (["cluster.sbatch=[exclusive]"], ["'exclusive' is no option"]),
        (["cluster.env={WANDB_API_KEY: x}"], ["WANDB_API_KEY looks like a secret"]),
        (["cluster.env={'a b': x}"], ["cluster.env: 'a b' is no name"]),
        (['cluster.env={NCCL_DEBUG: "a\\nb"}'], ["cluster.env: NCCL_DEBUG must be one line"]),
        (["cluster.setup=['a\n\nb']"], ["one line"]),
        (["cluster.nodes"], ["'cluster.nodes' is not key=value"]),
        (["until=demo"], ["until=demo is none of the stages"]),
        (["name=a\nrm b"], ["runs/a\\nrm b' has a backslash or a line break"]),
        (["name=a\\b"], ["has a backslash or a line break"]),
    ],
)
def test_what_is_wrong_is_named_and_nothing_submitted(fake: Any, words: Any, more: list[str], parts: list[str]) -> None:
    message = refused(words, *more)
    for part in parts:
        assert part in message
    assert not submissions(fake) and not Path("runs").exists()


def test_a_machine_without_slurm(fake: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert refused(words).startswith("no Slurm on this machine: sbatch is not on PATH; use torchrun")


def test_what_slurm_itself_refuses(fake: Any, words: Any) -> None:
    fake.set("refusal", "sbatch: error: Invalid account")
    assert "a, stage demo_image: sbatch --test-only failed with code 1: sbatch: error: Invalid account" in refused(
        words
    )
    assert not submissions(fake)


def test_a_run_folder_that_is_none_or_another_experiment(fake: Any, words: Any) -> None:
    Path("runs").write_text("in the way")
    assert "runs is no folder that can" in refused(words)
    Path("runs").unlink()
    RUN.mkdir(parents=True)
    assert "cannot be written: File name too long" in refused(words, f"name={'a' * 300}")
    config = words.plan()[0][0].chain.config
    (RUN / "config.yaml").write_text(json.dumps(config.model_copy(update={"seed": 7}).model_dump(mode="json")))
    assert "runs/a holds a run with seed=7, not 0" in refused(words)


def test_a_start_from_another_architecture(fake: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("other/step_00000008").mkdir(parents=True)
    there = SimpleNamespace(architecture={"model": {"name": "dit"}})
    monkeypatch.setattr("lingen.cluster.checks.read_manifest", lambda _: there)
    message = refused(words, "init_from=other")
    assert "init_from=other: other/step_00000008 holds another architecture" in message and "model.name=dit" in message


def test_a_run_that_another_process_writes(fake: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    held = Lease.take(RUN)
    found = lease.read(RUN / "lease.json")
    held.release()
    assert found is not None
    found.path.write_bytes(found.raw)  # without the thread that renews it
    assert f"runs/a is written by {found}" in refused(words)
    os.utime(found.path, (0, 0))  # dead for long
    launch(words.plan("until=demo_image"))
    os.utime(found.path)
    fake.set("queue", "11|RUNNING|None|n1")  # it is the chain's own job 11 that writes
    launch(words.plan())
    assert len(submissions(fake)) == 2


def test_a_chain_s_record_that_is_none(fake: Any, words: Any) -> None:
    (RUN / "chain").mkdir(parents=True)
    whole = '{"name": "a", "model": "", "words": [], "cluster": {}, "folder": "", "stages": [{"stage": 1, "job": []}]}'
    whole = whole.replace("[]}", '[], "submitted": ""}')
    for text in ("{", "[]", "{}", '{"name": 1, "other": 2}', whole):
        (RUN / "chain/chain.json").write_text(text)
        assert "chain.json" in refused(words)
