"""MATE is the sum of its branches, and the scan order changes with the layer."""

from __future__ import annotations

import torch

from lingen.models.mixers.mamba2 import BidirectionalMamba2
from lingen.models.mixers.mate import Mate
from lingen.models.mixers.scan import scan_order
from lingen.models.mixers.window import WindowAttention

D, GRID, POOL = 16, (2, 3, 4), (1, 2, 3)


def mate(layer: int) -> Mate:
    torch.manual_seed(0)
    ma = BidirectionalMamba2(D, expand=2, head_dim=8, d_state=4, conv_kernel=4, chunk_size=8)
    return Mate(ma, WindowAttention(D, 8, window=(2, 2, 2), shifted=layer % 2 == 1), layer=layer, review_pool=POOL)


def test_is_the_sum_of_both_branches_on_one_input() -> None:
    x = torch.randn(2, 24, D)
    for layer in range(4):
        module, order = mate(layer), scan_order(layer)
        # The MA-branch on a video that was transposed beforehand, written out without ScanOrder.
        axes = [1 + axis for axis in order.axes]
        turned = x.view(2, *GRID, D).permute(0, *axes, 4)
        ma = module.ma(turned, tuple(POOL[axis] for axis in order.axes))
        back = torch.empty(2, *GRID, D)
        back.permute(0, *axes, 4).copy_(ma)
        torch.testing.assert_close(module(x, GRID), back.flatten(1, 3) + module.te(x, GRID))


def test_layers_differ_by_their_order_alone() -> None:
    x = torch.randn(1, 24, D)
    outputs = [mate(layer).ma(scan_order(layer).scan(x.view(1, *GRID, D)), (2, 2, 2)) for layer in range(4)]
    unscanned = [scan_order(layer).unscan(y) for layer, y in enumerate(outputs)]
    assert all(not torch.allclose(unscanned[0], other, atol=1e-4) for other in unscanned[1:])
