from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mmtok_deploy import Budget, Selection, SelectionConfig, SelectionError, select_tokens
from mmtok_deploy.config import Coverage
from mmtok_deploy.selection import BudgetLike
from tests.mmtok_deploy.naive import NaiveAnswer, naive_greedy, naive_matrix, naive_value
from tests.mmtok_deploy.problems import (
    BACKEND,
    CPU_BACKENDS,
    GOLDEN_DIR,
    GOLDEN_NAMES,
    Problem,
    golden,
    mask_of,
    problems,
    random_problem,
    using_backend,
)

COVERAGES: tuple[Coverage, ...] = get_args(Coverage)
# The lead, relative to f of all tokens, below which float32 may order two tokens either way.
SMALLEST_LEAD = 1e-4


@pytest.fixture(scope="module", params=CPU_BACKENDS, autouse=True)
def _every_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with using_backend(request.param):
        yield


def assert_identical(selection: Selection, expected: Selection) -> None:
    for field in dataclasses.fields(Selection):
        assert torch.equal(getattr(selection, field.name), getattr(expected, field.name)), field.name


def select_batch(
    cases: Sequence[Problem],
    budget: BudgetLike | Sequence[BudgetLike],
    config: SelectionConfig = SelectionConfig(),
) -> list[Selection]:
    vision, keys, text = ([case.vision for case in cases], [case.keys for case in cases], [case.text for case in cases])
    excluded = [case.excluded for case in cases]
    return select_tokens(vision, keys, text, budget, config=config, excluded=excluded, backend=BACKEND.get())


def naive_answer(problem: Problem, num_picks: int, config: SelectionConfig = SelectionConfig()) -> NaiveAnswer:
    matrix = naive_matrix(problem.vision, problem.keys, problem.text, config)
    return naive_greedy(matrix, num_picks, excluded_of(problem))


def excluded_of(problem: Problem) -> list[int]:
    return [] if problem.excluded is None else [token for token, barred in enumerate(problem.excluded) if barred]


class TestGolden:
    def test_every_case_is_there(self) -> None:
        assert sorted(json.loads((GOLDEN_DIR / "index.json").read_text())) == GOLDEN_NAMES

    @pytest.mark.parametrize("name", GOLDEN_NAMES)
    def test_order_and_kept_are_the_published_selectors(self, name: str) -> None:
        case = golden(name)
        selection = case.problem.select(case.budget, case.config)
        assert selection.order.tolist() == case.order
        assert selection.kept.tolist() == case.kept

    @pytest.mark.parametrize("config", sorted({golden(name).config for name in GOLDEN_NAMES}, key=repr), ids=repr)
    def test_a_batch_of_all_gives_the_same(self, config: SelectionConfig) -> None:
        cases = [case for case in map(golden, GOLDEN_NAMES) if case.config == config]
        budgets: list[BudgetLike] = [case.budget for case in cases]
        selections = select_batch([case.problem for case in cases], budgets, config)
        assert [selection.order.tolist() for selection in selections] == [case.order for case in cases]
        assert [selection.kept.tolist() for selection in selections] == [case.kept for case in cases]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", ["llava_n100_k20", "qwen_n256_k32", "padding_n576_k64"])
    def test_half_precision_is_computed_in_float32(self, name: str, dtype: torch.dtype) -> None:
        case = golden(name)
        halves = case.problem.to(dtype)
        selection = halves.select(case.budget, case.config)
        assert_identical(selection, halves.to(torch.float32).select(case.budget, case.config))


