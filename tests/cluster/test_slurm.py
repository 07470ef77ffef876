"""Chains of three stages under a real Slurm of two nodes, disturbed in all ways that a cluster has.

After each the final weights, moments, averages and records are those of chains that nothing happened to, bit for bit.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import common
from tests.cluster.chain import CLUSTER, Chain, command, kill, preempt
from tests.cluster.slurm import Slurm, environ
from tests.conftest import run_python

IMAGE, VIDEO, LONG = common.STAGES
DONE = dict.fromkeys(common.STAGES, "COMPLETED")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm-runs")


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, runs: Path, world: Any) -> Path:
    """Both models through three stages, by one launch."""
    done = command(slurm, "slurm/launch.py", *common.words(world, runs, "undisturbed", "models=[lingen,dit]"), *CLUSTER)
    assert done.returncode == 0, done.stderr
    for model in ("lingen", "dit"):
        chain = Chain(slurm, [], runs / "undisturbed" / model)
        assert chain.ended() == DONE, chain.logs()
    return runs / "undisturbed"


@pytest.fixture
def chain_of(slurm: Slurm, runs: Path, world: Any) -> Callable[..., Chain]:
    """Launch a chain of a model, with further words."""

    def launch(name: str, *words: str, where: Path = runs) -> Chain:
        chain = Chain(slurm, common.words(world, where, name, *words), where / name)
        chain.launch()
        return chain

    return launch


KILLED = """
import os, sys
from pathlib import Path
from tests.cluster.slurm import Slurm

cluster = Slurm(Path(sys.argv[1]))
cluster.call("sbatch", "--nodes=2", "--ntasks=2", "--output=/dev/null", "--wrap=srun sleep 1000")
while ".0" not in cluster.call("squeue", "--steps", "--noheader", "--format=%i"):
    pass
