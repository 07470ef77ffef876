"""MATE is the sum of its branches, of which one may be absent."""

from __future__ import annotations

import pytest
import torch

from lingen.models.mixers.mamba2 import BidirectionalMamba2
from lingen.models.mixers.mate import Mate
from lingen.models.mixers.scan import scan_order
from lingen.models.mixers.window import WindowAttention

D, GRID = 16, (2, 3, 4)


def branches() -> tuple[BidirectionalMamba2, WindowAttention]:
    torch.manual_seed(0)
    ma = BidirectionalMamba2(
        D,
        expand=2,
        head_dim=8,
        d_state=4,
        conv_kernel=4,
        chunk_size=8,
        separate=False,
        order=scan_order("rotary", 2),
        review_pool=(1, 2, 3),
    )
    return ma, WindowAttention(D, 8, window=(2, 2, 2), shifted=True)


def test_is_the_sum_of_both_branches_on_one_input() -> None:
    x, (ma, te) = torch.randn(2, 24, D), branches()
    torch.testing.assert_close(Mate(ma, te)(x, GRID), ma(x, GRID) + te(x, GRID))
    assert Mate(ma, te).flops(GRID) == ma.flops(GRID) + te.flops(GRID)


def test_is_one_branch_where_the_other_is_absent() -> None:
    x, (ma, te) = torch.randn(2, 24, D), branches()
    for mate, branch in ((Mate(ma, None), ma), (Mate(None, te), te)):
        assert torch.equal(mate(x, GRID), branch(x, GRID))
        assert mate.flops(GRID) == branch.flops(GRID)
        assert {name.split(".")[0] for name, _ in mate.named_parameters()} == {"ma" if branch is ma else "te"}


def test_without_branches_there_is_no_mate() -> None:
    with pytest.raises(ValueError, match="mixes nothing"):
        Mate(None, None)