class TestAnswer:
    @pytest.mark.parametrize("coverage", COVERAGES)
    @given(problem=problems(min_words=1, may_exclude=True), data=st.data())
    def test_equals_the_definition(self, coverage: Coverage, problem: Problem, data: st.DataObject) -> None:
        config = SelectionConfig(tv_temp=0.1, vv_temp=0.2, alpha=0.7, coverage=coverage)
        budget = data.draw(st.integers(1, len(problem)))
        expected = naive_answer(problem, budget, config)
        assume(expected.lead > SMALLEST_LEAD)
        rest = excluded_of(problem) if budget == len(problem) else []
        assert problem.select(budget, config).order.tolist() == expected.order + rest

    @given(problems(may_exclude=True), st.integers(1, 12))
    def test_types_and_order(self, problem: Problem, budget: int) -> None:
        selection = problem.select(budget)
        assert (selection.order.dtype, selection.kept.dtype) == (torch.int64, torch.int64)
        assert (selection.coverage.dtype, selection.total.dtype) == (torch.float32, torch.float32)
        assert selection.kept.tolist() == sorted(set(selection.order.tolist()))
        assert len(selection) == len(selection.order) == len(selection.coverage)
        assert selection.total.shape == ()

    @given(problems(may_exclude=True), st.data())
    def test_budgets_are_nested(self, problem: Problem, data: st.DataObject) -> None:
        large = data.draw(st.integers(1, len(problem)))
        small = data.draw(st.integers(1, large))
        num_pickable = len(problem) - len(excluded_of(problem))
        order = problem.select(large).order[: min(small, num_pickable)]
        assert torch.equal(problem.select(small).order[:num_pickable], order)

    @given(problems(may_exclude=True), st.data())
    def test_a_permutation_of_the_tokens_permutes_the_answer(self, problem: Problem, data: st.DataObject) -> None:
        budget = data.draw(st.integers(1, len(problem)))
        tokens = torch.tensor(data.draw(st.permutations(range(len(problem)))))
        num_pickable = len(problem) - len(excluded_of(problem))
        assume(naive_answer(problem, budget).lead > SMALLEST_LEAD)
        selection, permuted = problem.select(budget), problem.take(tokens).select(budget)
        assert torch.equal(tokens[permuted.order][:num_pickable], selection.order[:num_pickable])
        assert torch.equal(tokens[permuted.kept].sort().values, selection.kept)

    @given(problems(), st.data())
    def test_duplicates_stand_for_each_other(self, problem: Problem, data: st.DataObject) -> None:
        source = torch.tensor(data.draw(st.lists(st.integers(0, len(problem) - 1), min_size=1, max_size=20)))
        shuffled = source[torch.tensor(data.draw(st.permutations(range(len(source)))))]
        doubled = problem.take(source)
        budget = len(set(source.tolist()))
        matrix = naive_matrix(doubled.vision, doubled.keys, doubled.text, SelectionConfig())
        first_of_each = {token: row for row, token in reversed(list(enumerate(source.tolist())))}
        rivals = [[row[column] for column in first_of_each.values()] for row in matrix]
        assume(naive_greedy(rivals, budget).lead > SMALLEST_LEAD)
        for num_picks in range(1, budget + 1):
            kept, kept_shuffled = (
                Counter(which[problem.take(which).select(num_picks).kept].tolist()) for which in (source, shuffled)
            )
            assert kept == kept_shuffled

    @given(problems(may_exclude=True), st.integers(1, 12))
    def test_strides_do_not_matter(self, problem: Problem, budget: int) -> None:
        assume(naive_answer(problem, min(budget, len(problem))).lead > SMALLEST_LEAD)
        expected = problem.select(budget)
        for stride in (_column_major, _every_other):
            vision, keys, text = (stride(tensor) for tensor in (problem.vision, problem.keys, problem.text))
            selection = Problem(vision, keys, text, problem.excluded).select(budget)
            assert torch.equal(selection.order, expected.order)
            torch.testing.assert_close(selection.coverage, expected.coverage)

    def test_dtypes_may_differ(self) -> None:
        problem = random_problem(9)
        mixed = dataclasses.replace(problem, vision=problem.vision.half(), keys=problem.keys.bfloat16())
        assert_identical(mixed.select(4), mixed.to(torch.float32).select(4))

    def test_the_inputs_are_left_as_they_were(self) -> None:
        problem = random_problem(9, excluded=[2])
        before = [tensor.clone() for tensor in (problem.vision, problem.keys, problem.text, mask_of([2], 9))]
        problem.select("all")
        after = [problem.vision, problem.keys, problem.text, mask_of(excluded_of(problem), 9)]
        assert all(map(torch.equal, before, after))


class TestCoverage:
    @pytest.mark.parametrize("coverage", COVERAGES)
    @given(problem=problems(min_words=1, may_exclude=True), budget=st.integers(1, 12))
    def test_is_the_running_value_of_the_picks(self, coverage: Coverage, problem: Problem, budget: int) -> None:
        config = SelectionConfig(coverage=coverage)
        selection = problem.select(budget, config)
        matrix = naive_matrix(problem.vision, problem.keys, problem.text, config)
        order = selection.order.tolist()
        expected = [naive_value(matrix, order[: num_picks + 1]) for num_picks in range(len(order))]
        assert selection.coverage.tolist() == pytest.approx(expected, rel=1e-4)
        assert selection.total.item() == pytest.approx(naive_value(matrix, range(len(problem))), rel=1e-4)

    @pytest.mark.parametrize("coverage", COVERAGES)
    @pytest.mark.parametrize("seed", range(8))
    def test_never_falls_and_ends_at_the_total(self, coverage: Coverage, seed: int) -> None:
        # 20 words are covered long before the last token: from there on no pick gains anything.
        selection = random_problem(131, 20, seed=seed).select("all", SelectionConfig(coverage=coverage))
        assert (selection.coverage.diff() >= 0).all()
        torch.testing.assert_close(selection.coverage[-1], selection.total)


