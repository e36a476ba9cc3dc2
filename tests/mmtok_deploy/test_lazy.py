from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmtok_deploy import SelectionConfig
from mmtok_deploy.backends import lazy, reference
from mmtok_deploy.backends.lazy_greedy import LazyAnswer, lazy_greedy
from mmtok_deploy.config import Coverage
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.problem import Selection
from tests.mmtok_deploy.problems import Problem, golden, mask_of, random_problem


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def select(problem: Problem, num_picks: int, config: SelectionConfig = SelectionConfig()) -> Selection:
    return lazy.select([problem.picking(num_picks)], config)[0]


def greedy(columns: Tensor, num_picks: int, excluded: Tensor | None = None) -> LazyAnswer:
    return lazy_greedy(lazy._DenseColumns(columns), num_picks, excluded)


def expected_order(columns: Tensor, num_picks: int) -> list[int]:
    order: list[int] = reference.greedy_maximum_coverage(columns.T, num_picks).tolist()
    return order


class TestMatrix:
    # One block, a block and a token, and blocks with a rest.
    @pytest.mark.parametrize("num_tokens", [5, 256, 257, 900])
    @pytest.mark.parametrize("coverage", get_args(Coverage))
    def test_is_the_coverage_matrix_transposed(self, num_tokens: int, coverage: Coverage) -> None:
        config = SelectionConfig(tv_temp=0.05, vv_temp=0.2, alpha=0.7, coverage=coverage)
        problem = random_problem(num_tokens)
        matrix = coverage_matrix(problem.vision, problem.keys, problem.text, config)
        columns, total = lazy._coverage_columns(problem.picking(1), config)
        # Cosines are good to 6e-7 and divided by a temperature of 0.05.
        torch.testing.assert_close(columns, matrix.T, rtol=3e-5, atol=1e-9)
        torch.testing.assert_close(total, matrix.amax(dim=1).sum())

    @pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0])
    def test_tokens_without_length_keep_their_row_finite(self, temperature: float) -> None:
        problem = random_problem(9)
        problem.vision[2] = problem.keys[2] = 0
        selection = select(problem, 9, SelectionConfig(tv_temp=temperature, vv_temp=temperature))
        assert torch.isfinite(selection.total)
        torch.testing.assert_close(selection.coverage[-1], selection.total)


class TestTies:
    @pytest.mark.parametrize("num_picks", [0, 1, 40, 500])
    @pytest.mark.parametrize(
        "columns",
        [
            torch.full((500, 3), 0.25),
            torch.zeros(500, 3),
            torch.eye(500),
            torch.eye(500).flip(0),
            torch.eye(50).repeat(10, 1),
            torch.eye(50).repeat_interleave(10, dim=0),
            torch.eye(500)[:, :1],
        ],
        ids=["equal", "zero", "one-hot", "reversed", "repeated", "runs", "one of worth"],
    )
    def test_go_to_the_lowest_index(self, columns: Tensor, num_picks: int) -> None:
        answer = greedy(columns, num_picks)
        assert answer.order.tolist() == expected_order(columns, num_picks)
        assert answer.coverage.shape == (num_picks,)

    def test_of_excluded_tokens_do_not_count(self) -> None:
        order = greedy(torch.full((300, 2), 0.5), 9, mask_of(list(range(290)), 300)).order
        assert order.tolist() == list(range(290, 299))


class TestGains:
    @pytest.mark.parametrize("num_rows", [1, 17, 2904, 40000])
    @pytest.mark.usefixtures("_two_threads")
    def test_do_not_depend_on_the_tokens_beside(self, num_rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        columns = torch.rand(64, num_rows, generator=generator)
        dense, covered = lazy._DenseColumns(columns), 0.7 * columns[0]
        num_tokens = len(columns) // dense.chunk_tokens * dense.chunk_tokens
        gains = dense.gains(torch.arange(num_tokens), covered)
        shuffled = torch.randperm(num_tokens, generator=generator)
        assert torch.equal(dense.gains(shuffled, covered), gains[shuffled])
        torch.testing.assert_close(gains, (columns - covered).clamp(min=0).sum(dim=1)[:num_tokens])

    @given(st.integers(0, 2**16), st.integers(1, 200))
    def test_only_fall(self, seed: int, num_rows: int) -> None:
        # Equal in exact arithmetic more often than not, so that wrong rounding would show.
        columns = torch.randint(0, 4, (32, num_rows), generator=torch.Generator().manual_seed(seed)) / 10
        dense, tokens, covered = lazy._DenseColumns(columns), torch.arange(32), torch.zeros(num_rows)
        before = dense.gains(tokens, covered)
        for column in columns[:8]:
            covered = torch.maximum(covered, column)
            gains = dense.gains(tokens, covered)
            assert (gains <= before).all()
            before = gains

    def test_are_computed_for_few(self) -> None:
        case = golden("llava_n576_k64")
        columns, _ = lazy._coverage_columns(case.given(), case.config)
        answer = greedy(columns, case.budget)
        assert answer.order.tolist() == case.order
        assert answer.num_evaluations < case.budget * len(columns) / 5

    def test_of_equal_worth_are_computed_once(self) -> None:
        # Every bound is tight and every gain tied: a dense loop computes 250,000.
        assert greedy(torch.eye(500), 500).num_evaluations < 35_000


class TestInputs:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("name", ["vision", "keys", "text"])
    def test_not_finite_end_with_valid_indices(self, name: str, value: float) -> None:
        problem = random_problem(40, excluded=[0, 3])
        getattr(problem, name)[1, 2] = value
        selection = select(problem, 20)
        assert not torch.isfinite(selection.total)
        order = selection.order.tolist()
        assert len(set(order)) == len(selection.coverage) == 20
        assert set(order) <= set(range(40)) - {0, 3}

    def test_no_pick(self) -> None:
        selection = select(random_problem(9), 0)
        assert (len(selection), selection.coverage.shape, selection.order.dtype) == (0, (0,), torch.int64)

    def test_that_require_gradients_or_forbid_them(self) -> None:
        expected = select(random_problem(30), 9).order
        problem = random_problem(30)
        for tensor in (problem.vision, problem.keys, problem.text):
            tensor.requires_grad_()
        selection = select(problem, 9)
        assert torch.equal(selection.order, expected)
        assert not selection.total.requires_grad
        with torch.inference_mode():
            assert torch.equal(select(random_problem(30), 9).order, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_whatever_the_default_dtype(self, dtype: torch.dtype) -> None:
        expected = select(random_problem(30), 9)
        problem = random_problem(30)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            selection = select(problem, 9)
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(selection.coverage, expected.coverage)
        assert selection.coverage.dtype == torch.float32
