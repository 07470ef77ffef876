"""The norms' kernels compile for an H100: in bf16 at widths of the 4B model, and in fp32 at odd ones.

Shapes: B batch, N tokens, R reviews, h heads of P channels, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

CODE = """
from lingen.kernels.index import ScanIndex
from lingen.kernels.norm_gated_triton import gated_norm_triton, merge_directions_triton, split_directions_triton
from lingen.kernels.norm_modulate_triton import modulate_triton
from lingen.kernels.norm_rotate_triton import norm_rotate_triton

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.{dtype}, requires_grad=True)

B, N, R, h, P = {shape}
index = ScanIndex(torch.arange(R + N).int(), torch.arange(R + N).int(), R)
for d in (1, 2):
    out = gated_norm_triton(zeros(B, R + N, 2 * h, P), zeros(B, N, d * h * P), zeros(d * h * P), index, 1e-6)
    out.sum().backward()
for unscan in (merge_directions_triton, split_directions_triton):
    unscan(zeros(B, R + N, 2 * h, P), index).sum().backward()
modulate_triton(zeros(B, N, h * P), zeros(B, 1, h * P), zeros(B, 1, h * P), 1e-6).sum().backward()
table = torch.zeros(N, 1, 1, P), torch.zeros(N, 1, 1, P)
norm_rotate_triton(zeros(B, N, 3, h, P), zeros(2, 1, P), table, 1e-6)[0].sum().backward()
"""
KERNELS = {
    "_gated_forward", "_gated_backward", "_unscan_forward", "_unscan_backward",
    "_modulate_forward", "_modulate_backward", "_rotate_forward", "_rotate_backward",
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "shape"), [("bfloat16", (2, 40, 5, 64, 64)), ("float32", (1, 1, 0, 1, 6))])
def test_every_kernel_compiles(compiled: Callable[[str], list[str]], dtype: str, shape: tuple[int, ...]) -> None:
    """One token, head and sample too: Triton makes constants of arguments that are 1."""
    assert set(compiled(CODE.format(dtype=dtype, shape=shape))) == KERNELS