class TestSizes:
    @pytest.mark.parametrize("num_words", [0, 1, 3])
    @pytest.mark.parametrize("budget", [1, 5, "10%", "all"])
    def test_one_token_is_kept(self, num_words: int, budget: BudgetLike) -> None:
        assert random_problem(1, num_words).select(budget).order.tolist() == [0]

    @pytest.mark.parametrize("budget", [9, 10, "100%", "all", Budget(tokens=2, minimum=20)], ids=str)
    def test_a_budget_of_every_token_keeps_them_all(self, budget: BudgetLike) -> None:
        selection = random_problem(9).select(budget)
        assert selection.kept.tolist() == list(range(9))
        torch.testing.assert_close(selection.coverage[-1], selection.total)

    @pytest.mark.parametrize("budget", [1, 4, "all"])
    def test_without_text_the_image_is_covered(self, budget: BudgetLike) -> None:
        problem = random_problem(9, 0)
        expected = random_problem(9).select(budget, SelectionConfig(coverage="vision"))
        for alpha in (0.0, 0.5):
            assert_identical(problem.select(budget, SelectionConfig(alpha=alpha)), expected)

    def test_one_word_picks_the_token_most_like_it(self) -> None:
        problem = random_problem(9, 1)
        similarity = torch.cosine_similarity(problem.vision, problem.text)
        selection = problem.select(1, SelectionConfig(coverage="text"))
        assert selection.kept.tolist() == [int(similarity.argmax())]

    @pytest.mark.parametrize("coverage", COVERAGES)
    def test_no_token_at_all(self, coverage: Coverage) -> None:
        selection = random_problem(0).select(5, SelectionConfig(coverage=coverage))
        assert (len(selection), selection.total.item()) == (0, 0.0)


class TestExcluded:
    @given(problems(may_exclude=True), st.integers(1, 12))
    def test_excluded_tokens_come_only_with_every_token_and_then_last(self, problem: Problem, budget: int) -> None:
        excluded = excluded_of(problem)
        num_pickable = len(problem) - len(excluded)
        order = problem.select(budget).order.tolist()
        assert set(order[:num_pickable]).isdisjoint(excluded)
        if budget >= len(problem):
            assert order[num_pickable:] == excluded
        else:
            assert len(order) == min(budget, num_pickable)

    def test_they_are_still_covered(self) -> None:
        problem = random_problem(9)
        masked = dataclasses.replace(problem, excluded=mask_of([1], 9))
        assert torch.equal(masked.select(3).total, problem.select(3).total)

    def test_all_excluded_leaves_nothing(self) -> None:
        selection = random_problem(5, excluded=list(range(5))).select(4)
        assert selection.order.tolist() == selection.kept.tolist() == selection.coverage.tolist() == []

    def test_an_empty_mask_is_none(self) -> None:
        assert_identical(random_problem(9, excluded=[]).select(4), random_problem(9).select(4))


class TestBatch:
    CASES = (random_problem(9), random_problem(5, 0, [1, 2]), random_problem(1, 1, seed=1), random_problem(7, 4, []))

    @pytest.mark.parametrize("budget", [3, "40%", 0.4, "all", Budget(tokens=3)], ids=repr)
    def test_one_budget_serves_all(self, budget: BudgetLike) -> None:
        for selection, case in zip(select_batch(self.CASES, budget), self.CASES, strict=True):
            assert_identical(selection, case.select(budget))

    def test_every_problem_may_have_its_own_budget(self) -> None:
        budgets: list[BudgetLike] = [2, "40%", Budget(), 0.5]
        for selection, case, budget in zip(select_batch(self.CASES, budgets), self.CASES, budgets, strict=True):
            assert_identical(selection, case.select(budget))

    def test_without_masks(self) -> None:
        case = self.CASES[0]
        (selection,) = select_tokens((case.vision,), (case.keys,), (case.text,), 3, backend=BACKEND.get())
        assert_identical(selection, case.select(3))

    def test_an_empty_batch_has_no_answers(self) -> None:
        assert select_batch([], 3) == []


