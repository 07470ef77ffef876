"""Mamba's scan against the recurrence that defines it, token by token in fp64; and mamba-ssm's own reference.

Shapes: B batch, L tokens, E channels, G groups, S state channels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lingen.kernels import forms, selective_scan_torch
from lingen.kernels import selective_scan as seam
from lingen.kernels.selective_scan import selective_scan, selective_scan_flops, selective_scan_ref

Inputs = dict[str, Any]  # tensors by argument


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``; ``y_t = h_t C_t + D x_t``."""
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, dim=2), C.repeat_interleave(repeat, dim=2)  # (B, L, E, S)
    state, outputs = x.new_zeros(x.shape[0], *A.shape), []
    for x_t, dt_t, B_t, C_t in zip(*(t.unbind(1) for t in (x, dt, B, C)), strict=True):
        state = torch.exp(dt_t.unsqueeze(-1) * A) * state + (dt_t * x_t).unsqueeze(-1) * B_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs, dim=1)
    return y if D is None else y + x * D


def make(length: int, *, batch: int = 2, channels: int = 6, groups: int = 2, d_state: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, length, channels),
        "dt": F.softplus(normal(batch, length, channels) - 1),
        "A": -torch.exp(normal(channels, d_state)),
        "B": normal(batch, length, groups, d_state),
        "C": normal(batch, length, groups, d_state),
        "D": normal(channels),
    }


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.detach().to(dtype) for name, t in inputs.items()}


def gradients(scan: Callable[..., Tensor], inputs: Inputs) -> tuple[Inputs, Tensor]:
    """The gradients of a fixed random functional of y; y."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y = scan(**leaves)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), weight), strict=True)), y.detach()


@pytest.fixture(params=[1, 40, 1000])
def block_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of one token, of two chunks and some, and of all."""
    monkeypatch.setitem(selective_scan_torch.BLOCK_ELEMENTS, "cpu", request.param * 2 * 6 * 3)
    return int(request.param)


@pytest.mark.usefixtures("block_tokens")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 75])
def test_equals_the_recurrence_forward_and_backward(length: int, groups: int) -> None:
    inputs = make(length, groups=groups)
    want, want_y = gradients(recurrence, inputs)
    got, y = gradients(selective_scan_ref, inputs)
    torch.testing.assert_close(y, want_y, rtol=1e-10, atol=1e-10)
    for name in inputs:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9, msg=f"the gradient of {name}")


def test_without_a_skip_and_from_strided_views() -> None:
    inputs = make(33)
    inputs.pop("D")
    want, want_y = gradients(recurrence, inputs)

    def strided(**given: Tensor) -> Tensor:
        given["x"] = given["x"].mT.contiguous().mT
        given["B"] = torch.cat((given["B"], given["C"]), dim=-1)[..., : given["B"].shape[-1]]
        return selective_scan(**given)

    got, y = gradients(strided, inputs)
    torch.testing.assert_close(y, want_y)
    for name in inputs:
        torch.testing.assert_close(got[name], want[name])


def test_fp32_and_bf16_are_close_to_fp64() -> None:
    inputs = make(300, channels=32, d_state=16)
    want, want_y = gradients(recurrence, inputs)
    got, y = gradients(selective_scan_ref, cast(inputs, torch.float32))
    for name, value, exact in (("y", y, want_y), *((name, got[name], want[name]) for name in inputs)):
        error = (value.double() - exact).norm() / exact.norm()
        assert error < 2e-6, f"{name} is off by {error:.1e}"
    y = selective_scan_ref(**cast(inputs, torch.bfloat16))
    assert y.dtype == torch.bfloat16
    exact = recurrence(**cast(cast(inputs, torch.bfloat16), torch.float64))
    assert (y.double() - exact).norm() / exact.norm() < 4e-3


def test_large_steps_forget_without_overflow() -> None:
    inputs = cast(make(100), torch.float32)
    inputs["dt"] = inputs["dt"] * 1e4
    got, y = gradients(selective_scan_ref, inputs)
    assert y.isfinite().all() and all(t.isfinite().all() for t in got.values())


def test_nan_in_gives_nan_out() -> None:
    inputs = make(40)
    inputs["x"][0, 20, 1] = torch.nan
    y = selective_scan(**inputs)
    assert y[0, 20:, 1].isnan().all() and y[0, :20].isfinite().all() and y[1].isfinite().all()


def test_the_backward_keeps_little_besides_inputs() -> None:
    inputs = cast(make(4096, batch=1, channels=64, d_state=8), torch.float32)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan_ref(**{name: t.requires_grad_() for name, t in inputs.items()})
    assert sum(sizes) < 2.1 * sum(t.numel() for t in inputs.values())  # the states would be 8 times x