os.kill(os.getpid(), 9)
"""


def test_nothing_is_left_of_a_cluster_whose_tests_were_killed(slurm: Slurm, tmp_path: Path) -> None:
    """One beside the other cluster: each has ports of its own."""
    done = run_python("-c", KILLED, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr

    def left() -> list[int]:
        everyone = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in everyone if any(str(tmp_path) in word for word in environ(pid))]

    common.wait(lambda: not left(), "the end of all")


def test_both_models_come_through_their_stages(undisturbed: Path) -> None:
    for model in ("lingen", "dit"):
        kinds = [record["kind"] for record in common.records(undisturbed / model)]
        assert kinds.count("train") == 3 * common.STEPS and kinds.count("transfer") == 3
        steps = [record["step"] for record in common.records(undisturbed / model) if record["kind"] == "train"]
        assert steps == list(range(1, 3 * common.STEPS + 1))


def test_kills_requeues_limits_and_preemptions_change_nothing(
    undisturbed: Path, slurm: Slurm, chain_of: Callable[..., Chain]
) -> None:
    """A rank killed, at a random step and amid a save; a job queued again by hand, come to its time limit, preempted
    twice in a stage. Every stage is disturbed twice."""
    chain, chance = chain_of("disturbed", "model=lingen"), random.Random(0)

    kill(chain.at_step(IMAGE, chance.randint(1, 20))[chance.randrange(2)])
    chain.restarted(IMAGE, 1)
    kill(chain.at_save(IMAGE)[chance.randrange(2)])
    chain.restarted(IMAGE, 2)

    chain.wait(VIDEO, "its start", lambda: chain.state(VIDEO) == "RUNNING")
    limit_in(slurm, chain.jobs[VIDEO], minutes=1)  # less cluster.signal_s, and Slurm may warn a minute early
    with common.frozen((ranks := chain.at_step(VIDEO, chance.randint(1, 10))).values()):
        chain.wait(VIDEO, "the warning", lambda: all(is_told(pid, signal.SIGUSR1) for pid in ranks.values()))
    chain.wait(VIDEO, "the end of the attempt", lambda: chain.restarts(VIDEO) >= 1)
    limit_in(slurm, chain.jobs[VIDEO], minutes=60)
    chain.restarted(VIDEO, 1)
    with common.frozen(chain.at_step(VIDEO, chance.randint(15, 30)).values()):
        slurm.call("scontrol", "requeue", str(chain.jobs[VIDEO]))
    chain.restarted(VIDEO, 2)

    for restarts, step in enumerate((5, 20), 1):
        with common.frozen(chain.at_step(LONG, step).values()):
            preempt(slurm)
            chain.wait(LONG, "its preemption", lambda: chain.state(LONG) != "RUNNING")
        chain.restarted(LONG, restarts)

    assert chain.ended() == DONE, chain.logs()
    assert not common.differences(chain.run, undisturbed / "lingen")
    assert all(row["requeues"] >= 2 for row in chain.status())


def test_lost_shards_disks_nodes_and_ranks_change_nothing(
    undisturbed: Path, slurm: Slurm, chain_of: Callable[..., Chain], world: Any, small_disk: Path, tmp_path: Path
) -> None:
    """A shard that disappears and a full disk stop the chain with the reason; launched again when that is mended, it
    goes on. Of a lost node and a hung rank it recovers by itself; while the rank hangs, a second writer is refused."""
    shards = Path(shutil.copytree(world.shards, tmp_path / "shards"))
    chain = chain_of("lost", "model=dit", f"data.path={shards}", "watchdog.step_s=8", where=small_disk)

    (*_, victim) = sorted(shards.glob("*.tar"))  # of images
    with common.frozen(chain.at_step(IMAGE, 6).values()):
        victim.rename(tmp_path / "gone")
    assert victim.name in stopped(chain, IMAGE)
    (tmp_path / "gone").rename(victim)
    chain.launch()

    with common.frozen(chain.at_step(VIDEO, 6).values()):
        fill(small_disk / "ballast", leave=2**17)  # less than a checkpoint
    assert "No space left on device" in stopped(chain, VIDEO)
    whole = command(slurm, "scripts/verify_checkpoint.py", max(chain.run.glob(f"checkpoints/{VIDEO}/step_*")))
    assert whole.returncode == 0, whole.stderr
    (small_disk / "ballast").unlink()
    assert f"{IMAGE} is finished" in chain.launch()

    chain.at_step(LONG, 4)
    slurm.power_off("n2")
    chain.wait(LONG, "the loss of a node", lambda: chain.restarts(LONG) >= 1)
    slurm.power_on("n2")
    chain.restarted(LONG, 1)
    ranks, before = chain.at_step(LONG, 20), chain.restarts(LONG)
    with common.frozen([ranks[1]]):
        with common.frozen([ranks[0]]):
            second = command(slurm, "train.py", *chain.words)
        assert second.returncode == 2 and f"Slurm job {chain.jobs[LONG]}" in second.stderr, second.stderr
        chain.restarted(LONG, before + 1)
    assert any("run_steps" in stacks.read_text() for stacks in chain.run.glob("hang-*-rank00000-*")), chain.logs()

    assert chain.ended() == DONE, chain.logs()
    assert not common.differences(chain.run, undisturbed / "dit")


def stopped(chain: Chain, stage: str) -> str:
    """The reason that a chain stopped for at ``stage``; what comes after was cancelled."""
    states = chain.ended()
    number = common.STAGES.index(stage)
    assert states[stage] == "FAILED", chain.logs()
    assert all(states[later] == "CANCELLED" for later in common.STAGES[number + 1 :])
    rows = chain.status()
    assert [row["state"] for row in rows] == ["finished"] * number + ["stopped"] + ["cancelled"] * (2 - number)
    return str(rows[number]["reason"])


@pytest.fixture
def small_disk(slurm: Slurm, tmp_path: Path) -> Iterator[Path]:
    """A file system of few megabytes of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    slurm.mount(folder, "12m")
    yield folder
    slurm.unmount(folder)


def limit_in(slurm: Slurm, job: int, minutes: int) -> None:
    """Change a job's time limit."""
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


def is_told(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that stands still; or came before it did, and ended it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in lines if "Pnd:" in line)


def fill(path: Path, leave: int) -> None:
    """Take all the space that there is, but for ``leave`` bytes."""
    with path.open("wb", buffering=0) as ballast:
        with suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        ballast.truncate(path.stat().st_size - leave)
