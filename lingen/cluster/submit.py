"""Submitting chains: all of what is missing, or nothing."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from lingen.autoencoders import load_autoencoder
from lingen.cluster import slurm
from lingen.cluster.checks import (
    PlannedJob,
    problems,
    refuse_nodes,
    refuse_other_writer,
    refuse_run_folder,
    refuse_scripts,
    stages_done,
)
from lingen.cluster.record import (
    ChainRecord,
    SubmittedStage,
    chain_folder,
    read_chain,
    read_stage,
    write_chain,
)
from lingen.cluster.request import Chain
from lingen.cluster.slurm import QueuedJob
from lingen.errors import UserError
from lingen.lease import Lease
from lingen.runfolder import write_aside


@dataclass(frozen=True)
class Todo:
    """What is left of a chain."""

    chain: Chain
    before: ChainRecord | None  # what an earlier launch wrote down, as it was looked at
    finished: list[str]  # stages that need no job
    kept: list[SubmittedStage]  # in the queue with the script of now: they stay
    stale: list[int]  # jobs that wait for one which is gone: cancelled once those in their place are there
    missing: list[PlannedJob]  # to be submitted, in order, behind what is kept

    @property
    def after(self) -> int | None:
        """The job that the first missing one waits for."""
        return self.kept[-1].job if self.kept else None


def launch(planned: list[list[PlannedJob]]) -> None:
    """Check everything, then submit what is missing of each chain.

    Raises:
        UserError: something is wrong; nothing was submitted, or what was is cancelled again.
    """
    slurm.require("sbatch", "squeue", "sinfo", "scontrol", "scancel")
    for jobs in planned:
        refuse_run_folder(jobs[0].chain)
    todo = [_look(jobs) for jobs in planned]
    missing = [each for one in todo for each in one.missing]
    for one in todo:
        _say_what_is_there(one)
    if not missing:
        print("nothing to submit")
        return
    for one in todo:
        refuse_other_writer(one.chain.run, {str(stage.job) for stage in one.kept})
    refuse_nodes(missing)
    for problem in problems([one.missing for one in todo]):
        raise UserError(problem)
    load_autoencoder(missing[0].job.config.autoencoder, torch.device("cpu"))
    refuse_scripts(missing)
    _submit([one for one in todo if one.missing])


def _look(planned: list[PlannedJob]) -> Todo:
    """What of a chain is finished, in the queue, or missing.

    Raises:
        UserError: what is in the queue is not what is asked for now.
    """
    chain = planned[0].chain
    done = stages_done(chain)
    record = read_chain(chain.run)
    before = {stage.stage: stage for stage in record.stages} if record else {}
    _refuse_unrecorded(chain, {stage.job for stage in before.values()})
    queued = slurm.queue(stage.job for stage in before.values())
    active = {name: stage for name, stage in before.items() if _is_active(chain, stage, queued)}
    kept: list[SubmittedStage] = []
    missing: list[PlannedJob] = []
    stale: list[int] = []
    for number, each in enumerate(planned):
        there = active.get(each.job.stage)
        if number < done:  # trained; a job that is still there has only to end, and the next one waits for it
            kept += [there] if there else []
            continue
        if there is None:  # never submitted, or ended before its stage was done
            missing.append(each)
            continue
        if missing:  # in the queue behind a job which is gone: it cannot begin, and is submitted again
            state = queued[there.job].state
            if state != "PENDING":
                raise UserError(
                    f"job {there.job} ({each.job.stage}) is {state}, and {missing[0].job.stage} before it is neither "
                    f"finished nor in the queue; slurm/launch.py cancel name={chain.config.name} first"
                )
            stale.append(there.job)
            missing.append(each)
            continue
        # In the queue, and so is all before it: it stays, if it is what is asked for.
        script = chain_folder(chain.run) / f"{each.job.stage}.sbatch"
        if not script.is_file() or script.read_text() != each.script:
            raise UserError(
                f"job {there.job} ({each.job.stage}) is in the queue with another script than now ({script}); "
                f"slurm/launch.py cancel name={chain.config.name} first, or launch with the words it had"
            )
        kept.append(there)
    finished = [each.job.stage for each in planned[:done] if each.job.stage not in active]
    return Todo(chain, record, finished, kept, stale, missing)


def _refuse_unrecorded(chain: Chain, known: set[int]) -> None:
    """Raises:
    UserError: a job of this run is in the queue, and chain.json does not know it.
    """
    own = str(chain_folder(chain.run)) + "/"
    lost = sorted(job for job, script in slurm.scripts().items() if script.startswith(own) and job not in known)
    if lost:
        raise UserError(
            f"{chain.config.name}: jobs of a launch that was ended before it wrote them down are in the queue: scancel "
            f"{' '.join(map(str, lost))} first"
        )


def _is_active(chain: Chain, stage: SubmittedStage, queued: dict[int, QueuedJob]) -> bool:
    """In the queue, and not only because it is being tidied up after its end."""
    if stage.job not in queued:
        return False
    record = read_stage(chain.run, stage.stage, stage.job)
    ended = record is not None and record.state in ("stopped", "cancelled", "finished")
    return not (queued[stage.job].state == "COMPLETING" and (ended or stage.cancelled))


def _say_what_is_there(todo: Todo) -> None:
    name = todo.chain.config.name
    for stage in todo.finished:
        print(f"{name}: {stage} is finished")
    for kept in todo.kept:
        print(f"{name}: {kept.stage} is in the queue, job {kept.job}")


def _submit(todo: list[Todo]) -> None:
    """All or nothing: where one is refused, those before it are cancelled."""
    submitted: list[int] = []
    with ExitStack() as held:
        for one in todo:
            held.callback(Lease.take(chain_folder(one.chain.run)).release)
            if read_chain(one.chain.run) != one.before:
                raise UserError(
                    f"{one.chain.config.name}: somebody else launched or cancelled it just now; launch again"
                )
        try:
            for one in todo:
                _submit_chain(one, submitted)
            slurm.cancel(job for one in todo for job in one.stale)
        except BaseException as error:
            if not submitted:
                raise
            note = _take_back(todo, submitted)
            if isinstance(error, UserError):
                raise UserError(f"{error}; {note}") from error
            print(note)
            raise


def _take_back(todo: list[Todo], submitted: list[int]) -> str:
    """Cancel them, write down what was before, and say what has become of them."""
    try:
        slurm.cancel(submitted)
    except UserError as error:
        return f"the jobs submitted before it are still there: {error}; scancel {' '.join(map(str, submitted))}"
    note = f"the {len(submitted)} jobs submitted before it were cancelled"
    try:
        for one in todo:
            write_chain(one.chain.run, one.before)
    except UserError as error:
        return f"{note}, but {error}"
    return note


def _submit_chain(todo: Todo, submitted: list[int]) -> None:
    """Each job is written down before the next is submitted, so that a launch that is killed leaves at most one that
    nobody knows; ``_look`` finds that one by its script."""
    after, jobs = todo.after, []
    for each in todo.missing:
        script = chain_folder(todo.chain.run) / f"{each.job.stage}.sbatch"
        write_aside(script, each.script)
        job = slurm.submit(script, after)
        submitted.append(job)
        jobs.append(SubmittedStage(each.job.stage, job, datetime.now(UTC).isoformat(timespec="seconds")))
        write_chain(todo.chain.run, _record(todo, jobs))
        print(f"{todo.chain.config.name}: {each.job.stage} is job {job}{f', after {after}' if after else ''}")
        after = job


def _record(todo: Todo, jobs: list[SubmittedStage]) -> ChainRecord:
    """The chain with what was submitted now in the place of what was before."""
    chain = todo.chain
    now = {stage.stage: stage for stage in [*(todo.before.stages if todo.before else []), *jobs]}
    order = [name for name in now if name not in chain.config.stages] + [n for n in chain.config.stages if n in now]
    return ChainRecord(
        name=chain.config.name,
        model=chain.config.model.name,
        words=chain.words,
        cluster=chain.cluster.model_dump(mode="json"),
        folder=str(Path.cwd()),
        stages=[now[name] for name in order],
    )
