"""Training as a user starts it: curricula, transfers, resumption, signals, two processes, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ["demo_image", "demo_video"]
# Two stages of a few steps each: images, then clips with images mixed in.
CURRICULUM = [
    "~stages.demo_video_128",
    "stages.demo_image.samples=24",
    "stages.demo_image.lr=1e-3",
    "stages.demo_image.buckets.0.batch_size=4",
    "stages.demo_image.warmup_samples=8",
    "stages.demo_video.samples=24",
    "stages.demo_video.buckets.0.batch_size=4",
    "stages.demo_video.buckets.1.batch_size=4",
    "checkpoint.every_steps=2",
    "validation.every_steps=3",
]


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind is None or line["kind"] == kind]


def losses(run: Path) -> list[tuple[int, str, float, float]]:
    return [(r["step"], r["stage"], r["loss"], r["grad_norm"]) for r in records(run, "train")]


def words_for(world: Any, runs: Path, name: str, *more: str) -> list[str]:
    return ["train.py", f"name={name}", f"runs_dir={runs}", *world.words, *CURRICULUM, *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(runs: Path, world: Any, python: Any) -> Callable[[str], Path]:
    """A model's run that nothing happened to, trained when it is first asked for."""

    def train(model: str) -> Path:
        run = runs / "undisturbed" / model
        if not run.exists():
            done = python(*words_for(world, runs, f"undisturbed/{model}", f"model={model}"))
            assert done.returncode == 0, done.stderr
        return run

    return train


@pytest.fixture(params=["lingen", "dit"])
def undisturbed(request: pytest.FixtureRequest, finished: Callable[[str], Path]) -> Path:
    """Each model's."""
    return finished(str(request.param))


@pytest.fixture
def lingen_run(finished: Callable[[str], Path]) -> Path:
    """LinGen's."""
    return finished("lingen")


def test_a_curriculum_leaves_what_others_rely_on(undisturbed: Path) -> None:
    trained = records(undisturbed, "train")
    assert [r["step"] for r in trained] == list(range(1, 13))
    assert [r["samples"] for r in trained] == [4 * n for n in range(1, 13)]
    assert [r["stage"] for r in trained] == ["demo_image"] * 6 + ["demo_video"] * 6
    for key in ("tokens", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s", "flops", "hours", "data_wait_s"):
        assert all(isinstance(r[key], (int, float)) for r in trained)
    assert trained[5]["tokens"] == 24 * 16 and trained[-1]["tokens"] > trained[5]["tokens"]
    assert trained[0]["lr"] < trained[2]["lr"] == pytest.approx(1e-3)
    at = [(r["stage"], r["at"], r["step"]) for r in records(undisturbed, "validation")]
    assert at == [
        (s, w, 6 * i + n) for i, s in enumerate(STAGES) for w, n in (("start", 0), ("interval", 3), ("end", 6))
    ]
    validation = records(undisturbed, "validation")[-1]
    assert set(validation["bucket_loss"]) == {"17x64x64", "1x64x64"} and len(validation["bin_loss"]) == 2
    first, second = records(undisturbed, "transfer")
    assert first["from"] is None and second["from"] == "demo_image" and Path(second["checkpoint"]).is_dir()


def test_losses_are_those_of_yesterday(undisturbed: Path) -> None:
    """Golden losses and gradient norms of every step: what changes them should be meant. Half a percent leaves room for
    another processor's rounding; tests/golden/losses.json is rewritten from metrics.jsonl when a change is meant."""
    golden = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())[undisturbed.name]
    found = [[loss, norm] for _, _, loss, norm in losses(undisturbed)]
    assert len(found) == len(golden)
    for step, (here, there) in enumerate(zip(found, golden, strict=True), 1):
        assert here == pytest.approx(there, rel=5e-3), f"step {step}"


def test_the_model_learns(undisturbed: Path) -> None:
    validation = [r["loss"] for r in records(undisturbed, "validation") if r["stage"] == "demo_image"]
    assert validation[-1] < validation[0]


def test_lineage_and_export(undisturbed: Path) -> None:
    (final,) = (undisturbed / "checkpoints" / "demo_video").glob("step_00000012")
    lineage = json.loads((final / "state.json").read_text())["lineage"]
    assert [entry["stage"] for entry in lineage] == STAGES
    assert lineage[1]["from_stage"] == "demo_image" and lineage[1]["samples"] == 24 and lineage[1]["tokens"] == 24 * 16
    for stage in STAGES:
        export = undisturbed / "export" / stage
        config = yaml.safe_load((export / "config.yaml").read_text())
        assert config["model"]["name"] == undisturbed.name and list(config["stages"]) == [stage]
        assert load_file(export / "model.safetensors")


def test_only_what_the_policy_keeps_is_kept(undisturbed: Path) -> None:
    kept = sorted(p.name for p in (undisturbed / "checkpoints" / "demo_image").iterdir())
    assert kept == ["step_00000004", "step_00000006"]


