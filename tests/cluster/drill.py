"""The long chaos: ``python -m tests.cluster.drill kills=40 seed=0``, or ``make drill KILLS=40 SEED=0``.

Chains of both models are disturbed at random, under a Slurm of this machine's own where one can be started and as plain
processes otherwise, until ``kills`` disturbances have met their mark. Every chain is then left to finish and compared
with an undisturbed one. Exits with 1 where a checkpoint was not whole, a chain did not go on, or an end differs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pydantic import PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lingen.compose import parse
from lingen.errors import run_main
from lingen.manifest import MANIFEST, problem_with
from lingen.model_config import Section
from tests.cluster import common
from tests.cluster.chain import Chain, kill, preempt
from tests.cluster.plain import Ranks, moment, victims
from tests.cluster.slurm import Slurm, why_not
from tests.conftest import World, make_world

MODELS = ("lingen", "dit")
WATCHDOG_S = 10
# A chain gives up after some attempts without progress; chaos goes on.
PATIENT = [f"watchdog.step_s={WATCHDOG_S}", "cluster.max_failures=1000", "cluster.max_preemptions=1000"]

# Kinds of disturbances, and how often each is chosen.
TO_PROCESSES = {"rank killed": 4, "rank killed amid a save": 4, "killed while starting": 2, "told to stop": 2}
TO_JOBS = {
    "rank killed": 4,
    "rank killed amid a save": 4,
    "job killed": 2,
    "killed while starting": 3,
    "queued again": 3,
    "told of its limit": 3,
    "preempted": 3,
    "node lost": 1,
    "rank hung": 1,
}


class Args(Section):
    """The words of the command."""

    kills: PositiveInt = 40
    seed: int = 0
    plain: bool = False  # no Slurm, though there is one


class Field(Protocol):
    """Where trainings run and are disturbed."""

    kinds: dict[str, int]

    def begin(self, name: str, model: str) -> Path:
        """Start a training in a folder of this name, or make ready to."""

    def strike(self, kind: str, chance: random.Random) -> bool:
        """Disturb it once, and let it go on. False where it ended, wholly or a stage of it, before it was met."""

    def finish(self) -> None:
        """Let it come to its end undisturbed.

        Raises:
            AssertionError: it does not.
        """

    def close(self) -> None:
        """Leave nothing running."""


class Processes:
    """Two ranks as plain processes, started again by hand."""

    def __init__(self, world: World, runs: Path) -> None:
        self.kinds, self.world, self.runs = TO_PROCESSES, world, runs

    def begin(self, name: str, model: str) -> Path:
        self.words, self.run = common.words(self.world, self.runs, name, f"model={model}"), self.runs / name
        return self.run

    def strike(self, kind: str, chance: random.Random) -> bool:
        with Ranks(self.words) as ranks:
            if kind == "killed while starting":
                time.sleep(chance.uniform(0, 6))
                alive = not ranks.ended()
            else:
                alive = moment(ranks, self.run, chance, saving=kind.endswith("save"))
            if kind == "told to stop":
                for process in ranks.processes:
                    process.send_signal(signal.SIGTERM)
            elif kind == "killed while starting":
                ranks.kill(0, 1)  # a rank waits half an hour for one that never came; Slurm would end it
            else:
                ranks.kill(*victims(chance))
            codes, output = ranks.wait()
        assert not alive or set(codes) <= {75, -signal.SIGTERM} or kind != "told to stop", output
        return alive and codes != [0, 0]

    def finish(self) -> None:
        with Ranks(self.words) as ranks:
            codes, output = ranks.wait()
        assert codes == [0, 0], output

    def close(self) -> None:
        pass


class UnderSlurm:
    """A chain of jobs, which Slurm starts again by itself."""

    def __init__(self, world: World, runs: Path, folder: Path) -> None:
        self.kinds, self.world, self.runs, self.slurm = TO_JOBS, world, runs, Slurm(folder)

    def begin(self, name: str, model: str) -> Path:
        run = self.runs / name
        self.chain = Chain(self.slurm, common.words(self.world, self.runs, name, f"model={model}", *PATIENT), run)
        self.chain.launch()
        return run

    def strike(self, kind: str, chance: random.Random) -> bool:
        chain = self.chain
        left = [stage for stage in common.STAGES if chain.state(stage) != "COMPLETED"]
        if not left:
            return False
        stage, before = left[0], chain.restarts(left[0])
        if not self._ripe(stage, kind, chance):
            return False
        ranks, job = chain.ranks(stage), str(chain.jobs[stage])
        if set(ranks) != {0, 1}:
            return False
        with common.frozen(ranks.values()):  # so that it meets the moment that was chosen
            self._do(kind, job, ranks, chance)
            if kind in ("node lost", "preempted", "rank hung"):
                if kind == "rank hung":
                    os.kill(ranks[0], signal.SIGCONT)
                chain.comes(stage, "its end", lambda: chain.restarts(stage) > before or chain.state(stage) != "RUNNING")
                if kind == "node lost":
                    self.slurm.power_on("n2")
        return chain.comes(stage, f"going on after: {kind}", lambda: self._goes_on(stage, before))

    def _ripe(self, stage: str, kind: str, chance: random.Random) -> bool:
        """Come to a random moment of the stage. False where the stage ended before."""
        chain = self.chain
        if not chain.comes(stage, "its start", lambda: chain.state(stage) == "RUNNING"):
            return False
        if kind == "killed while starting":
            time.sleep(chance.uniform(0, 6))
            return chain.state(stage) == "RUNNING"
        first = common.STAGES.index(stage) * common.STEPS
        after = max(first, common.step(chain.run)) + chance.randint(1, common.STEPS // 2)
        if not chain.comes(stage, f"step {after}", lambda: common.step(chain.run) >= after):
            return False
        if kind == "rank killed amid a save":
            return chain.comes(stage, "a save", lambda: common.is_saving(chain.run))
        time.sleep(chance.uniform(0, 0.03))
        return True

    def _do(self, kind: str, job: str, ranks: dict[int, int], chance: random.Random) -> None:
        if kind.startswith("rank killed"):
            kill(ranks[chance.randrange(2)])
        elif kind in ("job killed", "killed while starting"):
            for pid in ranks.values():
                kill(pid)
        elif kind == "queued again":
            self.slurm.call("scontrol", "requeue", job)
        elif kind == "told of its limit":
            self.slurm.call("scancel", "--signal=USR1", job)
        elif kind == "preempted":
            preempt(self.slurm)
        elif kind == "node lost":
            self.slurm.power_off("n2")

    def _goes_on(self, stage: str, before: int) -> bool:
        return self.chain.restarts(stage) > before and self.chain.state(stage) in ("RUNNING", "COMPLETED")

    def finish(self) -> None:
        assert set(self.chain.ended().values()) == {"COMPLETED"}, self.chain.logs()

    def close(self) -> None:
        self.slurm.close()


def chaos(field: Field, args: Args, reference: Path, tell: Callable[[str], None]) -> tuple[Counter[str], list[str]]:
    """(how many disturbances of each kind met their mark, what was not as it should be)."""
    chance, tally, problems, number = random.Random(args.seed), Counter[str](), [], 0
    while tally.total() < args.kills and not problems:
        number, model = number + 1, MODELS[number % len(MODELS)]
        run = field.begin(f"chain-{number}", model)
        try:
            while tally.total() < args.kills and not is_finished(run):
                (kind,) = chance.choices(list(field.kinds), list(field.kinds.values()))
                if field.strike(kind, chance):
                    tally[kind] += 1
                    tell(f"{run.name} ({model}), step {common.step(run)}: {kind}")
                problems += [f"{run.name}, after {kind}: {problem}" for problem in damaged(run)]
            field.finish()
        except AssertionError as error:
            problems.append(f"{run.name} ({model}) did not go on: {error}")
            break
        problems += [f"{run.name}: {difference}" for difference in common.differences(run, reference / model)]
    return tally, problems


def is_finished(run: Path) -> bool:
    """Whether the last stage left its weights."""
    return (run / "export" / common.STAGES[-1] / "model.safetensors").exists()


def damaged(run: Path) -> list[str]:
    """The visible checkpoints that are not whole. One may go while it is looked at: pruned."""
    found = []
    for manifest in run.glob(f"checkpoints/*/step_*/{MANIFEST}"):
        problem = problem_with(manifest.parent)
        if problem is not None and manifest.exists():
            found.append(f"{manifest.parent}: {problem}")
    return found


def undisturbed(field: Field, runs: Path) -> Path:
    """A training of each model that nothing happens to."""
    for model in MODELS:
        field.begin(f"undisturbed/{model}", model)
        field.finish()
    return runs / "undisturbed"


def report(console: Console, tally: Counter[str], problems: list[str]) -> None:
    """The tally, and the problems if there are any."""
    for kind, count in sorted(tally.items()):
        console.print(f"{count:5d}  {kind}", highlight=False)
    verdict = "with problems" if problems else "each gone on from, every checkpoint whole, every end equal to the bit"
    console.print(f"{tally.total():5d}  in all: {verdict}", highlight=False, soft_wrap=True)
    for problem in problems:
        console.print(problem, style="red", soft_wrap=True, markup=False)


def main() -> int:
    args = parse(Args, sys.argv[1:])
    console, reason = Console(), "plain=true" if args.plain else why_not()
    console.print("under Slurm" if reason is None else f"as plain processes ({reason})")
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    world, runs = make_world(folder), folder / "runs"
    field: Field = UnderSlurm(world, runs, folder / "slurm") if reason is None else Processes(world, runs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("undisturbed", total=args.kills)
            reference = undisturbed(field, runs)

            def tell(what: str) -> None:
                progress.update(task, advance=1, description=what)
                if not console.is_terminal:
                    print(what, flush=True)

            tally, problems = chaos(field, args, reference, tell)
    finally:
        field.close()
    report(console, tally, problems)
    if problems:
        console.print(f"all of it is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    run_main(main)
