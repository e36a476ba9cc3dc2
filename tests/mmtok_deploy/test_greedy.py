from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmtok_deploy.backends.lazy import _DenseColumns
from mmtok_deploy.backends.lazy_greedy import lazy_greedy
from mmtok_deploy.backends.reference import greedy_maximum_coverage
from tests.mmtok_deploy.naive import naive_greedy, naive_value
from tests.mmtok_deploy.problems import mask_of

Greedy = Callable[..., Tensor]


def lazy(matrix: Tensor, num_picks: int, excluded: Tensor | None = None) -> Tensor:
    return lazy_greedy(_DenseColumns(matrix.T), num_picks, excluded).order


every_backend = pytest.mark.parametrize("greedy", [greedy_maximum_coverage, lazy], ids=["reference", "lazy"])


@st.composite
def dyadic_matrices(draw: st.DrawFn, max_columns: int = 40) -> Tensor:
    """Draws entries in eighths: every sum is exact in float32, and ties abound."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, max_columns)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.randint(0, draw(st.integers(2, 9)), shape, generator=generator) / 8


@every_backend
@given(matrix=dyadic_matrices(), data=st.data())
def test_equals_the_definition_and_ties_go_to_the_lowest_index(
    greedy: Greedy, matrix: Tensor, data: st.DataObject
) -> None:
    num_columns = matrix.shape[1]
    num_picks = data.draw(st.integers(0, num_columns))
    excluded = data.draw(st.sets(st.integers(0, num_columns - 1)))
    order = greedy(matrix, num_picks, mask_of(list(excluded), num_columns))
    assert order.dtype == torch.int64
    assert order.tolist() == naive_greedy(matrix.tolist(), num_picks, excluded).order


@every_backend
@pytest.mark.parametrize(
    ("matrix", "order"),
    [
        (torch.full((3, 5), 0.25), [0, 1, 2, 3, 4]),
        (torch.zeros(3, 5), [0, 1, 2, 3, 4]),
        (torch.tensor([[0.0, 1.0, 1.0, 0.5]]), [1, 0, 2, 3]),
        (torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]), [2, 0, 1]),
        (torch.eye(4).flip(0), [0, 1, 2, 3]),
        (torch.tensor([[0.125]]), [0]),
    ],
    ids=["equal", "zero", "ties then nothing left", "one covers two", "equal gains", "one column"],
)
def test_order_of_all_columns(greedy: Greedy, matrix: Tensor, order: list[int]) -> None:
    assert greedy(matrix, matrix.shape[1]).tolist() == order


@every_backend
@given(matrix=dyadic_matrices())
def test_strides_do_not_matter(greedy: Greedy, matrix: Tensor) -> None:
    order = greedy(matrix, 5)
    spread = torch.zeros(2 * matrix.shape[0], 3 * matrix.shape[1])[::2, ::3].copy_(matrix)
    assert torch.equal(greedy(spread, 5), order)
    assert torch.equal(greedy(matrix.T.contiguous().T, 5), order)


@every_backend
@given(matrix=dyadic_matrices(max_columns=8), num_picks=st.integers(1, 4))
def test_covers_its_guaranteed_share_of_the_best_set(greedy: Greedy, matrix: Tensor, num_picks: int) -> None:
    rows = matrix.tolist()
    num_picks = min(num_picks, matrix.shape[1])
    best = max(naive_value(rows, columns) for columns in itertools.combinations(range(matrix.shape[1]), num_picks))
    value = naive_value(rows, greedy(matrix, num_picks).tolist())
    assert (1 - 1 / math.e) * best <= value <= best
