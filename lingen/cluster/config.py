"""The schema of conf/cluster: what is asked of Slurm, and in which environment the processes start."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from lingen.model_config import Section

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def seconds(time: str) -> int:
    """A limit as Slurm writes it: 90 (minutes), 90:00, 12:00:00, 2-12, 2-12:00, 2-12:00:00.

    Raises:
        ValueError: it is none of these.
    """
    found = TIME.fullmatch(time)
    if found is None:
        raise ValueError("must be a time such as 90 (minutes), 12:00:00 or 2-00:00:00")
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"] is not None:
        hours, minutes, rest = [*parts, 0, 0][:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + rest
    hours, minutes, rest = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return (hours * 60 + minutes) * 60 + rest


def _quoted(value: object) -> object:
    if isinstance(value, int):
        raise ValueError("must stand in quotes, since YAML reads 12:00:00 as a number")
    return value


def _time(value: str | None) -> str | None:
    if value is not None and seconds(value) == 0:
        raise ValueError("must be longer than nothing; jobs without a limit have no early warning")
    return value


def _one_word(value: str | None) -> str | None:
    if value is not None and re.fullmatch(r"[^\s'\"\\`$;#]+", value) is None:
        raise ValueError("must be one word of plain characters")
    return value


def _one_line(value: str) -> str:
    if not value or any(ord(c) < 32 for c in value):
        raise ValueError("must be one line")
    return value


Word = Annotated[str, AfterValidator(_one_word)]
OptionalWord = Annotated[str | None, AfterValidator(_one_word)]
Line = Annotated[str, AfterValidator(_one_line)]
Lines = tuple[Line, ...]
Count = Annotated[int, Field(ge=0)]


class GpuConfig(Section):
    """What one GPU is taken to do, for the plan."""

    peak_tflops: PositiveFloat  # dense, in the dtype of engine.dtype
    memory_gb: PositiveFloat  # 1e9 bytes that a step may take; what the prediction leaves out needs the rest
    mfu: Annotated[float, Field(gt=0.0, le=1.0)]  # the share of the peak that training reaches


class ContainerConfig(Section):
    """The image that the processes run in. The repository, the folder of the launch and runs_dir are always mounted."""

    kind: Literal["pyxis", "apptainer"]  # srun --container-image=..., or apptainer exec
    image: Line
    mounts: Lines = ()  # SOURCE:TARGET


class StageJobConfig(Section):
    """What a stage asks for instead of what all ask for."""

    nodes: PositiveInt | None = None
    time: Annotated[str | None, BeforeValidator(_quoted), AfterValidator(_time)] = None
    words: Lines = ()  # of train.py; they come after the command's own, and win


class ClusterConfig(Section):
    """A kind of node on a cluster, and how many of them for how long. docs/cluster.md goes through it."""

    account: OptionalWord = None
    partition: OptionalWord = None
    qos: OptionalWord = None
    constraint: OptionalWord = None
    reservation: OptionalWord = None
    nodes: PositiveInt = 1
    gpus_per_node: Count = 0  # 0: processes on CPUs
    tasks_per_node: PositiveInt | None = None  # processes a node; with GPUs it is one each
    cpus_per_task: PositiveInt = 1
    mem: OptionalWord = None  # a node; 0: all of it
    time: Annotated[str, BeforeValidator(_quoted), AfterValidator(_time)] = "1-00:00:00"
    signal_s: Annotated[int, Field(gt=0, le=65535)] = 300  # so long before the limit all ranks save and stop
    sbatch: Lines = ()  # further options: [--exclusive, --mail-type=FAIL]
    modules: tuple[Word, ...] = ()
    setup: Lines = ()  # lines of bash, run as they stand
    env: Annotated[dict[str, str], Field(default_factory=dict)]
    venv: Line | None = None  # its folder; None: the Python of the launch, or the container's
    container: ContainerConfig | None = None
    max_failures: PositiveInt = 3  # attempts in a row that end badly without a new checkpoint, before the chain stops
    max_preemptions: PositiveInt = 20  # the same of attempts that are stopped from outside
    gpu: GpuConfig | None = None
    stages: Annotated[dict[str, StageJobConfig], Field(default_factory=dict)]

    @field_validator("env", mode="before")
    @classmethod
    def _numbers_are_text(cls, env: object) -> object:
        if not isinstance(env, dict):
            return env
        return {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in env.items()}

    @field_validator("env")
    @classmethod
    def _plain_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
                raise ValueError(f"cluster.env: '{name}' is no name of a variable")
            if re.search(r"(?i)(api_?key|token|secret|password)", name):
                raise ValueError(
                    f"cluster.env: {name} looks like a secret, and scripts are kept; set it where you run launch.py"
                )
            if any(ord(c) < 32 for c in value):
                raise ValueError(f"cluster.env: {name} must be one line")
        return env

    @field_validator("sbatch")
    @classmethod
    def _options(cls, options: Lines) -> Lines:
        for option in options:
            if not option.startswith("-"):
                raise ValueError(f"'{option}' is no option; write it as --NAME=VALUE")
        return options

    @model_validator(mode="after")
    def _one_task_a_gpu(self) -> ClusterConfig:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"cluster.tasks_per_node={self.tasks_per_node} with cluster.gpus_per_node={self.gpus_per_node}: there "
                "is one process a GPU; leave tasks_per_node out"
            )
        return self

    @model_validator(mode="after")
    def _warned_in_time(self) -> ClusterConfig:
        for where, time in {"": self.time, **{f"stages.{k}.": s.time for k, s in self.stages.items()}}.items():
            if time is not None and seconds(time) <= self.signal_s:
                raise ValueError(f"cluster.{where}time={time} is not longer than cluster.signal_s={self.signal_s}")
        return self

    @property
    def tasks(self) -> int:
        """Processes a node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def capacity(self) -> int | None:
        """Bytes that one process may take, where that is known."""
        if self.gpus_per_node:
            return int(self.gpu.memory_gb * 1e9) if self.gpu else None
        found = re.fullmatch(r"(\d+)([KMGT]?)", self.mem or "")
        size = int(found[1]) * UNITS[found[2] or "M"] if found else 0
        return size // self.tasks if size else None


class ClusterRoot(Section):
    """``cluster.KEY``, as it is written on a command line."""

    cluster: ClusterConfig