def test_a_finished_run_has_nothing_to_do(undisturbed: Path, runs: Path, world: Any, python: Any) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    done = python(*words_for(world, runs, f"undisturbed/{undisturbed.name}", f"model={undisturbed.name}"))
    assert done.returncode == 0 and "finished" in done.stdout
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_curriculum_is_its_stages_one_by_one(lingen_run: Path, runs: Path, world: Any, python: Any) -> None:
    stage_words = [
        w.replace("stages.demo_video.", "stage.") for w in CURRICULUM if "demo_image" not in w and w[0] != "~"
    ]
    done = python(
        "train.py", "name=alone", f"runs_dir={runs}", *world.words, "stage=demo_video", *stage_words,
        f"init_from={lingen_run / 'checkpoints' / 'demo_image'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(runs / "alone") == losses(lingen_run)[6:]


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if process.poll() is not None:
            return
        path = run / "metrics.jsonl"
        if path.exists() and any(r["step"] >= step for r in map(json.loads, path.read_text().splitlines(True)[:-1])):
            return
        time.sleep(0.05)
    raise AssertionError(f"{run} never came to step {step}")


def test_killed_at_any_moment_it_goes_on_bit_for_bit(lingen_run: Path, runs: Path, world: Any) -> None:
    words, run = words_for(world, runs, "killed"), runs / "killed"
    for step, delay in ((1, 0.0), (3, 0.02), (7, 0.0), (10, 0.1)):
        process = start(words)
        wait_for_step(run, step, process)
        time.sleep(delay)
        process.kill()
        process.communicate()
    process = start(words)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert losses(run) == losses(lingen_run)
    for stage in STAGES:
        ours, theirs = (load_file(r / "export" / stage / "model.safetensors") for r in (run, lingen_run))
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [r["at"] for r in records(run, "validation")] == ["start", "interval", "end"] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_after_the_step_and_exits_with_its_code(
    number: signal.Signals, lingen_run: Path, runs: Path, world: Any
) -> None:
    words, run = (
        words_for(world, runs, f"signal{int(number)}", "checkpoint.every_steps=100"),
        runs / f"signal{int(number)}",
    )
    process = start(words)
    wait_for_step(run, 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    last = records(run, "train")[-1]["step"]
    assert any((run / "checkpoints").glob(f"*/step_{last:08d}/manifest.json"))
    process = start(words)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert losses(run) == losses(lingen_run)


def torchrun(words: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start([*launcher, *words])
    output, _ = process.communicate(timeout=250)
    return subprocess.CompletedProcess(words, process.returncode, output, "")


@pytest.mark.parametrize(
    "engine", [["engine=cpu"], ["engine=zero1", "engine.dtype=fp32"], ["engine=zero3", "engine.dtype=fp32"]]
)
def test_two_processes_equal_one(engine: list[str], runs: Path, world: Any, python: Any) -> None:
    name = engine[0].removeprefix("engine=")
    more = [*engine, "stages.demo_image.samples=40", "stages.demo_video.samples=40"]
    together = torchrun(words_for(world, runs, f"two/{name}", *more))
    assert together.returncode == 0, together.stdout
    alone = python(*words_for(world, runs, f"one/{name}", *more))
    assert alone.returncode == 0, alone.stderr
    ours, theirs = losses(runs / "two" / name), losses(runs / "one" / name)
    assert len(ours) == len(theirs) == 20
    for (step, _, loss, norm), (step_, _, loss_, norm_) in zip(ours, theirs, strict=True):
        assert step == step_ and loss == pytest.approx(loss_, rel=1e-5) and norm == pytest.approx(norm_, rel=1e-4)


def test_accumulation_and_checkpointing_change_nothing(lingen_run: Path, runs: Path, world: Any, python: Any) -> None:
    words = words_for(world, runs, "accumulated", "engine.grad_accumulation=2", "engine.activation_checkpointing=true")
    done = python(*words)
    assert done.returncode == 0, done.stderr
    for (_, _, loss, _), (_, _, loss_, _) in zip(losses(runs / "accumulated"), losses(lingen_run), strict=True):
        assert loss == pytest.approx(loss_, rel=1e-5)


def test_bf16_trains(lingen_run: Path, runs: Path, world: Any, python: Any) -> None:
    done = python(*words_for(world, runs, "bf16", "engine=zero2"))
    assert done.returncode == 0, done.stderr
    for (_, _, loss, _), (_, _, loss_, _) in zip(losses(runs / "bf16"), losses(lingen_run), strict=True):
        assert loss == pytest.approx(loss_, rel=0.03)


def test_the_plan_is_printed_and_nothing_is_written(runs: Path, world: Any, python: Any) -> None:
    done = python(*words_for(world, runs, "planned", "dry_run=true", "stages.demo_video.fps=1"))
    assert done.returncode == 0, done.stderr
    for part in ("demo_image", "1x64x64", "17x64x64", "parameters", "empty bucket: stages.demo_video 17x64x64"):
        assert part in done.stdout
    assert not (runs / "planned").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["stages.demo_video.fps=1"], ["stages.demo_video", "17x64x64", "is empty", "longer clips"]),
        (["data.path=/nowhere"], ["data.path=/nowhere"]),
        (["autoencoder.path=/nowhere.safetensors"], ["autoencoder.path=/nowhere.safetensors", "fit_autoencoder"]),
        (["text.encoders.minilm.path=/nowhere"], ["text.encoders.minilm.path=/nowhere"]),
        (["init_from=/nowhere"], ["init_from=/nowhere", "manifest.json"]),
        (["init_from={dit}"], ["init_from=", "another architecture", "model.name=dit there, lingen here"]),
        (["stages.demo_image.buckets.0.frames=8"], ["frames=8", "1 or 9"]),
        (["stage=demo_vid"], ["did you mean 'demo_video'"]),
        (["optim.lr=1"], ["optim.lr"]),
        (["engine.device=cuda"], ["engine.device=cuda"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], parts: list[str], finished: Callable[[str], Path], runs: Path, world: Any, python: Any
) -> None:
    final = finished("dit") / "checkpoints" / "demo_image"
    done = python(*words_for(world, runs, "bad", *(w.format(dit=final) for w in words)))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr
    assert not (runs / "bad").exists()


def test_another_experiment_under_the_same_name_is_refused(
    lingen_run: Path, runs: Path, world: Any, python: Any
) -> None:
    done = python(*words_for(world, runs, "undisturbed/lingen", "seed=1"))
    assert done.returncode == 2 and "seed=0, not 1" in done.stderr and "another name" in done.stderr
