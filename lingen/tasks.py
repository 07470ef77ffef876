"""Which task a configuration is of."""

from __future__ import annotations

from lingen.config import Config, RunConfig
from lingen.diffusion import DiffusionTask
from lingen.tae_config import TaeRunConfig
from lingen.tae_task import TaeTask
from lingen.task import Task


def task_of(config: RunConfig) -> Task:
    """What a run with this configuration trains."""
    if isinstance(config, TaeRunConfig):
        return TaeTask(config)
    assert isinstance(config, Config)
    return DiffusionTask(config)
