from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtok_deploy import SelectionConfig
from mmtok_deploy.backends import reference
from mmtok_deploy.config import Coverage
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.greedy_replay import WrongPickError, _entry_errors, _gains, replay_greedy
from tests.mmtok_deploy.naive import naive_greedy, naive_matrix, naive_value
from tests.mmtok_deploy.problems import GOLDEN_NAMES, Problem, golden, problems, random_problem

DEFAULT = SelectionConfig()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_no_golden_pick_is_a_close_call(name: str) -> None:
    case = golden(name)
    replay = replay_greedy(case.given(), case.config, case.order)
    assert replay.num_close_calls == 0
    # The closest pick of all is ahead by 0.77 of the two gains' bounds (qwen_n576_k192), which are for the worst case:
    # at most 0.41 of a bound was seen, so other processors give the golden answers as well.
    assert replay.smallest_lead > 0.7


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_gains_in_float32_are_within_the_bound_on_their_rounding(name: str) -> None:
    case = golden(name)
    features = (case.problem.vision, case.problem.keys, case.problem.text)
    rounded = coverage_matrix(*features, case.config).T
    exact = coverage_matrix(*features, case.config, dtype=torch.float64).T
    entry_errors = _entry_errors(case.given(), case.config)
    for num_picks in (0, 1, case.budget // 2, case.budget - 1):
        covered = [columns[case.order[:num_picks]] for columns in (rounded, exact)]
        lowest = [rows.amax(dim=0) if num_picks else rows.new_zeros(rows.shape[1]) for rows in covered]
        found = (rounded - lowest[0]).clamp(min=0).sum(dim=1)
        gains, errors = _gains(exact, lowest[1], entry_errors)
        assert ((found.double() - gains).abs() <= errors).all()


@pytest.mark.parametrize("coverage", get_args(Coverage))
@given(problem=problems(min_words=1, may_exclude=True), data=st.data())
def test_the_definitions_picks_are_greedy_and_others_are_not(
    coverage: Coverage, problem: Problem, data: st.DataObject
) -> None:
    config = SelectionConfig(coverage=coverage)
    given_problem = problem.picking(data.draw(st.integers(0, 10)))
    matrix = naive_matrix(problem.vision, problem.keys, problem.text, config)
    excluded = [] if problem.excluded is None else problem.excluded.nonzero()[:, 0].tolist()
    expected = naive_greedy(matrix, given_problem.num_picks, excluded).order
    replay = replay_greedy(given_problem, config, expected)
    assert replay.total.item() == pytest.approx(naive_value(matrix, range(len(problem))))
    assert replay.coverage.tolist() == pytest.approx(
        [naive_value(matrix, expected[: place + 1]) for place in range(len(expected))]
    )
    pickable = [token for token in range(len(problem)) if token not in excluded]
    if given_problem.num_picks:
        first = data.draw(st.sampled_from(pickable))
        rest = naive_greedy(matrix, given_problem.num_picks, [*excluded, first]).order
        gains = [naive_value(matrix, [token]) for token in range(len(problem))]
        # An entry is good to 6e-5 at a temperature of 0.01.
        if gains[first] < max(gains[token] for token in pickable) * (1 - 2e-4):
            with pytest.raises(WrongPickError, match=f"pick 0 is token {first}, which gains"):
                replay_greedy(given_problem, config, [first, *rest][: given_problem.num_picks])


def test_of_two_tokens_either_covers_the_image_as_well() -> None:
    # Both columns of C are the same two numbers.
    problem, config = random_problem(2).picking(1), SelectionConfig(coverage="vision")
    for token in (0, 1):
        assert abs(replay_greedy(problem, config, [token]).smallest_lead) < 1e-6


def test_of_equal_tokens_either_may_come_first() -> None:
    problem = random_problem(40)
    order = problem.select(6).order.tolist()
    doubled = problem.take(torch.tensor([*range(40), order[2]])).picking(6)
    for third in (order[2], 40):
        replay_greedy(doubled, DEFAULT, [*order[:2], third, *order[3:]])


def test_a_close_call_is_counted() -> None:
    problem = random_problem(30).take(torch.tensor([*range(30), 0]))
    # One bit of float32 makes the twin of token 0 another token that gains nearly as much.
    problem.vision[30] *= 1 + 2**-20
    problem.keys[30, 0] *= 1 + 2**-18
    orders = [[token] for token in (0, 30)]
    gains = coverage_matrix(problem.vision, problem.keys, problem.text, DEFAULT, dtype=torch.float64).sum(dim=0)
    excluded = torch.ones(31, dtype=torch.bool)
    excluded[[0, 30]] = False
    assert gains[0] != gains[30]
    pair = Problem(problem.vision, problem.keys, problem.text, excluded).picking(1)
    assert sorted(replay_greedy(pair, DEFAULT, order).num_close_calls for order in orders) == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda order: order[:2], "2 tokens were picked, expected 3"),
        (lambda order: [order[0], order[1], order[0]], "pick 2 is token .* picked already, excluded or not there"),
        (lambda order: [order[0], order[1], 40], "pick 2 is token 40, which is picked already, excluded or not"),
        (lambda order: [order[0], order[1], -1], "pick 2 is token -1, which is picked already, excluded or not"),
        (lambda order: [order[0], order[1], 7], "pick 2 is token 7, which is picked already, excluded or not"),
        (lambda order: [order[1], order[0], order[2]], r"pick 0 is token \d+, which gains [0-9.e-]+; token \d+ gains"),
    ],
)
def test_wrong_picks_are_told(change: object, message: str) -> None:
    problem = random_problem(40, excluded=[7]).picking(3)
    order = reference.select([problem], DEFAULT)[0].order.tolist()
    with pytest.raises(WrongPickError, match=message):
        replay_greedy(problem, DEFAULT, change(order))  # type: ignore[operator]


def test_features_that_are_not_finite_have_no_greedy_pick() -> None:
    problem = random_problem(9).picking(2)
    problem.vision[1, 2] = math.nan
    with pytest.raises(WrongPickError, match="pick 0 is token 0, whose gain is not finite"):
        replay_greedy(problem, DEFAULT, [0, 1])


def test_gains_closer_than_the_coverage_is_rounded_are_told_apart_only_if_asked() -> None:
    problem = random_problem(60).picking(30)
    order = reference.select([problem], DEFAULT)[0].order.tolist()
    swapped = [*order[:20], order[25], *order[21:25], order[20], *order[26:]]
    with pytest.raises(WrongPickError, match="pick 20 is token"):
        replay_greedy(problem, DEFAULT, swapped)
    assert replay_greedy(problem, DEFAULT, swapped, coverage_error=0.05).num_close_calls > 0
