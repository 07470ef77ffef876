"""The job's script: run for real with a pretended srun and scontrol, and what cannot be written into one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from lingen.cluster.record import chain_folder, read_stage
from lingen.cluster.script import render
from lingen.errors import UserError
from tests.cluster.common import wait


def job_of(words: Any, *more: str) -> Any:
    return words.plan(*more)[0][0]


JOB = {"SLURM_JOB_ID": "20005", "SLURM_JOB_NODELIST": "node[7-8]"}


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the batch shell would do."""
    return subprocess.run(
        ["bash"], input=script, env=os.environ | JOB | environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("code", "state", "reason", "ends_with", "requeued", "recorded"),
    [
        (0, "RUNNING Reason=None", "", 0, False, "finished"),
        (75, "RUNNING Reason=None", "", 0, True, "requeued"),
        (137, "RUNNING Reason=None", "", 0, True, "requeued"),
        (137, "RUNNING Reason=None", "the disk is full", 1, False, "stopped"),
        (2, "RUNNING Reason=None", "", 1, False, "stopped"),
        (75, "COMPLETING Reason=None", "", 1, False, "cancelled"),
        (75, "COMPLETING Reason=TimeLimit", "", 0, True, "requeued"),
    ],
)
def test_the_script_does_what_is_decided(
    fake: Any, words: Any, code: int, state: str, reason: str, ends_with: int, requeued: bool, recorded: str
) -> None:
    job = job_of(words)
    fake.set("code", code)
    fake.set("state", state)
    if reason:
        fake.set("reason", reason)
    done = run(job.script)
    assert done.returncode == ends_with, done.stderr
    assert ("scontrol requeue 20005" in fake.calls) == requeued
    record = read_stage(job.chain.run, "demo_image", 20005)
    assert record is not None and (record.state, record.code, record.nodes) == (recorded, code, "node[7-8]")
    assert (record.reason or "") == (reason or ("" if code != 2 else record.reason))


@pytest.mark.parametrize(
    ("state", "code", "ends_with", "recorded"),
    [
        ("COMPLETING Reason=TimeLimit", None, 0, ("requeued", 137)),  # the ranks hang
        ("COMPLETING Reason=TimeLimit", 75, 0, ("requeued", 75)),  # they save in time
        ("RUNNING Reason=None", 75, 0, ("requeued", 75)),  # preempted
        ("RUNNING Reason=None", 0, 0, ("finished", 0)),
        ("COMPLETING Reason=None", 143, 1, ("cancelled", 143)),
    ],
)
def test_a_job_that_is_told_to_end(
    fake: Any, words: Any, state: str, code: int | None, ends_with: int, recorded: tuple[str, int]
) -> None:
    """By SIGTERM, again and again; SIGUSR1 is the ranks' alone."""
    job = job_of(words)
    fake.set("state", state)
    fake.set("code", code or 0)
    fake.set("hold", "")  # srun, until this is gone: with the next pause, or below
    if code is None:
        fake.set("hung", "")
    with Popen(["bash", "-c", job.script], env=os.environ | JOB, stderr=PIPE, text=True) as shell:
        wait(lambda: fake.text("srun"), "srun")
        time.sleep(0.1)  # and the trap
        shell.send_signal(signal.SIGUSR1)
        shell.send_signal(signal.SIGTERM)
        wait(lambda: "scontrol show job --oneliner 20005" in fake.calls, "a look at the reason")
        shell.send_signal(signal.SIGTERM)
        if "TimeLimit" not in state:
            (fake.folder / "hold").unlink()
        assert shell.wait(20) == ends_with
        (fake.folder / "hold").unlink(missing_ok=True)
    assert ("scontrol requeue 20005" in fake.calls) == (recorded[0] == "requeued")
    record = read_stage(job.chain.run, "demo_image", 20005)
    assert record is not None and (record.state, record.code) == recorded
    assert record.failures == (code is None)


def test_at_the_limit_no_step_begins_any_more(fake: Any, words: Any) -> None:
    """Also not the one that would ask settle in a container."""
    script = job_of(words).script.replace("settle end", "(exit 1) # settle end")
    for state, requeued in (("RUNNING Reason=None", False), ("COMPLETING Reason=TimeLimit", True)):
        fake.set("state", state)
        assert run(script).returncode == (0 if requeued else 1)
        assert ("scontrol requeue 20005" in fake.calls) == requeued


def test_a_controller_that_is_away_is_waited_for(fake: Any, words: Any) -> None:
    fake.set("code", 75)
    fake.set("away", "")
    fake.set("refusals", 30)
    assert run(job_of(words).script).returncode == 0
    assert fake.calls.count("scontrol requeue 20005") == 31
    assert fake.text("pauses").split() == ["1"] + ["2"] * 29  # a third of KillWait at most


def test_a_controller_that_refuses_is_believed(fake: Any, words: Any) -> None:
    fake.set("code", 75)
    fake.set("refusals", 99)
    done = run(job_of(words).script)
    assert (done.returncode, fake.calls.count("scontrol requeue 20005")) == (1, 10)
    assert "could not be queued again" in done.stderr


def test_a_port_that_is_taken_is_not_tried_again(fake: Any, words: Any) -> None:
    ports = set()
    for restarts in range(4):
        assert run(job_of(words).script, SLURM_RESTART_COUNT=str(restarts)).returncode == 0
        ports |= {line for line in fake.text("environment").splitlines() if line.startswith("MASTER_PORT=2")}
    assert len(ports) == 4


