from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import pytest
import torch
from hypothesis import given

from mmtok_deploy import SelectionConfig
from mmtok_deploy.backends.reference import greedy_maximum_coverage
from mmtok_deploy.config import Coverage
from mmtok_deploy.coverage import coverage_bound, coverage_curve, coverage_matrix
from tests.mmtok_deploy.naive import naive_matrix
from tests.mmtok_deploy.problems import GOLDEN_NAMES, Problem, golden, problems, random_problem

COVERAGES: tuple[Coverage, ...] = get_args(Coverage)


def matrix_of(problem: Problem, config: SelectionConfig = SelectionConfig()) -> torch.Tensor:
    return coverage_matrix(problem.vision, problem.keys, problem.text, config)


@pytest.mark.parametrize("coverage", COVERAGES)
@given(problem=problems(min_words=1))
def test_equals_the_definition(coverage: Coverage, problem: Problem) -> None:
    config = SelectionConfig(tv_temp=0.05, vv_temp=0.3, alpha=0.7, coverage=coverage)
    expected = torch.tensor(naive_matrix(problem.vision, problem.keys, problem.text, config))
    torch.testing.assert_close(matrix_of(problem, config), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("coverage", "num_rows", "total"), [("multimodal", 14, 1.5), ("text", 3, 1), ("vision", 11, 1)]
)
def test_rows_share_out_the_coverage(coverage: Coverage, num_rows: int, total: float) -> None:
    matrix = matrix_of(random_problem(11, 3), SelectionConfig(coverage=coverage))
    assert matrix.shape == (num_rows, 11)
    assert matrix.dtype == torch.float32
    assert matrix.sum().item() == pytest.approx(total)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_alpha_weighs_the_image_against_text_only(alpha: float) -> None:
    problem, config = random_problem(7), SelectionConfig(alpha=alpha)
    text, image = (matrix_of(problem, dataclasses.replace(config, coverage=which)) for which in ("text", "vision"))
    assert torch.equal(matrix_of(problem, config), torch.cat([text, alpha * image]))
    assert torch.equal(matrix_of(random_problem(7, 0), config), matrix_of(random_problem(7, 0), SelectionConfig()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_before_the_norm(dtype: torch.dtype) -> None:
    # Rows of 30000 have a norm beyond float16's 65504, rows of 1e-4 one whose square is 0 in it.
    scales = torch.tensor([30000.0, 1e-4, 1.0])[:, None]
    problem = random_problem(3)
    halves = Problem(problem.vision.sign() * scales, problem.keys.sign() * scales, problem.text).to(dtype)
    assert torch.equal(matrix_of(halves), matrix_of(halves.to(torch.float32)))
    assert torch.isfinite(matrix_of(halves)).all()


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_lengths_of_the_rows_do_not_matter(scale: float) -> None:
    problem = random_problem(5)
    scaled = Problem(scale * problem.vision, scale * problem.keys, scale * problem.text)
    torch.testing.assert_close(matrix_of(scaled), matrix_of(problem))


def test_zero_rows_are_like_nothing() -> None:
    zeros = Problem(torch.zeros(4, 8), torch.zeros(4, 6), torch.zeros(2, 8))
    expected = torch.cat([torch.full((2, 4), 1 / 8), torch.full((4, 4), 1 / 32)])
    torch.testing.assert_close(matrix_of(zeros), expected)


def best_coverage(matrix: torch.Tensor, num_picks: int, tokens: list[int]) -> float:
    """Returns the largest f of all sets of `num_picks` of these tokens, each of which is looked at."""
    sets = torch.tensor(list(itertools.combinations(tokens, num_picks)))
    return float(matrix.double()[:, sets].amax(dim=2).sum(dim=0).max())


@pytest.mark.parametrize("coverage", COVERAGES)
@pytest.mark.parametrize("excluded", [None, [2, 5, 6]])
def test_no_set_covers_more_than_the_bound(coverage: Coverage, excluded: list[int] | None) -> None:
    tokens = [token for token in range(10) if token not in (excluded or ())]
    num_tight = 0
    for seed, num_picks in itertools.product(range(8), range(1, len(tokens) + 1)):
        problem = random_problem(10, 3, excluded, seed)
        matrix = matrix_of(problem, SelectionConfig(coverage=coverage))
        curve = coverage_curve(matrix, greedy_maximum_coverage(matrix, num_picks, problem.excluded))
        total = matrix.amax(dim=1).sum()
        bound, best = float(coverage_bound(curve, total)), best_coverage(matrix, num_picks, tokens)
        # Not even by a rounding, unless both are f of all tokens.
        assert bound >= best if bound < total else best <= total * (1 + 1e-6)
        num_tight += bool(bound < total)
    assert num_tight >= 8


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_bound_is_tighter_than_what_greedy_selection_promises(name: str) -> None:
    case = golden(name)
    matrix = matrix_of(case.problem, case.config)
    curve, total = coverage_curve(matrix, torch.tensor(case.order)), matrix.amax(dim=1).sum()
    reached, bound = float(curve[-1]), float(coverage_bound(curve, total))
    promised = reached / (1 - (1 - 1 / case.budget) ** case.budget)
    assert reached <= bound <= min(promised * (1 + 1e-5 * case.budget), float(total))


def test_one_greedy_pick_is_the_best_one() -> None:
    curve = torch.tensor([0.25])
    assert float(coverage_bound(curve, torch.tensor(1.0))) == pytest.approx(0.25, rel=1e-6)


def test_equal_gains_bound_nothing_below_them() -> None:
    # Four of eight tokens, each of which covers an eighth: the four are the best.
    curve = torch.tensor([0.125, 0.25, 0.375, 0.5])
    assert float(coverage_bound(curve, torch.tensor(1.0))) == pytest.approx(0.5, rel=1e-5)
