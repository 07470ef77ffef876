"""Every form of every kernel that a device has, forward and backward at small shapes, against the ``_ref`` in fp64.

Shapes: B = 2 samples, N tokens of the grid (T, H, W), R review tokens, M = R + N, h heads of P channels, d projections,
E = h*P channels of x, S state channels, L positions of a scan by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lingen.kernels import attention, conv, forms, norm, selective_scan, ssd, window
from lingen.kernels.index import Grid, ScanIndex
from lingen.models.embed import rotary_table
from lingen.models.mixers.scan import scan_index, scan_order

# Largest ||error|| / ||reference|| of a result or a gradient: roundings of inputs, products and results add up.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
BATCH, EPS = 2, 1e-6
Inputs = dict[str, Tensor]
Results = Tensor | tuple[Tensor, ...]
Draw = Callable[..., Tensor]
Fixed = Callable[[torch.device, torch.dtype], dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """One seam and its ``_ref``, both called with a check's tensors by name, and fixed arguments."""

    kernel: str
    name: str
    seam: Callable[..., Results]
    ref: Callable[..., Results]
    inputs: Inputs  # fp64 on the CPU
    exact: tuple[str, ...] = ()  # inputs that stay in fp32, as the model has them
    fixed: Fixed = lambda device, dtype: {}  # the other arguments


def run(device: torch.device, dtype: torch.dtype, *, grid: Grid, heads: int, channels: int) -> Iterator[dict[str, Any]]:
    """A row for each check and form; a form that fails to run is a row with an ``error``."""
    for check in checks(grid, heads, channels):
        for form in forms.FORMS[check.kernel]:
            if forms.missing(check.kernel, form, device, dtype):
                continue
            row: dict[str, Any] = {"kernel": check.kernel, "form": form, "check": check.name, "dtype": str(dtype)[6:]}
            try:
                forms.ask({check.kernel: form}, device)
                errors = compare(check, device, dtype)
                worst = max(errors, key=lambda name: errors[name])
                row |= {"errors": errors, "worst": worst, "tolerance": TOLERANCE[dtype]}
                row |= {"ok": errors[worst] <= TOLERANCE[dtype]}
            except Exception as error:  # whatever a compiler or a device comes up with: the others go on
                row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
            finally:
                forms.ask({}, device)
            yield row


def compare(check: Check, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """||error|| / ||reference|| of each result, and of each input's gradient."""
    rounded = {name: t.to(torch.float32 if name in check.exact else dtype) for name, t in check.inputs.items()}
    here = {name: t.to(device).requires_grad_() for name, t in rounded.items()}
    truth = {name: t.double().requires_grad_() for name, t in rounded.items()}
    got = _tuple(check.seam(**here, **check.fixed(device, dtype)))
    wanted = _tuple(check.ref(**truth, **check.fixed(torch.device("cpu"), torch.float64)))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(g.dtype) for t, g in zip(wanted, got, strict=True)]
    gradients = torch.autograd.grad(got, list(here.values()), [w.to(device) for w in weights])
    truths = torch.autograd.grad(wanted, list(truth.values()), [w.double() for w in weights])
    names = [*(f"result {i}" for i in range(len(got))), *(f"gradient of {name}" for name in here)]
    pairs = zip(names, (*got, *gradients), (*wanted, *truths), strict=True)
    return {name: _relative(name, a.detach(), b.detach()) for name, a, b in pairs}


def _relative(name: str, got: Tensor, truth: Tensor) -> float:
    error = float((got.cpu().double() - truth).norm() / truth.norm())
    if not math.isfinite(error):
        raise ArithmeticError(f"{name} is not finite")
    return error