def test_srun_gets_the_words_and_the_place_of_the_meeting(fake: Any, words: Any) -> None:
    job = job_of(words, "seed=3", 'sampler.negative_prompt=it\'s $(touch broken) "`x`" ;&|', "cluster.cpus_per_task=2")
    assert run(job.script).returncode == 0
    given = fake.text("srun").splitlines()
    assert {"--kill-on-bad-exit=1", "--nodes=2", "--ntasks=2", "--cpus-per-task=2"} <= set(given)
    assert given[given.index("name=a") - 1].endswith("train.py")
    wanted = [
        "seed=3",
        'sampler.negative_prompt=it\'s $(touch broken) "`x`" ;&|',
        "until=demo_image",
        "engine.device=cpu",
    ]
    assert given[-4:] == wanted
    environment = fake.text("environment").splitlines()
    assert {"MASTER_ADDR=node7", "MASTER_PORT=20005", "OMP_NUM_THREADS=2"} <= set(environment)
    assert f"LINGEN_REASON={chain_folder(job.chain.run)}/demo_image.reason" in environment
    assert not Path("broken").exists()


def test_the_environment_modules_and_setup_come_before(fake: Any, words: Any) -> None:
    job = job_of(
        words,
        "cluster.env={MASTER_ADDR: 127.0.0.1, NCCL_DEBUG: it's}",
        "cluster.modules=[cuda/12.4]",
    )
    assert run(job.script).returncode != 0 and not fake.text("srun")  # no `module` here when it is loaded
    job = job_of(words, "cluster.env={MASTER_ADDR: 127.0.0.1, NCCL_DEBUG: it's}", 'cluster.setup=["echo set up >&2"]')
    done = run(job.script)
    assert "set up" in done.stderr
    assert {"MASTER_ADDR=127.0.0.1", "NCCL_DEBUG=it's"} <= set(fake.text("environment").splitlines())
    assert "scontrol show hostnames node[7-8]" not in fake.calls


@pytest.mark.parametrize("word", ["cluster.env.A=010", "cluster.env={A: 010}"])
def test_the_environment_is_text(fake: Any, words: Any, word: str) -> None:
    assert "export A=010\n" in job_of(words, word).script


def test_what_slurm_is_asked_for(fake: Any, words: Any) -> None:
    script = job_of(
        words,
        "name=a b/%j",
        "cluster.account=phys",
        "cluster.partition=gpu",
        "cluster.qos=high",
        "cluster.constraint=[ib|opa]",
        "cluster.reservation=mine",
        "cluster.mem=64G",
        "cluster.signal_s=120",
        "cluster.sbatch=[--exclusive]",
        "cluster.stages={demo_image: {nodes: 1, time: '2:00:00'}}",
    ).script
    asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    log = str(Path.cwd() / "runs/a b/%%j/chain/demo_image.log")
    for option in (
        "--job-name=a-b--j-demo_image",
        "--account=phys",
        "--partition=gpu",
        "--qos=high",
        "--constraint=[ib|opa]",
        "--reservation=mine",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--mem=64G",
        "--time=2:00:00",
        "--signal=USR1@120",
        "--requeue",
        "--open-mode=append",
        f"--output='{log}'",
        "--exclusive",
    ):
        assert option in asked, option
    assert not any("gpus" in option for option in asked)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pyxis", ["--container-image=/images/a b.sqsh", "--container-workdir={cwd}"]),
        ("apptainer", ["apptainer", "exec", "--pwd={cwd}", "/images/a b.sqsh"]),
    ],
)
def test_processes_and_the_decision_run_in_the_container(fake: Any, words: Any, kind: str, expected: list[str]) -> None:
    apptainer = fake.folder.parent / "commands" / "apptainer"
    apptainer.write_text(f'#!/bin/sh\nwhile [ "$1" != python ]; do shift; done\nshift\n{sys.executable} "$@"\n')
    apptainer.chmod(0o755)
    image = f"{{kind: {kind}, image: /images/a b.sqsh, mounts: ['/data:/data']}}"
    script = job_of(words, f"cluster.container={image}").script
    run(script)
    given = fake.text("srun").splitlines()
    cwd = Path.cwd()
    assert {word.format(cwd=cwd) for word in expected} <= set(given)
    mounts = next(word for word in given if "/data:/data" in word)
    assert f"{cwd}:{cwd}" in mounts and f"{cwd}/runs:{cwd}/runs" in mounts
    assert "python" in given and "--nv" not in given
    assert ("    srun --nodes=1 --ntasks=1 " in script) == (kind == "pyxis")


def test_a_template_that_wants_what_there_is_not(fake: Any, words: Any, tmp_path: Path) -> None:
    job = job_of(words)
    for text, part in (
        ("{{ cluster.acount }}", "acount"),
        ("{% if %}", "Expected an expression"),
        (None, "No such file"),
    ):
        template = tmp_path / "own.sbatch"
        template.unlink(missing_ok=True)
        if text is not None:
            template.write_text(text)
        with pytest.raises(UserError, match=r"own\.sbatch") as refused:
            render(job.chain, job.job, template)
        assert part in str(refused.value)