@pytest.mark.parametrize("length", [1, 16, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_flops_equal_torchs_counter(length: int, groups: int) -> None:
    inputs = make(length, batch=1, channels=8, groups=groups)
    with FlopCounterMode(display=False) as counter:
        selective_scan_ref(**inputs)
    assert selective_scan_flops(length, 8, 3) == counter.get_total_flops()


def test_shapes_follow_on_the_meta_device() -> None:
    inputs = {name: t.to("meta") for name, t in make(50).items()}
    assert selective_scan_ref(**inputs).shape == (2, 50, 6)


BAD: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("x", lambda t: t[0], r"x has shape \(10, 6\); it must be \(B, L, E\)"),
    ("x", lambda t: t[:, :0], r"x has shape \(2, 0, 6\).*at least 1"),
    ("x", lambda t: t.long(), "x .*int64.*floating point"),
    ("dt", lambda t: t[:, :9], r"dt has shape \(2, 9, 6\); it must be \(2, 10, 6\)"),
    ("A", lambda t: t[:3], r"A has shape \(3, 3\); it must be \(6, 3\)"),
    ("B", lambda t: t[:, :, :1].expand(2, 10, 4, 3), r"B has shape \(2, 10, 4, 3\); its G=4 must divide the E=6"),
    ("C", lambda t: t[..., :2], r"C has shape \(2, 10, 2, 2\); it must be \(2, 10, 2, 3\)"),
    ("D", lambda t: t[:1], r"D has shape \(1,\); it must be \(6,\)"),
]


@pytest.mark.parametrize("scan", [selective_scan_ref, selective_scan])
@pytest.mark.parametrize(("name", "spoil", "message"), BAD)
def test_bad_arguments_are_named(
    scan: Callable[..., Tensor], name: str, spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    inputs = make(10)
    with pytest.raises(ValueError, match=message):
        scan(**inputs | {name: spoil(inputs[name])})


@pytest.mark.parametrize("limit", [10**9, 2 * 6 * 20 - 1, 3 * 20, 2 * 20])
def test_pieces_for_mamba_ssm_stay_below_the_limit(limit: int) -> None:
    """Against a stand-in with the layout and the demands of mamba-ssm's CUDA kernel, which no CPU can run."""
    inputs = make(20, d_state=2)
    launches = 0

    def kernel(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
        nonlocal launches
        launches += 1
        assert max(t.numel() for t in (u, delta, B, C)) <= limit
        assert all(t.is_contiguous() for t in (u, delta, B, C)) and u.dtype == delta.dtype == B.dtype == C.dtype
        assert A.dtype == torch.float32 and u.shape == delta.shape and u.shape[1:2] == A.shape[:1]
        channels_last = (u.mT, delta.mT, A.double(), B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2))
        return recurrence(*channels_last, None if D is None else D.double()).mT.contiguous()

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        y: Tensor = seam._scan_in_pieces(kernel, x, dt, A, B, C, D, limit)
        assert y.is_contiguous()
        return y

    want, want_y = gradients(recurrence, inputs)
    got, y = gradients(scan, inputs)
    assert launches == {10**9: 1, 239: 4, 60: 4, 40: 8}[limit]
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)  # A and D are rounded to fp32
    for name in inputs:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5, msg=f"the gradient of {name}")


@pytest.mark.parametrize("extension", [True, False])
def test_mamba_ssm_is_chosen_where_its_extension_is_installed(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"mamba_ssm", "triton"} | ({"selective_scan_cuda"} if extension else set())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)
    for device, form in (("cuda", "mamba-ssm" if extension else "torch"), ("cpu", "torch")):
        forms._choose.cache_clear()
        assert forms.chosen("selective_scan", torch.device(device)) == form
    problem = forms.missing("selective_scan", "mamba-ssm", torch.device("cpu"))
    assert problem == (
        "it needs a GPU, and the device is cpu" if extension else "the package selective_scan_cuda is not installed"
    )
    forms._choose.cache_clear()


def test_pieces_at_68_s_and_guidance_cover_each_channel_once_and_stay_below_the_limit() -> None:
    batch, channels, length = 2, 8192, 274_176
    pieces = list(seam._pieces(torch.Size((batch, channels, length)), 2, seam.MAX_ELEMENTS))
    assert len(pieces) == 4 and all((es.stop - es.start) * length <= seam.MAX_ELEMENTS for _, _, es in pieces)
    covered = [(b, e) for b, g, es in pieces for e in range(es.start, es.stop) if e * 2 // channels == g]
    assert sorted(covered) == [(b, e) for b in range(batch) for e in range(channels)]
