"""What the norms' seam does not take: an error that names the argument, what it is and what it must be.

Shapes: B batch, N tokens, R reviews, M = R + N, h heads of P channels, E = h*P, d gates, D d_model.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lingen.kernels import norm
from lingen.kernels.index import ScanIndex

INDEX = ScanIndex(torch.arange(22).int(), torch.arange(22).int(), 3)
Y, Z, WEIGHT = torch.zeros(2, 22, 4, 6), torch.zeros(2, 19, 12), torch.zeros(12)
X, SHIFT = torch.zeros(2, 5, 8), torch.zeros(2, 1, 8)
QKV, SCALE, TABLE = torch.zeros(2, 5, 3, 2, 4), torch.zeros(2, 1, 4), torch.zeros(5, 1, 1, 4)


def gate(y: Tensor = Y, z: Tensor = Z, weight: Tensor = WEIGHT, index: ScanIndex = INDEX) -> None:
    norm.gated_norm(y, z, weight, index, eps=1e-6)


def adaln(x: Tensor = X, shift: Tensor = SHIFT, scale: Tensor = SHIFT) -> None:
    norm.modulate(x, shift, scale, eps=1e-6)


def turn(qkv: Tensor = QKV, scale: Tensor = SCALE, table: norm.Rotation = (TABLE, TABLE)) -> None:
    norm.norm_rotate(qkv, scale, table, eps=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gate(y=Y[0]), "y has shape (22, 4, 6); it must be (B, M, 2h, P), each at least 1"),
        (lambda: gate(y=Y[:0]), "y has shape (0, 22, 4, 6); it must be (B, M, 2h, P), each at least 1"),
        (lambda: gate(y=Y[:, 1:]), "y has shape (2, 21, 4, 6); it must be (B, M, 2h, P): an even number of heads"),
        (lambda: gate(y=Y[:, :, 1:]), "y has shape (2, 22, 3, 6); it must be (B, M, 2h, P): an even number of heads"),
        (lambda: gate(y=Y.int()), "y (2, 22, 4, 6) has dtype torch.int32; it must be floating point"),
        (lambda: gate(y=Y.repeat(1, 1, 2, 1)[:, :, ::2]), "the heads of a position must be contiguous"),
        (lambda: gate(y=Y.mT.contiguous().mT), "y (2, 22, 4, 6) has strides (528, 24, 1, 4); the last must be 1"),
        (lambda: gate(z=Z[:, 1:]), "z has shape (2, 18, 12); it must be (B, N, d*E), d = 1 or 2, = (2, 19, 12)"),
        (lambda: gate(z=Z[..., 1:]), "z has shape (2, 19, 11); it must be (B, N, d*E), d = 1 or 2, = (2, 19, 12)"),
        (lambda: gate(z=Z.mT.contiguous().mT), "z (2, 19, 12) has strides (228, 1, 19); the last must be 1"),
        (lambda: gate(z=Z.repeat(1, 1, 2)), "weight has shape (12,); it must be (d*E,) = (24,)"),
        (lambda: gate(weight=WEIGHT.to("meta")), "weight (12,) is on meta; it must be on cpu"),
        (lambda: gate(index=ScanIndex(INDEX.source, INDEX.place, 22)), "N at least 1"),
        (
            lambda: gate(index=ScanIndex(INDEX.source.long(), INDEX.place, 3)),
            "index.source is (22,) torch.int64 on cpu; it must be (M,) = (22,) torch.int32 on cpu",
        ),
        (lambda: norm.merge_directions(Y[:, 1:], INDEX), "y has shape (2, 21, 4, 6)"),
        (lambda: norm.split_directions(Y[:, 1:], INDEX), "y has shape (2, 21, 4, 6)"),
        (lambda: adaln(x=X[:, :0]), "x has shape (2, 0, 8); it must be (B, N, D), each at least 1"),
        (lambda: adaln(x=X[..., ::2]), "x (2, 5, 4) has strides (40, 8, 2); the last must be 1"),
        (lambda: adaln(shift=X), "shift has shape (2, 5, 8); it must be (B, 1, D) = (2, 1, 8)"),
        (lambda: adaln(scale=SHIFT[:1]), "scale has shape (1, 1, 8); it must be (B, 1, D) = (2, 1, 8)"),
        (lambda: adaln(scale=SHIFT.long()), "scale (2, 1, 8) has dtype torch.int64; it must be floating point"),
        (lambda: turn(qkv=QKV[:, :, :2]), "qkv has shape (2, 5, 2, 2, 4); it must be (B, N, 3, h, P), each at least 1"),
        (lambda: turn(qkv=QKV[..., :3]), "qkv has shape (2, 5, 3, 2, 3); it must be (B, N, 3, h, P), each at least 1"),
        (lambda: turn(scale=SCALE[:1]), "scale has shape (1, 1, 4); it must be (2, 1, P) = (2, 1, 4)"),
        (lambda: turn(table=(TABLE, TABLE[1:])), "table[1] has shape (4, 1, 1, 4); it must be (N, 1, 1, P)"),
        (lambda: turn(table=(TABLE.clone().requires_grad_(), TABLE)), "table[0] (5, 1, 1, 4) requires a gradient"),
    ],
)
def test_bad_input_is_named(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