def _tuple(results: Results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def checks(grid: Grid, heads: int, channels: int) -> Iterator[Check]:
    """All seams, with grids whose edges are ragged."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    yield from _of_conv(randn, grid, heads, channels)
    yield from _of_norm(randn, grid, heads, channels)
    yield from _of_attention(randn, grid, heads, channels)
    yield from _of_scans(randn, prod(grid), heads, channels)


def _along(layer: int, grid: Grid, **others: Any) -> Fixed:
    """The scan order of a layer, and what else there is."""

    def fixed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        index: ScanIndex = scan_index(scan_order("rotary", layer), grid, (2, 2, 2), device)
        return {"index": index, **others}

    return fixed


def _of_conv(randn: Draw, grid: Grid, heads: int, channels: int) -> Iterator[Check]:
    tokens, inner, groups = prod(grid), heads * channels, 2 * channels
    reviews = prod(conv.review_grid(grid, (2, 2, 2)))
    for layer, sides in ((2, 1), (3, 2)):
        width = inner + groups
        yield Check(
            "conv",
            f"scan_conv, {sides} projections",
            conv.scan_conv,
            conv.scan_conv_ref,
            {
                "tokens": randn(BATCH, tokens, sides, width),
                "reviews": randn(BATCH, reviews, sides, width),
                "weight": randn(2 * width, 4) / 2,
                "bias": randn(2 * width),
            },
            fixed=_along(layer, grid, inner=inner),
        )
        yield Check(
            "conv",
            f"scan_steps, {sides} projections",
            conv.scan_steps,
            conv.scan_steps_ref,
            {
                "dt": randn(BATCH, tokens, sides, heads),
                "reviews_dt": randn(BATCH, reviews, sides, heads),
                "bias": randn(2 * heads),
            },
            fixed=_along(layer, grid),
        )
    yield Check(
        "conv",
        "review_tokens",
        conv.review_tokens,
        conv.review_tokens_ref,
        {"x": randn(BATCH, tokens, 1, inner)},
        fixed=lambda *_: {"grid": grid, "pool": (2, 2, 2)},
    )


def _of_norm(randn: Draw, grid: Grid, heads: int, channels: int) -> Iterator[Check]:
    tokens, inner = prod(grid), heads * channels
    length = tokens + prod(conv.review_grid(grid, (2, 2, 2)))
    y = randn(BATCH, length, 2 * heads, channels)
    along = _along(3, grid)
    for gates in (1, 2):
        yield Check(
            "norm",
            f"gated_norm, {gates} gates",
            norm.gated_norm,
            norm.gated_norm_ref,
            {"y": y, "z": randn(BATCH, tokens, gates * inner), "weight": randn(gates * inner)},
            fixed=_along(3, grid, eps=EPS),
        )
    yield Check("norm", "merge_directions", norm.merge_directions, norm.merge_directions_ref, {"y": y}, fixed=along)
    yield Check("norm", "split_directions", norm.split_directions, norm.split_directions_ref, {"y": y}, fixed=along)
    yield Check(
        "norm",
        "modulate",
        norm.modulate,
        norm.modulate_ref,
        {"x": randn(BATCH, tokens, inner), "shift": randn(BATCH, 1, inner), "scale": randn(BATCH, 1, inner)},
        fixed=lambda *_: {"eps": EPS},
    )
    yield Check(
        "norm",
        "norm_rotate",
        norm.norm_rotate,
        norm.norm_rotate_ref,
        {"qkv": randn(BATCH, tokens, 3, heads, channels), "scale": randn(2, 1, channels)},
        fixed=lambda device, dtype: {"table": _rounded_table(grid, channels, dtype, device), "eps": EPS},
    )


def _rounded_table(grid: Grid, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotations as the kernel gets them: the reference in fp64 takes the same, rounded to bf16."""
    cosines, sines = rotary_table(grid, channels, torch.bfloat16, device)
    return cosines.to(dtype), sines.to(dtype)


def _of_attention(randn: Draw, grid: Grid, heads: int, channels: int) -> Iterator[Check]:
    qkv = {name: randn(BATCH, prod(grid), heads, channels) for name in ("q", "k", "v")}
    yield Check("attention", "attention", attention.attention, attention.attention_ref, qkv)
    for shifted in (False, True):
        tiling = window.tile(grid, (2, 4, 4), shifted)
        yield Check(
            "window",
            f"window_attention{', shifted' if shifted else ''}",
            window.window_attention,
            window.window_attention_ref,
            qkv,
            fixed=lambda *_, tiling=tiling: {"tiling": tiling},
        )


def _of_scans(randn: Draw, length: int, heads: int, channels: int) -> Iterator[Check]:
    scanned = {
        "dt": F.softplus(randn(BATCH, length, 2 * heads) - 3),
        "A": -randn(2 * heads).exp(),
        "B": randn(BATCH, length, 2, channels),
        "C": randn(BATCH, length, 2, channels),
        "D": randn(2 * heads),
    }
    yield Check(
        "ssd",
        "ssd",
        ssd.ssd,
        ssd.ssd_ref,
        {"x": randn(BATCH, length, 2 * heads, channels)} | scanned,
        exact=("dt", "A", "D"),
        fixed=lambda *_: {"chunk_size": 64},
    )
    width, states = heads * channels, 16
    yield Check(
        "selective_scan",
        "selective_scan",
        selective_scan.selective_scan,
        selective_scan.selective_scan_ref,
        {
            "x": randn(BATCH, length, width),
            "dt": F.softplus(randn(BATCH, length, width) - 3),
            "A": -randn(width, states).exp(),
            "B": randn(BATCH, length, 2, states),
            "C": randn(BATCH, length, 2, states),
            "D": randn(width),
        },
        exact=("dt", "A", "D"),
    )
