"""What the stage loop knows of what it trains. There are two: a video model (lingen/diffusion.py) and an autoencoder
(lingen/tae_task.py).

The loop, its checkpoints, guards, records and the order of the data are the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from data.shards import Index
from lingen.checkpoint import Checkpoint
from lingen.config import BucketConfig, StageConfig
from lingen.dist import Dist
from lingen.memory import Memory
from lingen.step import Trainee


class Inputs(Protocol):
    """What stands before the model, in every stage: the clips, and the frozen networks that read them."""

    @property
    def index(self) -> Index:
        """The samples."""
        ...

    def choices(self, device: torch.device) -> str:
        """What was chosen, and is worth a line at the start."""
        ...

    def frozen(self) -> Mapping[str, str]:
        """The fingerprints that all ranks must agree in, by the part of the configuration that says where the network
        lies, such as "autoencoder"."""
        ...

    def fingerprints(self) -> dict[str, Any]:
        """What the run sees, for its records: without it two losses cannot be compared, nor a position in the data
        understood. ``data_fingerprint`` is among them."""
        ...

    def refuse_others(self, there: Checkpoint) -> None:
        """Raises:
        UserError: the checkpoint was trained with other frozen networks.
        """
        ...

    def build(self, dist: Dist) -> Trainee:
        """The model in its engine. Collective."""
        ...

    def export(self, folder: Path, out: Path, stage: StageConfig, device: torch.device) -> None:
        """Write into ``out`` the weight average of the checkpoint in ``folder``, and all that makes it usable.

        Raises:
            OSError, UserError: it cannot be written, or something cannot be read.
        """
        ...


class Task(Protocol):
    """What a run trains, known from its configuration alone."""

    @property
    def name(self) -> str:
        """The model, in two words."""
        ...

    @property
    def shape(self) -> str:
        """Its dimensions, in a few words."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        ...

    def tokens(self, bucket: BucketConfig) -> int:
        """Of a sample."""
        ...

    def forward_flops(self, bucket: BucketConfig) -> int:
        """FLOPs of the model's forward for a sample."""
        ...

    def memory(self, bucket: BucketConfig, *, batch: int, world: int, device: str) -> Memory:
        """What one rank of ``world`` needs for micro-batches of ``batch`` samples, on a kind of device."""
        ...

    def choose_forms(self, device: torch.device) -> None:
        """Raises:
        UserError: a form of a kernel was asked for that this machine does not have.
        """
        ...

    def load_inputs(self, dist: Dist) -> Inputs:
        """Raises:
        UserError: something is not there, or not what the configuration says.
        """
        ...