class TestErrors:
    X, C, T = torch.ones(5, 4), torch.ones(5, 3), torch.ones(2, 4)
    MASK = torch.zeros(5, dtype=torch.bool)

    @pytest.mark.parametrize(
        ("vision", "keys", "text", "message"),
        [
            (X.double(), C, T, "vision is float32, float16 or bfloat16, got torch.float64"),
            (X, C.int(), T, "keys is float32, float16 or bfloat16, got torch.int32"),
            (X, C, T.long(), "text is float32, float16 or bfloat16, got torch.int64"),
            (X, [C], T, "three tensors, or three lists of tensors"),
            (X, C, [T], "three tensors, or three lists of tensors"),
            (X, C, None, "three tensors, or three lists of tensors"),
            ([X], C, [T], "vision is a list of tensors, so keys, text and excluded are lists as well"),
            ([X], [C], T, "vision is a list of tensors, so keys, text and excluded are lists as well"),
            ([X], [[C]], [T], "keys is a tensor or a list of tensors, got list"),
            ([X.tolist()], [C], [T], "vision is a tensor or a list of tensors, got list"),
        ],
    )
    def test_wrong_types(self, vision: Any, keys: Any, text: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            select_tokens(vision, keys, text, 3)

    @pytest.mark.parametrize(
        ("vision", "keys", "text", "message"),
        [
            (X[0], C, T, r"vision is a matrix, got shape \(4,\)"),
            (X, C[None], T, r"keys is a matrix, got shape \(1, 5, 3\)"),
            (X, C, T[0], r"text is a matrix, got shape \(4,\)"),
            (X, C[:4], T, "keys has one row a vision token: expected 5, got 4"),
            (X, C, T[:, :3], "text and vision have the same width, got 3 and 4"),
            ([X, X], [C], [T, T], "a batch of 2 problems needs as many keys, got 1"),
            ([X, X], [C, C], [T], "a batch of 2 problems needs as many text, got 1"),
            ([X, X], [C, C], [T, T[:, :3]], "text and vision have the same width, got 3 and 4"),
        ],
    )
    def test_wrong_shapes(self, vision: Any, keys: Any, text: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            select_tokens(vision, keys, text, 3)

    @pytest.mark.parametrize(
        ("is_batch", "excluded", "error", "message"),
        [
            (False, [None], TypeError, "excluded is a tensor or None for one problem, got list"),
            (True, MASK, TypeError, "excluded are lists as well"),
            (True, [None, MASK], ValueError, "a batch of 1 problems needs as many excluded, got 2"),
            (False, MASK[:4], ValueError, r"excluded is a bool mask of \[5\], got torch.bool of \[4\]"),
            (False, MASK.int(), ValueError, r"excluded is a bool mask of \[5\], got torch.int32 of \[5\]"),
            (True, [torch.tensor([0, 1])], ValueError, r"excluded is a bool mask of \[5\], got torch.int64 of \[2\]"),
        ],
    )
    def test_wrong_masks(self, is_batch: bool, excluded: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self._select(is_batch, excluded=excluded)

    @pytest.mark.parametrize(
        ("is_batch", "budget", "error", "message"),
        [
            (False, "ten", ValueError, r"'ten' is not understood: expected a whole number of tokens \(64\)"),
            (True, [0], ValueError, "budget 0 is not understood"),
            (False, [3], TypeError, "one problem takes one budget, got list"),
            (False, None, TypeError, "one problem takes one budget, got NoneType"),
            (True, None, TypeError, "one problem takes one budget, got NoneType"),
            (True, [[3]], TypeError, "one problem takes one budget, got list"),
            (True, [3, 4], ValueError, "a batch of 1 problems needs as many budget, got 2"),
        ],
    )
    def test_wrong_budgets(self, is_batch: bool, budget: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self._select(is_batch, budget)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        ("name", "coverage"),
        [
            ("vision", "multimodal"),
            ("vision", "text"),
            ("keys", "multimodal"),
            ("keys", "vision"),
            ("text", "multimodal"),
            ("text", "text"),
        ],
    )
    def test_features_that_are_not_finite(
        self, name: str, coverage: Coverage, value: float, dtype: torch.dtype
    ) -> None:
        problem = random_problem(5).to(dtype)
        getattr(problem, name)[1, 2] = value
        with pytest.raises(SelectionError, match="must be finite, got NaN or infinite values"):
            problem.select(3, SelectionConfig(coverage=coverage))

    def test_text_coverage_needs_text(self) -> None:
        with pytest.raises(ValueError, match="'text' needs at least one row of text; use 'multimodal' or 'vision'"):
            random_problem(5, 0).select(3, SelectionConfig(coverage="text"))

    def _select(self, is_batch: bool, budget: Any = 3, excluded: Any = None) -> None:
        features: tuple[Any, Any, Any] = ([self.X], [self.C], [self.T]) if is_batch else (self.X, self.C, self.T)
        select_tokens(*features, budget, excluded=excluded)


def _column_major(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


def _every_other(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)[::2, ::3]
