"""Which form of each kernel runs: asked for in the configuration, or the first that the device has.

A form is chosen once a kernel, device and precision, at its first use. The last form of each list runs anywhere and
defines the truth; a form that was asked for by name and is missing is an error, and never replaced by another.

The fused forms of attention compute in bf16 and fp16 alone: an fp32 run takes torch's choice, sdpa, on any device.
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
    "attention": ("cudnn", "flash-attn", "flash", "sdpa", "torch"),
}  # the fastest first
# What a form imports; and a kernel besides, where it is not Triton's but an extension that not every build has.
_MODULES = {"triton": ("triton",), "mamba-ssm": ("mamba_ssm", "triton")}
_EXTENSIONS = {"selective_scan": ("selective_scan_cuda",)}
_FUSED_ATTENTION = ("cudnn", "flash-attn", "flash")
_asked: dict[str, str] = {}


def ask(forms: Mapping[str, str], device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Take these forms from now on, in this process; 'auto' and kernels that are not named take the fastest.

    Args:
        forms: kernel -> form.
        device, dtype: where and in what precision they are to run; None leaves that to their first use.

    Raises:
        ValueError: there is no such kernel or form, or it cannot run so; the message says which and why.
    """
    for kernel, form in forms.items():
        if kernel not in FORMS:
            raise ValueError(f"{kernel} is no kernel; there are {', '.join(FORMS)}")
        if form != "auto" and form not in FORMS[kernel]:
            raise ValueError(f"kernels.{kernel}={form} is no form of it; there are auto, {', '.join(FORMS[kernel])}")
        if form != "auto":
            _must_run(kernel, form, device, dtype)
    _asked.clear()
    _asked.update({kernel: form for kernel, form in forms.items() if form != "auto"})
    _choose.cache_clear()


def chosen(kernel: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The form that ``kernel`` takes on ``device``, in ``dtype`` where that matters. To torch.compile a constant.

    Raises:
        ValueError: the form that was asked for cannot run so.
    """
    return _choose(kernel, device, dtype)


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes most of a second.
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _choose(kernel: str, device: torch.device, dtype: torch.dtype | None) -> str:
    if kernel in _asked:
        _must_run(kernel, _asked[kernel], device, dtype)
        return _asked[kernel]
    return next(
        form for form in FORMS[kernel] if not missing(kernel, form, device, dtype) and not _slower(form, device)
    )


def describe(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Every kernel's form, for the line that a start prints."""
    return ", ".join(f"{kernel} {chosen(kernel, device, dtype)}" for kernel in FORMS)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on a CPU: for tests, far too slow for work."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _slower(form: str, device: torch.device) -> bool:
    """What can run on a CPU, but is there for the tests alone."""
    return device.type != "cuda" and form in ("triton", "mamba-ssm")


def _must_run(kernel: str, form: str, device: torch.device, dtype: torch.dtype | None) -> None:
    if problem := missing(kernel, form, device, dtype):
        raise ValueError(f"kernels.{kernel}={form} cannot run here: {problem}; set kernels.{kernel}=auto")


def missing(kernel: str, form: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why ``form`` cannot run on ``device`` (and in ``dtype``), or None where it can."""
    if form in ("torch", "sdpa"):
        return None
    modules = (flash_attn_module(),) if form == "flash-attn" else _MODULES.get(form, ())
    for module in (*modules, *_EXTENSIONS.get(kernel, ())):
        if importlib.util.find_spec(module) is None:
            return f"the package {module} is not installed"
    interprets = interpreted() and form in ("triton", "mamba-ssm") and kernel not in _EXTENSIONS
    if device.type != "cuda" and not interprets:
        return f"it needs a GPU, and the device is {device.type}"
    if dtype == torch.float64 and (form == "mamba-ssm" or kernel == "window"):
        return "it does not compute in fp64"
    if form in _FUSED_ATTENTION:
        if dtype not in (None, torch.bfloat16, torch.float16):
            return f"it computes in bf16 and fp16, and the run in {dtype}"
        if torch.cuda.get_device_properties(device).major < 8:
            return "it needs a GPU of compute capability 8.0 or later"
    return None


def flash_attn_module() -> str:
    """Where flash-attention lies: the package for Hopper where that is installed, else the one for all GPUs."""
    return "flash_attn_interface" if importlib.util.find_spec("flash_attn_interface") else "flash_attn"
