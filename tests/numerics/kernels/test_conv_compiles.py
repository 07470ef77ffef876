"""The convolution's kernels compile for an H100: in bf16 at widths of the 4B model, and in other types at odd ones.

Shapes: B batch, N tokens, R reviews, d projections of E + G channels, k taps, h heads.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

CODE = """
from lingen.kernels.conv_triton import scan_conv_triton
from lingen.kernels.conv_triton_steps import scan_steps_triton
from lingen.kernels.index import ScanIndex
from lingen.kernels.review_triton import review_tokens_triton

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.{dtype}, requires_grad=True)

B, N, R, E, G, k, h = {shape}
index = ScanIndex(torch.arange(R + N).int(), torch.arange(R + N).int(), R)
for d in (1, 2):
    tokens, reviews = zeros(B, N, d, E + G + h), zeros(B, R, d, E + G + h)
    weight, bias = zeros(2 * (E + G), k), zeros(2 * (E + G))
    scan_conv_triton(tokens[..., :-h], reviews[..., :-h], weight, bias, index, E).sum().backward()
    scan_steps_triton(tokens[..., -h:], reviews[..., -h:], zeros(2 * h), index).sum().backward()
    review_tokens_triton(tokens[..., :-h], (1, 1, N), (2, 2, 2)).sum().backward()
"""
KERNELS = ["_forward", "_before_gradient", "_input_gradient", "_forward", "_backward", "_pool", "_spread"]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("bfloat16", (2, 40, 5, 4096, 128, 4, 64)),
        ("bfloat16", (1, 1, 1, 48, 32, 2, 8)),
        ("float32", (1, 34, 0, 17, 0, 3, 5)),
    ],
)
def test_every_kernel_compiles(compiled: Callable[[str], list[str]], dtype: str, shape: tuple[int, ...]) -> None:
    """One token, review, sample or head too: Triton makes constants of arguments that are 1."""
    assert compiled(CODE.format(dtype=dtype, shape=shape)) == 2 * KERNELS
