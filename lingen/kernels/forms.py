"""Which form of each kernel runs: asked for in the configuration, or the first that the device has.

A form is chosen once a kernel and device, at its first use. The last form of each list runs anywhere and defines the
truth; a form that was asked for by name and is missing is an error, and never replaced by another.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping

import torch

FORMS: dict[str, tuple[str, ...]] = {
    "ssd": ("mamba-ssm", "torch"),
    "selective_scan": ("mamba-ssm", "torch"),
    "conv": ("triton", "torch"),
    "norm": ("triton", "torch"),
    "window": ("triton", "torch"),
    "attention": ("flash-attn", "cudnn", "flash", "sdpa", "torch"),
}  # the fastest first
# What a form imports; and a kernel besides, where it is not Triton's but an extension that not every build has.
_MODULES = {"triton": ("triton",), "mamba-ssm": ("mamba_ssm", "triton"), "flash-attn": ("flash_attn",)}
_EXTENSIONS = {"selective_scan": ("selective_scan_cuda",)}
_asked: dict[str, str] = {}


def ask(forms: Mapping[str, str], device: torch.device) -> None:
    """Take these forms from now on, in this process; 'auto' and kernels that are not named take the fastest.

    Raises:
        ValueError: there is no such kernel or form, or this machine does not have it; the message says which and why.
    """
    for kernel, form in forms.items():
        if kernel not in FORMS:
            raise ValueError(f"{kernel} is no kernel; there are {', '.join(FORMS)}")
        if form != "auto" and form not in FORMS[kernel]:
            raise ValueError(f"kernels.{kernel}={form} is no form of it; there are auto, {', '.join(FORMS[kernel])}")
        if form != "auto" and (problem := missing(kernel, form, device)):
            raise ValueError(f"kernels.{kernel}={form} cannot run here: {problem}; set kernels.{kernel}=auto")
    _asked.clear()
    _asked.update({kernel: form for kernel, form in forms.items() if form != "auto"})
    chosen.cache_clear()


@functools.cache
def chosen(kernel: str, device: torch.device) -> str:
    """The form that ``kernel`` takes on ``device``."""
    if kernel in _asked:
        return _asked[kernel]
    return next(form for form in FORMS[kernel] if not missing(kernel, form, device) and not _slower(form, device))


def describe(device: torch.device) -> str:
    """Every kernel's form, for the line that a start prints."""
    return ", ".join(f"{kernel} {chosen(kernel, device)}" for kernel in FORMS)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on a CPU: for tests, far too slow for work."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _slower(form: str, device: torch.device) -> bool:
    """What can run on a CPU, but is there for the tests alone."""
    return device.type != "cuda" and form in ("triton", "mamba-ssm")


def missing(kernel: str, form: str, device: torch.device) -> str | None:
    """Why ``form`` cannot run on ``device``, or None where it can."""
    if form in ("torch", "sdpa"):
        return None
    for module in (*_MODULES.get(form, ()), *_EXTENSIONS.get(kernel, ())):
        if importlib.util.find_spec(module) is None:
            return f"the package {module} is not installed"
    interprets = interpreted() and form in ("triton", "mamba-ssm") and kernel not in _EXTENSIONS
    if device.type != "cuda" and not interprets:
        return f"it needs a GPU, and the device is {device.type}"
    return None
