"""Full attention: ``_ref`` against fp64 written out, the libraries' forms against it, and who is chosen when.

Shapes: B batch, N tokens, h heads of P channels.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lingen.kernels import attention as seam
from lingen.kernels import forms
from lingen.kernels.attention import attend_in_pieces, attention, attention_ref
from lingen.kernels.layout import last_offset

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BATCH, TOKENS, HEADS, P = 2, 37, 3, 16
LIMIT = 2**31 - 1


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    forms.ask({}, CPU)


def inputs(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> Tensor:
    """qkv (B, N, 3, h, P), with scores that tell tokens apart."""
    shape, generator = (BATCH, tokens, 3, HEADS, P), torch.Generator().manual_seed(0)
    return (1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax by its definition, one head and sample at a time."""
    out = torch.empty_like(q)
    for sample in range(q.shape[0]):
        for head in range(q.shape[2]):
            scores = torch.exp(q[sample, :, head] @ k[sample, :, head].T / math.sqrt(q.shape[3]))
            out[sample, :, head] = scores / scores.sum(1, keepdim=True) @ v[sample, :, head]
    return out


def gradient_of(out: Tensor, qkv: Tensor) -> Tensor:
    """Of a fixed random functional of ``out``."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weights.to(out.dtype)).sum(), qkv)[0]


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("block", [seam.BLOCK_SCORES, 5 * BATCH * HEADS * TOKENS, 1])
def test_ref_equals_the_definition_however_many_queries_go_at_a_time(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "BLOCK_SCORES", block)
    qkv = inputs().requires_grad_()
    got, want = attention_ref(*qkv.unbind(2)), naive(*qkv.unbind(2))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient_of(got, qkv), gradient_of(want, qkv))


def test_ref_computes_in_fp32_what_comes_in_bf16() -> None:
    qkv = inputs(torch.bfloat16)
    got = attention_ref(*qkv.unbind(2))
    assert torch.equal(got, attention_ref(*qkv.float().unbind(2)).bfloat16())
    torch.testing.assert_close(got.double(), naive(*qkv.double().unbind(2)), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
@pytest.mark.parametrize("form", ["sdpa", "torch"])
def test_every_form_of_a_cpu_equals_the_definition(form: str, tokens: int) -> None:
    forms.ask({"attention": form}, CPU)
    exact, rough = inputs(tokens=tokens).requires_grad_(), inputs(torch.float32, tokens).requires_grad_()
    got, want = attention(*rough.unbind(2)), naive(*exact.unbind(2))
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradient_of(got, rough).double(), gradient_of(want, exact), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["sdpa", "torch"])
def test_flops_of_both_products_are_counted(form: str) -> None:
    forms.ask({"attention": form}, CPU)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attention(*inputs().unbind(2))
    assert counter.get_total_flops() == BATCH * 4 * TOKENS**2 * HEADS * P


@pytest.mark.parametrize("tokens", [5, TOKENS])  # fewer than a vector register holds, and more
@pytest.mark.parametrize("form", ["sdpa", "torch"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_in_gives_nan_out(form: str, tokens: int, part: int) -> None:
    forms.ask({"attention": form}, CPU)
    qkv = inputs(torch.float32, tokens)
    qkv[0, 3, part, 1, 2] = math.nan
    out = attention(*qkv.unbind(2)).isnan()
    assert out[0, :, 1].any(-1).tolist() == [part > 0 or row == 3 for row in range(tokens)]
    assert not out[1].any() and not out[:, :, [0, 2]].any()


# ---------------------------------------------------------------------------------------------------- libraries


def test_a_pinned_backend_runs_or_fails() -> None:
    """A CPU has flash attention of its own, and no cuDNN: that is an error, and nobody stands in for it."""
    q, k, v = inputs(torch.float32).unbind(2)
    torch.testing.assert_close(seam._LIBRARIES["flash"](q, k, v), attention_ref(q, k, v), rtol=2e-5, atol=2e-6)
    with pytest.raises(RuntimeError, match=r"No available kernel|No viable backend"):
        seam._LIBRARIES["cudnn"](q, k, v)


@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("with_sums", [False, True])
def test_flash_attention_gets_tokens_before_heads(
    package: str, with_sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        assert q.shape == (BATCH, TOKENS, HEADS, P)
        return (naive(q, k, v), q) if with_sums else naive(q, k, v)

    module = ModuleType(package)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module if name == package else None)
    q, k, v = inputs().unbind(2)
    torch.testing.assert_close(seam._LIBRARIES["flash-attn"](q, k, v), attention_ref(q, k, v))


class Watched(torch.autograd.Function):
    """Attention that notes how far the offsets of what it gets reach, forward and backward."""

    reached: list[int]

    @staticmethod
    def forward(ctx: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        Watched.reached += [last_offset(x.shape, x.stride()) for x in (q, k, v)]
        with torch.enable_grad():
            ctx.given = [x.detach().requires_grad_() for x in (q, k, v)]  # type: ignore[attr-defined]
            ctx.out = attention_ref(*ctx.given)  # type: ignore[attr-defined]
        return ctx.out.detach()  # type: ignore[attr-defined,no-any-return]

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        Watched.reached.append(last_offset(gradient.shape, gradient.stride()))
        return torch.autograd.grad(ctx.out, ctx.given, gradient)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("limit", "calls"),
    [
        (LIMIT, 1),
        (TOKENS * 3 * HEADS * P, 2),  # a sample of the whole qkv
        (TOKENS * 2 * P, 4),  # two heads and one
        (TOKENS * P - 1, 6),  # nothing is smaller than a head
    ],
)
def test_pieces_equal_the_whole(limit: int, calls: int) -> None:
    Watched.reached = []
    qkv = inputs().requires_grad_()
    got, want = attend_in_pieces(Watched.apply, *qkv.unbind(2), limit), attention_ref(*qkv.unbind(2))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient_of(got, qkv), gradient_of(want, qkv))
    assert len(Watched.reached) == 4 * calls and max(Watched.reached) <= limit


@pytest.mark.parametrize(
    ("tokens", "batch", "calls"),
    [
        (60_928, 2, 1),  # 17 s of 512x896, guided
        (243_712, 1, 1),  # 68 s
        (243_712, 2, 2),
        (400_000, 1, 1),  # beyond the published ladder: qkv passes the limit, copies of q, k and v do not
        (2_000_000, 1, 2),
    ],
)
def test_no_call_at_the_4b_width_passes_32_bits(tokens: int, batch: int, calls: int) -> None:
    given = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given.append(max(last_offset(x.shape, x.stride()) for x in (q, k, v)))
        return torch.empty_like(q)

    qkv = torch.empty(batch, tokens, 3, 32, 64, dtype=torch.bfloat16, device="meta")
    assert attend_in_pieces(attend, *qkv.unbind(2), seam.MAX_ELEMENTS).shape == (batch, tokens, 32, 64)
    assert len(given) == calls and max(given) <= LIMIT


# ---------------------------------------------------------------------------------------------------- choice


def machine(monkeypatch: pytest.MonkeyPatch, *packages: str, major: int = 9) -> None:
    """As if there were a GPU and these packages."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    forms._choose.cache_clear()


