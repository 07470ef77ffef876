"""What a launch would do, printed: the plan, what each job takes, the chain, the scripts."""

from __future__ import annotations

import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from lingen.cluster.checks import PlannedJob, problems
from lingen.cluster.request import attempts
from lingen.errors import UserError
from lingen.plan import in_gb, print_training


def print_dry_run(planned: list[list[PlannedJob]]) -> None:
    """Everything on stdout; nothing is asked of Slurm, and nothing is written.

    Raises:
        UserError: after that, where a launch would be refused.
    """
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for jobs in planned:
        first = jobs[0]
        stages = [each.plan.stages[0] for each in jobs]
        print_training(console, first.chain.config, replace(first.plan, stages=stages))
        console.print(_table(jobs))
        for each in jobs:
            memory = each.plan.stages[0].memory
            said = in_gb(memory) if memory else f"memory is not predicted: {each.plan.unknown}"
            console.print(f"  {each.job.stage}: {said}", soft_wrap=True, markup=False)
        hours = [each.gpu_hours for each in jobs]
        if all(h is not None for h in hours):
            gpu = first.chain.cluster.gpu
            assert gpu is not None
            console.print(
                f"total: {sum(h for h in hours if h is not None):,.0f} GPU-hours at an MFU of {gpu.mfu:g} of "
                f"{gpu.peak_tflops:g} TFLOP/s"
            )
    for jobs in planned:
        console.print(f"\nthe chain of {jobs[0].chain.config.name}:")
        for number, each in enumerate(jobs):
            after = f"after {jobs[number - 1].job.stage} has ended well" if number else "at once"
            console.print(f"  {number + 1}. {each.job.stage}: {after}", markup=False)
    for jobs in planned:
        for each in jobs:
            print(f"\n{'-' * 20} {each.chain.run}/chain/{each.job.stage}.sbatch\n{each.script}", end="")
    found = list(problems(planned))
    for problem in found[:-1]:
        print(f"error: {problem}", file=sys.stderr)
    if found:
        raise UserError(f"{found[-1]}; nothing would be submitted")


def _table(jobs: list[PlannedJob]) -> Table:
    """What each job takes."""
    table = Table("stage", "nodes", "ranks", "GPU-hours", "wall time", "limit", "requeues", "memory", "of", "fits")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in jobs:
        job, cluster, memory = each.job, each.chain.cluster, each.plan.stages[0].memory
        hours = each.gpu_hours
        wall = None if hours is None else hours / job.world
        fits = memory is None or cluster.capacity is None or memory.total <= cluster.capacity
        table.add_row(
            job.stage,
            str(job.nodes),
            f"{job.world} x {job.device}",
            "" if hours is None else f"{hours:,.4g}",
            "" if wall is None else f"{wall:,.4g} h",
            job.time,
            "" if wall is None else str(attempts(job, wall, cluster) - 1),
            f"{memory.total / 1e9:.3g} GB" if memory else "unknown",
            f"{cluster.capacity / 1e9:.3g} GB" if cluster.capacity else "",
            ("yes" if fits else "[red]no[/red]") if memory and cluster.capacity else "",
        )
    return table
