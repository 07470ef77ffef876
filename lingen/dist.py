"""Ranks, the few collectives that we need, and the signals that ask a run to stop.

Nothing here imports torch at the top: a launcher can install ``StopSignal`` before the slow imports begin.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lingen.errors import LocalError, UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: asked to stop, saved, and to be started again with the same command
TIMEOUT = timedelta(minutes=30)  # a collective may wait for one rank that reads a large checkpoint


class StopSignal:
    """``asked`` becomes True once SIGTERM (preemption), SIGUSR1 (Slurm's early warning) or Ctrl-C arrives.

    Only the main thread may install it. The loop saves after the step in hand and exits with ``EXIT_PREEMPTED``.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait


@dataclass(frozen=True)
class Place:
    """This process among all: read from torchrun's variables, else from those of a Slurm step."""

    rank: int
    world: int
    local_rank: int


def find_place(environ: Mapping[str, str]) -> Place:
    """The process's place. Slurm's batch script itself (SLURM_* set, but in no ``srun`` step) is a single process.

    Raises:
        UserError: a launcher's variables are incomplete or not numbers.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_ID" in environ:
        names = (
            "SLURM_PROCID",
            "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS",
            "SLURM_LOCALID",
        )
    else:
        return Place(0, 1, 0)
    try:
        rank, world, local_rank = (int(environ[name]) for name in names)
    except KeyError as error:
        raise UserError(f"the launcher set {names[0]} but not {error.args[0]}; start with torchrun or srun") from error
    except ValueError as error:
        raise UserError(f"{', '.join(names)} must be whole numbers: {error}") from error
    if not 0 <= rank < world:
        raise UserError(f"{names[0]}={rank} is not below {names[1]}={world}")
    return Place(rank, world, local_rank)


@dataclass(frozen=True)
class Dist:
    """The processes of a run. Its methods are collectives: all ranks call them, in one order.

    Each ``sequence`` neighbouring ranks compute the same samples together, and get the same data: there are
    ``data_world`` such groups, and this rank is in group ``data_rank``.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    sequence: int = 1  # engine.sequence_parallel
    sequence_group: ProcessGroup | None = None  # None where each rank is alone with its samples

    @property
    def data_rank(self) -> int:
        """Which part of each global batch this rank computes, alone or with its group."""
        return self.rank // self.sequence

    @property
    def data_world(self) -> int:
        """Parts of a global batch that are computed at the same time."""
        return self.world // self.sequence

    @property
    def sequence_rank(self) -> int:
        """This rank's place in its group."""
        return self.rank % self.sequence

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` (any shape, on ``device``) by its sum over the ranks."""
        if self.world > 1:
            import torch.distributed as td

            td.all_reduce(tensor)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Replace ``tensor`` (contiguous, on ``device``) by that of rank ``source``."""
        if self.world > 1:
            import torch.distributed as td

            td.broadcast(tensor, src=source)

    def barrier(self) -> None:
        """Return when every rank is here."""
        if self.world > 1:
            import torch

            # A sum of zeros: the same on gloo and NCCL, without the latter's guess at a device.
            self.all_reduce_sum(torch.zeros(1, device=self.device))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on some rank."""
        if self.world == 1:
            return flag
        import torch

        total = torch.tensor([float(flag)], device=self.device)
        self.all_reduce_sum(total)
        return bool(total.item() > 0)

    def agreed(self, flags: torch.Tensor) -> torch.Tensor:
        """``flags`` (bool, any shape) that are set on every rank of this rank's group, on ``device``."""
        if self.sequence == 1:
            return flags.to(self.device)
        import torch
        import torch.distributed as td

        common = flags.to(self.device, torch.int32)
        td.all_reduce(common, td.ReduceOp.MIN, group=self.sequence_group)
        return common.bool()

    def gather(self, value: Any) -> list[Any]:
        """A small JSON value of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [json.loads(json.dumps(value))]
        import torch
        import torch.distributed as td

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        length = torch.tensor([len(data)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.world)]
        td.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        td.all_gather(parts, padded)
        return [json.loads(p[: int(n)].cpu().numpy().tobytes()) for p, n in zip(parts, lengths, strict=True)]

    def together(self, action: Callable[[], T]) -> T:
        """What ``action`` returns here, once it is done on all ranks. Collective.

        Raises:
            UserError: it failed so on some rank; on all ranks, so that none waits for another that has gone.
        """
        value, problem = None, None
        try:
            value = action()
        except (UserError, OSError) as error:
            problem = str(error)
        problems = [p for p in self.gather(problem) if p]
        if problems:
            raise UserError(problems[0])
        return cast("T", value)

    def ensure_group(self) -> None:
        """A process group also for one process: DeepSpeed cannot do without."""
        import torch.distributed as td

        if not td.is_initialized():
            store = td.HashStore()  # type: ignore[attr-defined]
            td.init_process_group(_backend(self.device), store=store, rank=0, world_size=1, timeout=TIMEOUT)
            atexit.register(_settle)

    def close(self) -> None:
        """Leave the process group, at the end of a run that went well on all ranks."""
        import torch.distributed as td

        if td.is_initialized():
            td.destroy_process_group()


def init(device: str, sequence: int = 1) -> Dist:
    """Find this process's place and device, and join the others: gloo on CPU, NCCL on GPU.

    ``device`` is 'cpu', 'cuda' or 'auto' (a GPU where there is one); ``sequence`` ranks share each sample.

    Raises:
        UserError: there is no such device, the launcher's variables do not suffice, or ``sequence`` does not divide
            the processes.
    """
    import torch
    import torch.distributed as td

    place = find_place(os.environ)
    if place.world % sequence:
        raise UserError(
            f"engine.sequence_parallel={sequence} must divide the number of processes, which is {place.world}"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise LocalError("engine.device=cuda, but torch sees no GPU; set engine.device=cpu or auto")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if place.local_rank >= torch.cuda.device_count():
            raise LocalError(
                f"local rank {place.local_rank} has no GPU of its own: torch sees {torch.cuda.device_count()}; "
                "start one process a GPU"
            )
        chosen = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported, which happens later
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed insists on it
    if place.world > 1 and not td.is_initialized():
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"{name} is not set; with {place.world} processes it must name the first one's host or port"
                )
        td.init_process_group(_backend(chosen), rank=place.rank, world_size=place.world, timeout=TIMEOUT)
        atexit.register(_settle)
    group = None
    if sequence > 1:  # neighbours, in the order of their ranks
        group, _ = td.new_subgroups(sequence, timeout=TIMEOUT)  # type: ignore[no-untyped-call]
    return Dist(place.rank, place.world, place.local_rank, chosen, sequence, group)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _settle() -> None:
    """Let gloo's threads drop the tensors of the last collective, which takes an interpreter.

    Destroying the group does not end these threads; one that comes too late aborts the process (seen in one exit of
    ten with DeepSpeed under torchrun: "terminate called without an active exception", exit by signal 6).
    """
    time.sleep(0.2)
