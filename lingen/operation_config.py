"""The part of a run's schema that says how it is kept alive: checkpoints, guards, the watchdog, the records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lingen.model_config import Section

Count = Annotated[int, Field(ge=0)]


class CheckpointConfig(Section):
    """When to save, how, and how many to keep; each stage's end is always kept."""

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 2
    keep_every: Count = 0  # every so many-th checkpoint of a stage is kept for good; 0: none
    asynchronous: bool = True  # training goes on while a copy is written
    writers: Count = 0  # ranks that write at the same time, for the file system's sake; 0: all


class GuardConfig(Section):
    """Which steps are left out, and when the run goes back to its last checkpoint and past that data.

    A step whose loss or gradient is not finite is always left out. A spike is judged by bucket, against the last
    ``window`` steps; it takes so many steps before anything is judged.
    """

    in_a_row: PositiveInt = 3  # steps left out one after the other, before the run goes back
    rollbacks: PositiveInt = 3  # without a new checkpoint between them, before the run ends
    loss_deviations: PositiveFloat | None = None  # standard deviations above the mean; None: spikes of the loss pass
    grad_deviations: PositiveFloat | None = None  # the same of the gradient norm's logarithm
    window: Annotated[int, Field(ge=10)] = 100


class WatchdogConfig(Section):
    """A rank without a sign of life writes its stacks down and ends the job."""

    step_s: Annotated[float, Field(ge=0)] = 1800.0  # the longest that a step, or a part of a start, may take; 0: never


class LoggerConfig(Section):
    """metrics.jsonl is always written; these say what else."""

    every_steps: PositiveInt = 1
    console: bool = True
    wandb: Literal["auto", "offline", "disabled"] = "auto"  # auto: online where there is a key, else offline
    project: str = "lingen"
    entity: str | None = None
