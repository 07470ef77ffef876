"""Rotary-Major Scan: four permutations, each with the fastest axis that its name says."""

from __future__ import annotations

import pytest
import torch

from lingen.models.mixers.scan import SCAN_ORDERS, ScanOrder, scan_order

T, H, W = 2, 3, 5
FASTEST_TO_SLOWEST = {
    "spatial row-major": "WHT",
    "spatial column-major": "HWT",
    "temporal row-major": "TWH",
    "temporal column-major": "THW",
}


def coordinates() -> torch.Tensor:
    """(1, T, H, W, 3): every token holds its own (t, h, w)."""
    axes = torch.meshgrid(torch.arange(T), torch.arange(H), torch.arange(W), indexing="ij")
    return torch.stack(axes, dim=-1)[None]


@pytest.mark.parametrize("order", SCAN_ORDERS, ids=lambda order: order.name)
def test_a_scan_is_a_permutation_with_an_inverse(order: ScanOrder) -> None:
    x = coordinates()
    sequence = order.scan(x).flatten(1, 3)[0]
    assert len({tuple(token) for token in sequence.tolist()}) == T * H * W
    assert torch.equal(order.unscan(order.scan(x)), x)
    assert order.scan(x).shape[1:4] == order.sides((T, H, W))


@pytest.mark.parametrize("order", SCAN_ORDERS, ids=lambda order: order.name)
def test_axes_vary_as_fast_as_the_name_says(order: ScanOrder) -> None:
    sequence = order.scan(coordinates()).flatten(1, 3)[0].tolist()
    slowest_first = ["THW".index(axis) for axis in reversed(FASTEST_TO_SLOWEST[order.name])]
    assert sequence == sorted(sequence, key=lambda token: [token[axis] for axis in slowest_first])


def test_neighbouring_layers_rotate_through_all_four() -> None:
    assert [scan_order(layer).name for layer in range(4)] == list(FASTEST_TO_SLOWEST)
    assert scan_order(7) is scan_order(3)


def test_a_scan_moves_no_memory() -> None:
    x = torch.zeros(1, T, H, W, 1)
    assert all(order.scan(x).data_ptr() == x.data_ptr() for order in SCAN_ORDERS)
