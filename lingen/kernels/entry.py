"""How what launches our Triton kernels is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Result = TypeVar("Result")


def launches(call: Callable[Concatenate[Tensor, Given], Result]) -> Callable[Concatenate[Tensor, Given], Result]:
    """``call``, on the device of its first argument, and left alone by torch.compile.

    Triton launches on the current device, whose kernels cannot touch another device's memory. A backward needs no such
    care: autograd runs it on the device of its results.
    """

    @functools.wraps(call)
    def on_its_device(x: Tensor, *others: Given.args, **options: Given.kwargs) -> Result:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return call(x, *others, **options)

    left_alone: Callable[Concatenate[Tensor, Given], Result] = torch.compiler.disable(on_its_device)  # type: ignore[no-untyped-call]
    return left_alone
