"""The chunked scan against the recurrence that defines it, token by token in fp64.

Shapes: B batch, L tokens, H heads, P channels a head, G groups, N state channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lingen.kernels import ssd_torch
from lingen.kernels.ssd import ssd, ssd_flops, ssd_ref

Inputs = dict[str, Any]  # tensors by argument


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T``; ``y_t = S_t C_t + D x_t``."""
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, dim=2), C.repeat_interleave(repeat, dim=2)  # (B, L, H, N)
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if initial_states is None else initial_states
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(t.unbind(1) for t in (x, dt, B, C)), strict=True):
        decay = torch.exp(dt_t * A)[..., None, None]  # (B, H, 1, 1)
        write = (dt_t.unsqueeze(-1) * x_t).unsqueeze(-1) * B_t.unsqueeze(-2)  # (B, H, P, N)
        state = decay * state + write
        outputs.append((state * C_t.unsqueeze(-2)).sum(-1))
    y = torch.stack(outputs, dim=1)
    return y if D is None else y + x * D.view(D.shape[0], -1), state


def make(
    length: int, *, batch: int = 2, heads: int = 4, head_dim: int = 3, groups: int = 2, d_state: int = 5
) -> Inputs:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": torch.nn.functional.softplus(normal(batch, length, heads) - 1),
        "A": -torch.exp(normal(heads)),
        "B": normal(batch, length, groups, d_state),
        "C": normal(batch, length, groups, d_state),
        "D": normal(heads),
        "initial_states": normal(batch, heads, head_dim, d_state),
    }


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.detach().to(dtype) for name, t in inputs.items()}


def gradients(
    scan: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, **options: object
) -> tuple[Inputs, Tensor, Tensor]:
    """The gradients of a fixed random functional of y and of the final states; y; the states."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y, states = scan(**leaves, **options)
    generator = torch.Generator().manual_seed(0)
    wy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    ws = torch.randn(states.shape, generator=generator, dtype=torch.float64).to(states.dtype)
    values = torch.autograd.grad((y * wy).sum() + (states * ws).sum(), list(leaves.values()))
    return dict(zip(leaves, values, strict=True)), y.detach(), states.detach()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one or two chunks, so that short sequences cross several."""
    monkeypatch.setattr(ssd_torch, "BLOCK_ELEMENTS", 2 * 2 * 2 * 8 * 8)


LENGTHS = [1, 3, 8, 9, 16, 37, 64]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_recurrence_forward_and_backward(length: int, groups: int) -> None:
    inputs = make(length, groups=groups)
    want, want_y, want_states = gradients(recurrence, inputs)
    got, y, states = gradients(ssd_ref, inputs, chunk_size=8, return_final_states=True)
    torch.testing.assert_close(y, want_y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(states, want_states, rtol=1e-10, atol=1e-10)
    for name in inputs:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9, msg=f"the gradient of {name}")


def test_several_blocks_of_the_real_size() -> None:
    inputs = make(1100, batch=1, heads=8, head_dim=64, groups=2, d_state=16)
    shape = inputs["x"].shape
    assert len(ssd_torch._blocks(shape, 2, 64)) >= 3
    fp32 = cast(inputs, torch.float32)
    want_y, want_states = recurrence(**inputs)
    y, states = ssd_ref(**fp32, chunk_size=64, return_final_states=True)
    torch.testing.assert_close(y.double(), want_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states.double(), want_states, rtol=1e-4, atol=1e-4)


def test_gradients_in_fp32_are_close_to_fp64() -> None:
    inputs = make(200, heads=4, head_dim=32, d_state=16)
    want, _, _ = gradients(recurrence, inputs)
    got, _, _ = gradients(ssd_ref, cast(inputs, torch.float32), chunk_size=64, return_final_states=True)
    for name in inputs:
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error < 2e-5, f"d{name} is off by {error:.1e}"


