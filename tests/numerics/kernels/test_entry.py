"""Every call that launches our Triton kernels does so on its arguments' device, which need not be the current one.

Shapes: B batch, N tokens, R reviews, h heads of P channels, E = h*P.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lingen.kernels.index import ScanIndex
from lingen.kernels.window import tile

N, R, h, P = 6, 1, 2, 16
E = h * P
INDEX = ScanIndex(torch.arange(R + N).int(), torch.arange(R + N).int(), R)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(1, *shape)


CALLS: dict[str, tuple[str, Callable[..., Any]]] = {  # by the call's name: its module, and how it is called
    "scan_conv_triton": (
        "conv_triton",
        lambda f: f(zeros(N, 1, E), zeros(R, 1, E), zeros(2 * E, 4)[0], zeros(2 * E)[0], INDEX, E),
    ),
    "scan_steps_triton": ("conv_triton_steps", lambda f: f(zeros(N, 1, h), zeros(R, 1, h), zeros(2 * h)[0], INDEX)),
    "review_tokens_triton": ("review_triton", lambda f: f(zeros(N, 1, E), (1, 2, 3), (1, 2, 2))),
    "gated_norm_triton": (
        "norm_gated_triton",
        lambda f: f(zeros(R + N, 2 * h, P), zeros(N, E), zeros(E)[0], INDEX, 1e-6),
    ),
    "merge_directions_triton": ("norm_gated_triton", lambda f: f(zeros(R + N, 2 * h, P), INDEX)),
    "split_directions_triton": ("norm_gated_triton", lambda f: f(zeros(R + N, 2 * h, P), INDEX)),
    "modulate_triton": ("norm_modulate_triton", lambda f: f(zeros(N, E), zeros(1, E), zeros(1, E), 1e-6)),
    "norm_rotate_triton": (
        "norm_rotate_triton",
        lambda f: f(zeros(N, 3, h, P), zeros(1, P).expand(2, 1, P), (zeros(N, P).view(N, 1, 1, P),) * 2, 1e-6),
    ),
    "window_attention_triton": (
        "window_triton",
        lambda f: f(zeros(N, h, P), zeros(N, h, P), zeros(N, h, P), tile((1, 2, 3), (1, 2, 2), shifted=False)),
    ),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_kernels_are_launched_on_the_device_of_their_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is for Linux")
    current: list[torch.device] = []
    seen: list[list[torch.device]] = []
    run = interpreter.GridExecutor.__call__

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x.device)
        yield
        current.pop()

    def recorded(self: Any, *args: Any, **options: Any) -> None:
        seen.append([*current])
        run(self, *args, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    module, call = CALLS[name]
    call(getattr(importlib.import_module(f"lingen.kernels.{module}"), name))
    assert seen and all(devices == [torch.device("cpu")] for devices in seen)
