"""The scan's orders: permutations of both parts, the axes that their names say, and curves whose steps are short."""

from __future__ import annotations

import itertools

import pytest
import torch

from lingen.kernels.conv import review_grid
from lingen.kernels.index import Grid
from lingen.models.mixers.scan import AXES, ScanOrder, scan_index, scan_length, scan_order, walk

CPU = torch.device("cpu")
SCANS = ["rotary", "fixed", "zigzag", "hilbert"]
GRIDS: list[Grid] = [(2, 3, 5), (4, 4, 4), (1, 6, 7), (5, 1, 1), (1, 1, 1), (3, 8, 9)]
FASTEST_TO_SLOWEST = ["WHT", "HWT", "TWH", "THW"]  # spatial row- and column-major, temporal row- and column-major


def places(order: ScanOrder, grid: Grid) -> list[tuple[int, ...]]:
    """(t, h, w) of each token, in the order of the scan."""
    tokens = list(itertools.product(*map(range, grid)))
    return [tokens[row] for row in walk(order, grid)]


def steps(order: ScanOrder, grid: Grid) -> set[int]:
    """How far apart, along the axes, the tokens of a step lie."""
    return {sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(places(order, grid))}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pool", [(2, 2, 2), (1, 3, 4), None])
def test_an_index_permutes_reviews_and_tokens_each_along_the_curve(
    scan: str, layer: int, grid: Grid, pool: Grid | None
) -> None:
    order = scan_order(scan, layer)
    index = scan_index(order, grid, pool, CPU)
    reviews = walk(order, review_grid(grid, pool)).tolist() if pool else []
    assert index.source.dtype == index.place.dtype == torch.int32
    assert index.source.tolist() == [*reviews, *(len(reviews) + row for row in walk(order, grid).tolist())]
    assert index.reviews == len(reviews) and sorted(index.source.tolist()) == list(range(scan_length(grid, pool)))
    assert index.place[index.source].tolist() == list(range(scan_length(grid, pool)))


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("grid", GRIDS)
def test_rotary_is_a_permutation_of_axes_that_rotates_by_layer(layer: int, grid: Grid) -> None:
    order = scan_order("rotary", layer)
    slowest_first = ["THW".index(axis) for axis in reversed(FASTEST_TO_SLOWEST[layer])]
    assert places(order, grid) == sorted(places(order, grid), key=lambda token: [token[axis] for axis in slowest_first])
    assert scan_order("rotary", layer + 4) == order


@pytest.mark.parametrize("scan", SCANS)
def test_neighbouring_layers_rotate_through_the_axes_unless_the_scan_is_fixed(scan: str) -> None:
    axes = tuple(scan_order(scan, layer).axes for layer in range(4))
    assert axes == ((AXES[0],) * 4 if scan == "fixed" else AXES)
    orders = {tuple(walk(scan_order(scan, layer), (3, 4, 5)).tolist()) for layer in range(4)}
    assert len(orders) == (1 if scan == "fixed" else 4)


def test_a_fixed_scan_is_the_natural_order() -> None:
    assert walk(scan_order("fixed", 3), (2, 3, 5)).tolist() == list(range(30))


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != (1, 1, 1)])
def test_each_step_of_a_zigzag_goes_to_a_neighbour(layer: int, grid: Grid) -> None:
    order = scan_order("zigzag", layer)
    assert steps(order, grid) == {1}
    fastest = "THW".index(FASTEST_TO_SLOWEST[layer][0])
    line = places(order, grid)[: grid[fastest]]
    assert [token[fastest] for token in line] == list(range(grid[fastest]))


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("grid", [(2, 2, 2), (8, 8, 8), (1, 8, 8), (4, 1, 4), (1, 1, 8)])
def test_a_hilbert_curve_steps_to_neighbours_and_fills_cube_by_cube(layer: int, grid: Grid) -> None:
    order = scan_order("hilbert", layer)
    assert steps(order, grid) == {1}
    axes = sum(side > 1 for side in grid)
    for side in (2, 4):
        cube = side**axes  # tokens of a smaller cube: each run of so many lies in one of them
        met = places(order, grid)
        runs = [met[at : at + cube] for at in range(0, len(met), cube)]
        assert all(len({tuple(x // side for x in token) for token in run}) == 1 for run in runs)


@pytest.mark.parametrize("scan", SCANS)
def test_the_longest_published_grid_is_walked(scan: str) -> None:
    grid = (136, 32, 56)  # 68 s of 512 x 896
    rows = walk(scan_order(scan, 2), grid)
    assert torch.equal(rows.sort().values, torch.arange(136 * 32 * 56))


def test_a_table_is_made_once_and_serves_training_though_sampling_made_it() -> None:
    with torch.inference_mode():
        index = scan_index(scan_order("rotary", 1), (2, 3, 11), (2, 2, 2), CPU)
    assert not index.source.is_inference() and not index.place.is_inference()
    assert scan_index(scan_order("rotary", 5), (2, 3, 11), (2, 2, 2), CPU) is index
    with torch.device("meta"):
        assert scan_index(scan_order("hilbert", 1), (2, 3, 11), (2, 2, 2), CPU).source.device == CPU
