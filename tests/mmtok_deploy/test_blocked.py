from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtok_deploy.backends import blocked, get_backend, reference
from mmtok_deploy.config import Coverage, SelectionConfig
from mmtok_deploy.problem import Selection, SelectionProblem
from tests.mmtok_deploy.problems import (
    GOLDEN_NAMES,
    Problem,
    assert_greedy,
    golden,
    mask_of,
    problems,
    random_problem,
)

FLOAT32_BYTES = 4


BOUNDS = {"one at a time": 0, "two": 13, "sixteen": 80, "all": 10**6}
# What small images show already, and takes long for large ones.
LARGE = {name for name in GOLDEN_NAMES if len(golden(name).problem) > 300}


@pytest.mark.parametrize(
    ("name", "max_columns"),
    [
        pytest.param(
            *(name, max_columns),
            id=f"{name}-{bound}",
            marks=[pytest.mark.exhaustive] if bound == "two" and name in LARGE else [],
        )
        for name in GOLDEN_NAMES
        for bound, max_columns in BOUNDS.items()
    ],
)
def test_golden_cases_at_any_bound(name: str, max_columns: int) -> None:
    case = golden(name)
    problem = case.given()
    num_rows = len(problem.vision) + len(problem.text)
    (selection,) = blocked.select([problem], case.config, max_bytes=max_columns * num_rows * FLOAT32_BYTES)
    assert (selection.order.tolist(), selection.kept.tolist()) == (case.order, case.kept)
    assert_greedy(selection, problem, case.config)


@pytest.mark.parametrize("coverage", get_args(Coverage))
@given(problem=problems(min_words=1, may_exclude=True), num_picks=st.integers(0, 10), max_bytes=st.integers(0, 2000))
def test_is_greedy(problem: Problem, num_picks: int, max_bytes: int, coverage: Coverage) -> None:
    config = SelectionConfig(coverage=coverage)
    given_problem = problem.picking(num_picks)
    (selection,) = blocked.select([given_problem], config, max_bytes=max_bytes)
    assert_greedy(selection, given_problem, config)


@pytest.mark.parametrize("max_columns", [0, 40, 10**6])
@pytest.mark.parametrize("num_words", [0, 5])
def test_one_of_equal_tokens_is_taken_before_any_other_of_them(max_columns: int, num_words: int) -> None:
    problem = random_problem(40, num_words).take(torch.arange(200) % 40).picking(60)
    (selection,) = blocked.select(
        [problem], SelectionConfig(), max_bytes=max_columns * (200 + num_words) * FLOAT32_BYTES
    )
    assert sorted((selection.order[:40] % 40).tolist()) == list(range(40))
    assert_greedy(selection, problem)


def test_nothing_to_pick() -> None:
    empty = SelectionProblem(torch.zeros(0, 8), torch.zeros(0, 6), torch.zeros(0, 8), 0)
    barred = random_problem(7, excluded=list(range(7))).picking(3)
    for problem in (empty, barred):
        (selection,) = blocked.select([problem], SelectionConfig())
        assert [len(field) for field in (selection.order, selection.kept, selection.coverage)] == [0, 0, 0]
        assert selection.order.dtype == torch.int64


@pytest.mark.parametrize("broken", ["vision", "keys", "text"])
def test_features_that_are_not_numbers_give_valid_indices_and_say_so(broken: str) -> None:
    problem = random_problem(9, excluded=[1]).picking(4)
    getattr(problem, broken)[0] = torch.inf
    (selection,) = blocked.select([problem], SelectionConfig())
    assert selection.kept.tolist() == [0, 2, 3, 4]
    assert len(selection.coverage) == 4
    assert not torch.isfinite(selection.total)


@pytest.mark.parametrize("max_columns", [5, 40, 163, 300])
def test_no_more_of_the_matrix_is_held_than_the_bound(max_columns: int) -> None:
    num_tokens, num_words = 300, 3
    problem = random_problem(num_tokens, num_words).picking(50)
    max_bytes = max_columns * (num_tokens + num_words) * FLOAT32_BYTES
    columns = blocked._Columns(problem, SelectionConfig(), max_bytes)
    at_work = blocked._BLOCKS_AT_WORK * columns.chunk_tokens
    assert (len(columns._held) + at_work) * columns.num_rows * FLOAT32_BYTES <= max_bytes


class Dense:
    """The reference, watched."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, batch: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
        self.calls.append([len(problem.vision) for problem in batch])
        return reference.select(batch, config)


def test_a_batch_is_one_call_as_far_as_it_fits() -> None:
    sizes = [10, 20, 30, 31, 5, 29]
    batch = [random_problem(size, 2, seed=size).picking(3) for size in sizes]
    dense = Dense()
    # 30 tokens of 32 rows fit exactly, 31 do not; 5 and 29 fit together.
    bounded = blocked.within_memory(dense, max_bytes=30 * 32 * FLOAT32_BYTES)
    selections = bounded(batch, SelectionConfig())
    assert dense.calls == [[10, 20], [30], [5, 29]]
    for selection, problem in zip(selections, batch, strict=True):
        assert_greedy(selection, problem)
    assert bounded([], SelectionConfig()) == []


def test_auto_is_bounded_and_a_name_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert get_backend("reference", cpu) is reference.select
    assert get_backend("blocked", cpu) is blocked.select
    large = random_problem(8193, 0).picking(1)
    larger = random_problem(18319, 0).picking(1)
    bounds: list[int] = []

    def select_nothing(
        batch: Sequence[SelectionProblem], config: SelectionConfig, *, max_bytes: int
    ) -> list[Selection]:
        bounds.append(max_bytes)
        return []

    monkeypatch.setattr(blocked, "select", select_nothing)
    assert get_backend("auto", cpu)([larger], SelectionConfig()) == []
    assert get_backend("auto", torch.device("mps"))([large], SelectionConfig()) == []
    assert bounds == [1280 << 20, 256 << 20]


def test_excluded_tokens_are_never_taken() -> None:
    problem = random_problem(50, 3, excluded=list(range(0, 50, 2)))
    assert problem.excluded is not None
    (selection,) = blocked.select([problem.picking(50)], SelectionConfig(), max_bytes=0)
    assert torch.equal(~mask_of(selection.kept.tolist(), 50), problem.excluded)
