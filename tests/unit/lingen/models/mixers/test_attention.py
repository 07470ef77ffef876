"""Full self-attention: every token reaches every other, and positions enter as differences only."""

from __future__ import annotations

import torch

from lingen.kernels.norm import norm_rotate_ref
from lingen.models.embed import rotary_table
from lingen.models.mixers.attention import FullAttention

D, P, GRID = 24, 12, (2, 3, 2)


def test_equals_attention_written_out() -> None:
    torch.manual_seed(0)
    module = FullAttention(D, P).double()
    torch.nn.init.normal_(module.qkv.scale, mean=1.0, std=0.3)
    x = torch.randn(1, 12, D, dtype=torch.float64)
    qkv = module.qkv.linear(x).view(1, 12, 3, 2, P)
    q, k, v = norm_rotate_ref(qkv, module.qkv.scale, rotary_table(GRID, P, x.dtype, x.device), eps=1e-6)
    weights = (torch.einsum("bihp,bjhp->bhij", q, k) / P**0.5).softmax(-1)
    want = torch.einsum("bhij,bjhp->bihp", weights, v).flatten(2) @ module.out.weight.T
    torch.testing.assert_close(module(x, GRID), want)


def test_every_token_reaches_every_token() -> None:
    torch.manual_seed(0)
    module = FullAttention(D, P).double()
    x = torch.randn(1, 12, D, dtype=torch.float64)
    moved = x.clone()
    moved[0, -1] += 1.0
    assert ((module(moved, GRID) - module(x, GRID)).abs().amax(-1) > 1e-9).all()