def test_a_gpu_takes_cudnn_where_the_precision_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "flash_attn")
    assert forms.chosen("attention", GPU, torch.bfloat16) == forms.chosen("attention", GPU, torch.float16) == "cudnn"
    assert forms.chosen("attention", GPU, torch.float32) == "sdpa"
    assert "attention sdpa" in forms.describe(GPU, torch.float32)
    machine(monkeypatch, major=7)
    assert forms.chosen("attention", GPU, torch.bfloat16) == "sdpa"


def test_hoppers_own_package_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "flash_attn", "flash_attn_interface")
    assert forms.flash_attn_module() == "flash_attn_interface"
    machine(monkeypatch, "flash_attn")
    assert forms.flash_attn_module() == "flash_attn"


@pytest.mark.parametrize(
    ("form", "dtype", "major", "words"),
    [
        ("flash-attn", None, 9, "the package flash_attn is not installed"),
        ("cudnn", torch.float32, 9, "it computes in bf16 and fp16, and the run in torch.float32"),
        ("flash", torch.bfloat16, 7, "it needs a GPU of compute capability 8.0 or later"),
    ],
)
def test_what_cannot_run_on_a_gpu_is_an_error(
    form: str, dtype: torch.dtype | None, major: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, major=major)
    with pytest.raises(ValueError, match=f"kernels.attention={form} cannot run here: {words}"):
        forms.ask({"attention": form}, GPU, dtype)


def test_a_form_is_refused_to_a_call_in_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    forms.ask({"attention": "cudnn"}, GPU)
    assert forms.chosen("attention", GPU, torch.bfloat16) == "cudnn"
    with pytest.raises(ValueError, match=r"kernels.attention=cudnn cannot run here: .* torch.float32"):
        forms.chosen("attention", GPU, torch.float32)


@pytest.mark.parametrize("form", ["flash-attn", "cudnn", "flash"])
def test_a_cpu_has_none_of_the_gpus_forms(form: str) -> None:
    assert forms.chosen("attention", CPU, torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match=f"kernels.attention={form} cannot run here: .*; set kernels.attention=auto"):
        forms.ask({"attention": form}, CPU)


# ---------------------------------------------------------------------------------------------------- bad input


def bad_inputs() -> dict[str, tuple[list[Tensor], str]]:
    q, k, v = inputs(torch.float32, tokens=6).unbind(2)
    return {
        "axes": ([q[0], k, v], r"q has shape \(6, 3, 16\); it must be \(B, N, h, P\)"),
        "empty": ([q[:, :0], k[:, :0], v[:, :0]], r"q has shape \(2, 0, 3, 16\); it must be .*each at least 1"),
        "tokens": ([q, k[:, :5], v], r"k is \(2, 5, 3, 16\) .*; it must be as q is, \(2, 6, 3, 16\)"),
        "precision": ([q, k, v.double()], r"v is .*torch.float64.*as q is.*torch.float32"),
        "device": ([q, k, v.to("meta")], r"v is .* on meta; it must be as q is.* on cpu"),
        "integers": ([q.int(), k.int(), v.int()], r"q .* has dtype torch.int32; it must be floating point"),
        "strides": ([q.mT.contiguous().mT, k, v], r"q .* has strides \(288, 48, 1, 3\); the last must be 1"),
    }


@pytest.mark.parametrize("name", list(bad_inputs()))
def test_bad_input_is_named(name: str) -> None:
    given, words = bad_inputs()[name]
    with pytest.raises(ValueError, match=words):
        attention(*given)
