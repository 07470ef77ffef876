"""The convolution's seam with input that is bad, or not a number: both forms say the same.

Shapes: B = 1, N = 24 tokens, R = 4 reviews, d = 1, C = 26 channels, k = 4 taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lingen.kernels import conv, forms
from lingen.kernels.conv import review_tokens, scan_conv, scan_steps
from lingen.kernels.index import ScanIndex

ROWS = torch.cat((torch.arange(4).flip(0), 4 + torch.arange(24).flip(0))).int()  # its own inverse
INDEX = ScanIndex(ROWS, ROWS, 4)


@pytest.fixture(params=["torch", "triton"])
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is for Linux")
    forms.ask({"conv": request.param}, torch.device("cpu"))
    yield
    forms.ask({}, torch.device("cpu"))


def good_input() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, reviews, weight, bias."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, 24, 1, 26), (1, 4, 1, 26), (52, 4), (52,))
    return tuple(torch.randn(shape, generator=draw) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("at", range(4))
def test_nan_in_gives_nan_out(at: int, form: None) -> None:
    """Everywhere that depends on it, and nowhere else."""
    inputs = good_input()
    inputs[at].view(-1)[0] = torch.nan
    tokens, reviews, _, bias = inputs
    out = scan_conv(*(t.requires_grad_() for t in inputs), INDEX, inner=20)
    row, channel = out[0].isnan().any(1), out[0].isnan().any(0)
    # Token 0 is read last forwards and first backwards, review 0 likewise; either is seen by four positions.
    expected = {0: [4, 5, 6, 7, 27], 1: [0, 1, 2, 3, 4, 5, 6], 2: [*range(28)], 3: [*range(28)]}[at]
    assert row.nonzero().flatten().tolist() == expected
    assert channel.nonzero().flatten().tolist() == ([0, 20] if at < 2 else [0])
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert gradients[at].isnan().any() and gradients[2].isnan().any() and gradients[3].isnan().any()
    if at != 2:
        assert scan_steps(tokens, reviews, bias, INDEX).isnan().any()
    if at == 0:
        assert review_tokens(tokens, (2, 3, 4), (2, 2, 2)).isnan().sum() == 1


BAD_CONV = {
    "tokens has shape (1, 24, 26); it must be (B, N, d, C)": {"tokens": torch.ones(1, 24, 26)},
    "tokens has shape (0, 24, 1, 26)": {"tokens": torch.ones(0, 24, 1, 26)},
    "tokens has shape (1, 0, 1, 26)": {"tokens": torch.ones(1, 0, 1, 26)},
    "tokens has shape (1, 24, 3, 26)": {"tokens": torch.ones(1, 24, 3, 26)},
    "tokens (1, 24, 1, 26) has dtype torch.int64": {"tokens": torch.ones(1, 24, 1, 26).long(), "reviews": None},
    "tokens (1, 24, 1, 26) has strides (624, 1, 24, 24); the last must be 1": {
        "tokens": torch.ones(1, 26, 1, 24).transpose(1, 3)
    },
    "as many tokens as tokens (1, 23, 1, 26)": {"tokens": torch.ones(1, 23, 1, 26)},
    "reviews has shape (1, 4, 2, 26); it must be (1, 4, 1, 26)": {"reviews": torch.ones(1, 4, 2, 26)},
    "reviews (1, 4, 1, 26) is torch.float64 on cpu; it must be as tokens is": {
        "reviews": torch.ones(1, 4, 1, 26).double()
    },
    "reviews (1, 4, 1, 26) has strides": {"reviews": torch.ones(1, 26, 1, 4).transpose(1, 3)},
    "weight has shape (26, 4); it must be (2C=52, k)": {"weight": torch.ones(26, 4)},
    "weight has shape (52, 0)": {"weight": torch.ones(52, 0)},
    "weight (52, 4) has dtype torch.int32": {"weight": torch.ones(52, 4).int()},
    "weight (52, 4) is on meta; it must be on cpu": {"weight": torch.ones(52, 4, device="meta")},
    "bias has shape (26,); it must be (52,)": {"bias": torch.ones(26)},
    "inner=27 must be 1 to C=26": {"inner": 27},
    "inner=0 must be 1 to C=26": {"inner": 0},
}
BAD_INDEX = {
    "index.source (28,) is torch.int64": replace(INDEX, source=INDEX.source.long()),
    "index.place (28,) is torch.int32 on cpu with strides (2,)": replace(INDEX, place=INDEX.place.repeat(2)[::2]),
    "index.place (28,) is torch.int32 on meta": replace(INDEX, place=INDEX.place.to("meta")),
    "(28,) and (27,) rows, 4 of them reviews": replace(INDEX, place=INDEX.place[:-1]),
    "has shape (1, 4, 1, 26); it must be (1, 3, 1, 26)": replace(
        INDEX, reviews=3, source=INDEX.source[:-1], place=INDEX.place[:-1]
    ),
}


@pytest.mark.parametrize("call", ["", "_ref"])
@pytest.mark.parametrize(("message", "changes"), BAD_CONV.items())
def test_bad_input_is_named(message: str, changes: dict[str, object], call: str, form: None) -> None:
    tokens, reviews, weight, bias = good_input()
    given = {"tokens": tokens, "reviews": reviews, "weight": weight, "bias": bias, "inner": 20, "index": INDEX}
    given |= changes
    if given["reviews"] is None:
        given["reviews"] = reviews.to(given["tokens"].dtype)  # type: ignore[attr-defined]
    with pytest.raises(ValueError) as error:
        getattr(conv, "scan_conv" + call)(**given)
    assert message in str(error.value)


@pytest.mark.parametrize(("message", "index"), BAD_INDEX.items())
def test_a_bad_index_is_named(message: str, index: ScanIndex, form: None) -> None:
    tokens, reviews, weight, bias = good_input()
    for call in (
        lambda: scan_conv(tokens, reviews, weight, bias, index, inner=20),
        lambda: scan_steps(tokens, reviews, bias, index),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


def test_bad_steps_are_named(form: None) -> None:
    dt, reviews = torch.ones(1, 24, 1, 26), torch.ones(1, 4, 1, 26)
    for given, message in (
        ((dt[:, 0], reviews, torch.ones(52)), "dt has shape (1, 1, 26); it must be (B, N, d, C)"),
        ((dt, reviews[:, :3], torch.ones(52)), "reviews_dt has shape (1, 3, 1, 26); it must be (1, 4, 1, 26)"),
        ((dt, reviews, torch.ones(26)), "bias has shape (26,); it must be (52,)"),
    ):
        with pytest.raises(ValueError) as error:
            scan_steps(*given, INDEX)
        assert message in str(error.value)


def test_bad_reviews_are_named(form: None) -> None:
    x = torch.ones(1, 24, 5)
    for given, message in (
        ((x, (2, 3, 5), (1, 1, 1)), "x has shape (1, 24, 5); it must be (B, N, ...), each at least 1, with the N=30"),
        ((x[..., 0], (2, 3, 4), (1, 1, 1)), "x has shape (1, 24)"),
        ((x[:0], (2, 3, 4), (1, 1, 1)), "x has shape (0, 24, 5)"),
        ((x.mT.contiguous().mT, (2, 3, 4), (1, 1, 1)), "x (1, 24, 5) has strides (120, 1, 24); the last must be 1"),
        ((x.int(), (2, 3, 4), (1, 1, 1)), "x (1, 24, 5) has dtype torch.int32"),
        ((x, (2, 3, 4), (1, 0, 1)), "pool=(1, 0, 1) must be three sides (T, H, W), each at least 1"),
        ((x, (2, -3, -4), (1, 1, 1)), "grid=(2, -3, -4) must be three sides"),
    ):
        with pytest.raises(ValueError) as error:
            review_tokens(*given)
        assert message in str(error.value)
