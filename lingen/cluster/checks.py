"""What is looked at before anything is submitted, and what the plan of each job comes to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.shards import Index, load_index
from lingen import lease
from lingen.checkpoint import Checkpoint, refuse_other_architecture
from lingen.cluster import slurm
from lingen.cluster.request import Chain, Job
from lingen.cluster.script import render
from lingen.errors import UserError
from lingen.export import newest_folder
from lingen.manifest import MANIFEST, read_manifest, step_folders
from lingen.plan import Plan, in_gb, make_plan, refuse_impossible, ways_out
from lingen.runfolder import architecture, refuse_other_experiment, run_folder
from lingen.shardfiles import Damaged


@dataclass(frozen=True)
class PlannedJob:
    """A job, its script and what it will do."""

    chain: Chain
    job: Job
    script: str
    plan: Plan  # of its stage alone

    @property
    def gpu_hours(self) -> float | None:
        """Hours of one GPU, at the stated share of the peak; None where nothing is stated."""
        gpu = self.chain.cluster.gpu if self.chain.cluster.gpus_per_node else None
        return self.plan.stages[0].flops / (gpu.mfu * gpu.peak_tflops * 1e12) / 3600 if gpu else None

    @property
    def problem(self) -> str | None:
        """Why the stage could not be trained so, or None."""
        engine, cluster = self.job.config.engine, self.chain.cluster
        where = f"{self.chain.config.name}, stage {self.job.stage}"
        if self.job.world % engine.sequence_parallel:
            return (
                f"{where}: engine.sequence_parallel={engine.sequence_parallel} does not divide the {self.job.world} "
                f"processes of {self.job.nodes} nodes"
            )
        try:
            refuse_impossible(self.job.config, self.plan, self.job.world // engine.sequence_parallel)
        except UserError as error:
            return f"{where} on {self.job.nodes} nodes: {error}"
        memory = self.plan.stages[0].memory
        if memory is not None and cluster.capacity is not None and memory.total > cluster.capacity:
            have = "cluster.gpu.memory_gb" if cluster.gpus_per_node else "cluster.mem a process"
            return (
                f"{where} on {self.job.nodes} nodes: {in_gb(memory)} on each rank, and {have} is "
                f"{cluster.capacity / 1e9:.3g} GB; {ways_out(self.job.config, self.job.world)}, in "
                f"cluster.stages.{self.job.stage}.words"
            )
        return None


def plan_jobs(chains: list[Chain]) -> list[list[PlannedJob]]:
    """Every job of every chain with its script and its plan.

    Raises:
        UserError: the data cannot be read, or a script cannot be written.
    """
    indices: dict[str, Index] = {}
    planned = []
    for chain in chains:
        path = chain.config.data.path
        index = indices[path] = indices.get(path) or load_index(path)
        planned.append([PlannedJob(chain, job, render(chain, job), _plan(job, index)) for job in chain.jobs])
    return planned


def _plan(job: Job, index: Index) -> Plan:
    return make_plan(job.config, index, world=job.world, device=job.device)


def problems(planned: list[list[PlannedJob]]) -> Iterator[str]:
    """Why these stages could not be trained so, one line each; nothing of Slurm is asked."""
    for jobs in planned:
        yield from (problem for job in jobs if (problem := job.problem))


def refuse_run_folder(chain: Chain) -> None:
    """Raises:
    UserError: the run folder cannot be written, holds another experiment, or ``init_from`` another architecture.
    """
    there = chain.run
    try:
        while not there.exists():
            there = there.parent
    except OSError as error:
        raise UserError(f"{chain.run} cannot be written: {error.strerror}; set runs_dir or name") from error
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{chain.run} cannot be written: {there} is no folder that can; set runs_dir or name")
    refuse_other_experiment(chain.config)
    if chain.config.init_from is not None:
        named = Path(chain.config.init_from)
        folder = named if (named / MANIFEST).exists() else next(reversed(step_folders(named)), None)
        if folder is None:
            raise UserError(f"init_from={chain.config.init_from} holds no checkpoint")
        try:
            refuse_other_architecture(Checkpoint(folder, read_manifest(folder), {}), architecture(chain.config))
        except Damaged as damage:
            raise UserError(f"init_from={folder} is no whole checkpoint: {damage}") from damage
        except UserError as error:
            raise UserError(f"init_from={chain.config.init_from}: {error}") from error


def refuse_other_writer(run: Path, ours: set[str]) -> None:
    """Only a look: whoever trains takes the lease itself.

    Raises:
        UserError: a process that is none of the jobs ``ours`` writes the run folder.
    """
    found = lease.read(run / lease.LEASE)
    if found is None or (found.holder is not None and found.holder.job in ours):
        return
    try:
        age = time.time() - found.path.stat().st_mtime
    except FileNotFoundError:
        return  # released just now
    if age < lease.EXPIRY_S:
        raise UserError(
            f"{run} is written by {found}, {max(0.0, age):.0f} s ago; end that, wait {lease.EXPIRY_S:g} s where it has "
            "died, or choose another name"
        )


def refuse_nodes(planned: list[PlannedJob]) -> None:
    """Raises:
    UserError: the partition is not there, or its nodes have not what is asked.
    """
    cluster = planned[0].chain.cluster
    nodes = slurm.nodes_of(cluster.partition)
    partition = f"partition {cluster.partition}" if cluster.partition else "the default partition"
    cpus = cluster.tasks * cluster.cpus_per_task
    for what, wanted, most in (
        ("cluster.gpus_per_node", cluster.gpus_per_node, max((n.gpus for n in nodes), default=0)),
        ("processes x cluster.cpus_per_task", cpus, max((n.cpus for n in nodes), default=0)),
    ):
        if wanted > most:
            raise UserError(f"{what}={wanted}, but a node of {partition} has at most {most}")
    fitting = [n for n in nodes if n.gpus >= cluster.gpus_per_node and n.cpus >= cpus]
    for each in planned:
        if each.job.nodes > len(fitting):
            raise UserError(
                f"stage {each.job.stage} asks for {each.job.nodes} nodes, but {partition} has {len(fitting)} with "
                f"{cluster.gpus_per_node} GPUs and {cpus} CPUs"
            )


def refuse_scripts(planned: list[PlannedJob]) -> None:
    """Raises:
    UserError: Slurm would not take a script.
    """
    for each in planned:
        try:
            slurm.test(each.script)
        except UserError as error:
            raise UserError(f"{each.chain.config.name}, stage {each.job.stage}: {error}") from error


def stages_done(chain: Chain) -> int:
    """How many of the chain's stages need no job. As in training, the last stage that has a checkpoint decides.

    Raises:
        UserError: that checkpoint is of another architecture or a newer schema.
    """
    for number in reversed(range(len(chain.jobs))):
        newest = newest_folder(run_folder(chain.config) / "checkpoints" / chain.jobs[number].stage)
        if newest is not None:
            manifest = read_manifest(newest)
            refuse_other_architecture(Checkpoint(newest, manifest, {}), architecture(chain.config))
            return number + manifest.final
    return 0