def test_gradcheck() -> None:
    inputs = {
        name: t.requires_grad_() for name, t in make(7, batch=1, heads=2, head_dim=2, groups=1, d_state=2).items()
    }

    def scan(*args: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_ref(**dict(zip(inputs, args, strict=True)), chunk_size=3, return_final_states=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_without_skip_and_states_and_with_a_skip_per_channel() -> None:
    inputs = make(21)
    plain = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    torch.testing.assert_close(ssd_ref(**plain, chunk_size=8), recurrence(**plain)[0])
    per_channel = {**plain, "D": torch.arange(12.0, dtype=torch.float64).view(4, 3)}
    want, want_y, _ = gradients(recurrence, per_channel)
    got, y, _ = gradients(ssd_ref, per_channel, chunk_size=8, return_final_states=True)
    torch.testing.assert_close(y, want_y)
    for name in per_channel:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("cut", [1, 8, 13, 29])
def test_two_calls_that_carry_the_state_equal_one(cut: int) -> None:
    inputs = make(30)

    def in_two(**given: Tensor) -> tuple[Tensor, Tensor]:
        tokens = ("x", "dt", "B", "C")
        outputs, state = [], given["initial_states"]
        for piece in (slice(0, cut), slice(cut, None)):
            cut_inputs = {k: v[:, piece] if k in tokens else v for k, v in given.items()} | {"initial_states": state}
            y, state = ssd_ref(**cut_inputs, chunk_size=8, return_final_states=True)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    want, want_y, want_states = gradients(ssd_ref, inputs, chunk_size=8, return_final_states=True)
    got, y, states = gradients(in_two, inputs)
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(states, want_states)
    for name in inputs:
        torch.testing.assert_close(got[name], want[name])


def test_chunk_size_changes_the_cost_not_the_result() -> None:
    inputs = make(50)
    want = ssd_ref(**inputs, chunk_size=1)
    for chunk_size in (2, 7, 50, 64, 1000):
        torch.testing.assert_close(ssd_ref(**inputs, chunk_size=chunk_size), want)


@pytest.mark.parametrize("decay", [1e2, 1e4, 1e8])
def test_long_decay_neither_overflows_nor_forgets_the_last_token(decay: float) -> None:
    inputs = cast(make(40), torch.float32) | {"A": torch.full((4,), -decay)}
    got, y, states = gradients(ssd_ref, inputs, chunk_size=16, return_final_states=True)
    _, want_y, want_states = gradients(recurrence, {name: t.double() for name, t in inputs.items()})
    torch.testing.assert_close(y.double(), want_y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.double(), want_states, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in got.values())


def test_no_decay_keeps_a_sum() -> None:
    inputs = cast(make(300, groups=1, d_state=1), torch.float32)
    inputs |= {"A": torch.full((4,), -1e-12), "B": torch.ones_like(inputs["B"]), "C": torch.ones_like(inputs["C"])}
    inputs |= {"D": torch.zeros(4), "initial_states": torch.zeros_like(inputs["initial_states"])}
    want = (inputs["x"] * inputs["dt"].unsqueeze(-1)).double().cumsum(1)
    torch.testing.assert_close(ssd_ref(**inputs, chunk_size=64).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_fp32_states(dtype: torch.dtype) -> None:
    half = cast(make(300, head_dim=16, d_state=16), dtype)
    half |= {name: half[name].float() for name in ("dt", "A", "D", "initial_states")}
    want, want_y, want_states = gradients(recurrence, {name: t.double() for name, t in half.items()})
    got, y, states = gradients(ssd_ref, half, chunk_size=64, return_final_states=True)
    assert y.dtype == dtype and states.dtype == torch.float32
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), want_y, rtol=rounding, atol=1e-3)  # one rounding, at the end
    torch.testing.assert_close(states.double(), want_states, rtol=1e-4, atol=1e-4)
    for name in half:
        assert got[name].dtype == half[name].dtype
        assert (got[name].double() - want[name]).norm() / want[name].norm() < 2 * rounding, name


def test_autocast_does_not_touch_it() -> None:
    inputs = cast(make(40), torch.float32)
    want, want_y, _ = gradients(ssd_ref, inputs, chunk_size=16, return_final_states=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, y, _ = gradients(ssd_ref, inputs, chunk_size=16, return_final_states=True)
    assert torch.equal(y, want_y) and all(torch.equal(got[name], want[name]) for name in inputs)


def test_strided_inputs_and_activation_checkpointing_change_nothing() -> None:
    inputs = cast(make(40), torch.float32)
    want, want_y, _ = gradients(ssd_ref, inputs, chunk_size=16, return_final_states=True)

    def strided(**given: Any) -> tuple[Tensor, Tensor]:
        given["x"] = given["x"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        given["B"] = torch.cat((given["B"], given["C"]), dim=-1)[..., : given["B"].shape[-1]]
        scan = functools.partial(ssd_ref, **given, chunk_size=16, return_final_states=True)
        y, states = torch.utils.checkpoint.checkpoint(scan, use_reentrant=False)
        return y, states

    got, y, _ = gradients(strided, inputs)
    torch.testing.assert_close(y, want_y)
    for name in inputs:
        torch.testing.assert_close(got[name], want[name])


def test_deterministic() -> None:
    inputs = cast(make(300), torch.float32)
    first, y, _ = gradients(ssd_ref, inputs, chunk_size=64, return_final_states=True)
    again, y_again, _ = gradients(ssd_ref, inputs, chunk_size=64, return_final_states=True)
    assert torch.equal(y, y_again) and all(torch.equal(first[name], again[name]) for name in inputs)


def test_the_backward_keeps_little_besides_inputs_and_output() -> None:
    inputs = cast(make(4096, batch=1, heads=8, head_dim=32, d_state=16), torch.float32)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ssd_ref(**{name: t.requires_grad_() for name, t in inputs.items()}, chunk_size=64)
    assert sum(sizes) < 1.25 * sum(t.numel() for t in (*inputs.values(), inputs["x"]))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (8, 2)])
def test_flops_equal_torchs_counter(length: int, heads: int, groups: int) -> None:
    inputs = cast(make(length, batch=1, heads=heads, head_dim=32, groups=groups, d_state=16), torch.float32)
    with FlopCounterMode(display=False) as counter:
        ssd_ref(**inputs, chunk_size=64)
    assert ssd_flops(length, heads, 32, groups, 16, 64) == counter.get_total_flops()


def test_shapes_follow_on_the_meta_device() -> None:
    inputs = {name: t.to("meta") for name, t in make(50).items()}
    y, states = ssd_ref(**inputs, chunk_size=16, return_final_states=True)
    assert y.shape == (2, 50, 4, 3) and states.shape == (2, 4, 3, 5)


BAD: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("x", lambda t: t[0], r"x has shape \(10, 4, 3\); it must be \(B, L, H, P\)"),
    ("x", lambda t: t[:, :0], r"x has shape \(2, 0, 4, 3\).*at least 1"),
    ("x", lambda t: t.long(), "x .*int64.*floating point"),
    ("dt", lambda t: t[:, :9], r"dt has shape \(2, 9, 4\); it must be \(2, 10, 4\)"),
    ("A", lambda t: t[:3], r"A has shape \(3,\); it must be \(4,\)"),
    ("B", lambda t: t[:, :, :1].expand(2, 10, 3, 5), r"B has shape \(2, 10, 3, 5\); its G=3 must divide the H=4"),
    ("B", lambda t: t[:1], r"B has shape \(1, 10, 2, 5\); it must be \(2, 10, 2, 5\)"),
    ("C", lambda t: t[..., :4], r"C has shape \(2, 10, 2, 4\); it must be \(2, 10, 2, 5\)"),
    ("D", lambda t: t[:1], r"D has shape \(1,\); it must be \(4,\) or \(4, 3\)"),
    ("initial_states", lambda t: t.mT, r"initial_states has shape \(2, 4, 5, 3\); it must be \(2, 4, 3, 5\)"),
]


@pytest.mark.parametrize("scan", [ssd_ref, ssd])
@pytest.mark.parametrize(("name", "spoil", "message"), BAD)
def test_bad_arguments_are_named(
    scan: Callable[..., Tensor], name: str, spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    inputs = make(10)
    with pytest.raises(ValueError, match=message):
        scan(**inputs | {name: spoil(inputs[name])}, chunk_size=8)
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        scan(**inputs, chunk_size=0)


def test_ssd_is_the_reference_on_a_cpu() -> None:
    inputs = make(20)
    assert torch.equal(ssd(**inputs, chunk_size=8), ssd_ref(**inputs, chunk_size=8))
