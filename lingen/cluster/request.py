"""From the words of ``slurm/launch.py`` to chains of jobs: everything is composed and validated, nothing done yet."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lingen.cluster.config import ClusterConfig, ClusterRoot, StageJobConfig, seconds
from lingen.compose import CONF_DIR, compose, compose_file, parse
from lingen.config import Config
from lingen.curriculum import up_to
from lingen.errors import UserError, nearest
from lingen.model_config import Section
from lingen.runfolder import other_experiment, run_folder

ModelName = Literal["lingen", "dit"]


class LaunchArgs(Section):
    """The words that are the launcher's own; all others are train.py's."""

    name: str
    cluster: str
    models: Annotated[list[ModelName], Field(min_length=1)] | None = None
    dry_run: bool = False
    until: str | None = None


@dataclass(frozen=True)
class Job:
    """One stage of a chain as it is asked of Slurm."""

    stage: str
    config: Config  # of this stage alone, with its own words
    words: list[str]  # of train.py
    nodes: int
    tasks_per_node: int
    time: str

    @property
    def world(self) -> int:
        """Processes."""
        return self.nodes * self.tasks_per_node

    @property
    def device(self) -> str:
        """What the processes will find: a kind of device."""
        return self.config.engine.device


@dataclass(frozen=True)
class Chain:
    """A run taken through its stages, one job after the other."""

    config: Config  # of all its stages
    words: list[str]  # of train.py, without until=
    cluster: ClusterConfig
    jobs: list[Job]

    @property
    def run(self) -> Path:
        """The run's folder."""
        return run_folder(self.config).absolute()


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    name: str
    chains: list[Chain]
    dry_run: bool


def read_request(words: list[str]) -> Request:
    """Raises:
    UserError: a word of the command, or a stage's own in conf/cluster, cannot be.
    """
    own: list[str] = []
    clusters: list[str] = []
    trains: list[str] = []
    for word in words:
        key = word.partition("=")[0]
        kind = own if key in LaunchArgs.model_fields else clusters if key.startswith("cluster.") else trains
        kind.append(word)
    args = parse(LaunchArgs, own)
    cluster = compose_file(ClusterRoot, "cluster", args.cluster, clusters).cluster
    if args.models is None:
        return Request(args.name, [_chain([f"name={args.name}", *trains], cluster, args.until)], args.dry_run)
    if len(set(args.models)) < len(args.models):
        raise UserError(f"models=[{','.join(args.models)}] names a model twice")
    given = next((word for word in trains if word.startswith("model=")), None)
    if given:
        raise UserError(f"{given} and models=[{','.join(args.models)}]: give one of the two")
    chains = [
        _chain([f"name={args.name}/{model}", f"model={model}", *trains], cluster, args.until) for model in args.models
    ]
    return Request(args.name, chains, args.dry_run)


def _chain(words: list[str], cluster: ClusterConfig, until: str | None) -> Chain:
    whole = up_to(compose([*words, *([f"until={until}"] if until else [])]))
    known = {*whole.stages, *(path.stem for path in (CONF_DIR / "stage").glob("*.yaml"))}
    for stage in cluster.stages:
        if stage not in known:
            raise UserError(f"cluster.stages.{stage}: there is no such stage{nearest(stage, known)}")
    wanted = "cuda" if cluster.gpus_per_node else "cpu"
    if whole.engine.device not in ("auto", wanted):
        raise UserError(
            f"engine.device={whole.engine.device} with cluster.gpus_per_node={cluster.gpus_per_node}; choose one of "
            "the two"
        )
    chain = Chain(whole, words, cluster, [_job(stage, whole, words, cluster) for stage in whole.stages])
    for path in (chain.run, Path.cwd()):
        if re.search(r"[\x00-\x1f\x7f\\]", str(path)):  # a second line of the script; Slurm takes backslashes away
            raise UserError(f"{str(path)!r} has a backslash or a line break in it, which a job's script cannot have")
    return chain


def _job(stage: str, whole: Config, words: list[str], cluster: ClusterConfig) -> Job:
    own = cluster.stages.get(stage, StageJobConfig())
    device = "cuda" if cluster.gpus_per_node else "cpu"  # where a node's torch sees no GPU, the job is to fail
    at_work = [*words, f"until={stage}", f"engine.device={device}", *own.words]
    try:
        config = compose(at_work)
    except UserError as error:
        raise UserError(f"stage {stage}: {error}") from error
    difference = other_experiment(whole, config)
    if difference is None and (config.name, config.runs_dir, config.until, config.engine.device) != (
        whole.name,
        whole.runs_dir,
        stage,
        device,
    ):
        difference = "name, runs_dir, until and engine.device are set by the launch"
    if difference is not None:
        raise UserError(
            f"cluster.stages.{stage}.words=[{','.join(own.words)}] may say how a stage is computed, not what it is: "
            f"{difference}"
        )
    alone = config.model_copy(update={"stages": {stage: config.stages[stage]}})
    return Job(stage, alone, at_work, own.nodes or cluster.nodes, cluster.tasks, own.time or cluster.time)


def attempts(job: Job, hours: float, cluster: ClusterConfig) -> int:
    """How often the job is started, if only its time limit stops it."""
    return max(1, ceil(hours * 3600 / (seconds(job.time) - cluster.signal_s)))


def interpreter(cluster: ClusterConfig) -> str:
    """The Python of the processes."""
    if cluster.venv is not None:
        return str(Path(cluster.venv).expanduser().absolute() / "bin" / "python")
    return "python" if cluster.container else sys.executable


def job_name(chain: Chain, job: Job) -> str:
    """As squeue shows it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", f"{chain.config.name}-{job.stage}")
