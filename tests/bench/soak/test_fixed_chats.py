from __future__ import annotations

import math

import pytest

from mmtok_soak.fixed_chats import Account, largest_difference

ACCOUNT: Account = [{"a": -0.5, "b": -1.0}, {"c": -0.1, "d": -3.0}]


def test_equal_accounts_differ_by_nothing() -> None:
    assert largest_difference([ACCOUNT, ACCOUNT], [ACCOUNT, ACCOUNT]) == 0


def test_the_largest_difference_counts() -> None:
    other: Account = [{"a": -0.5, "b": -1.25}, {"c": -0.1, "d": -3.125}]
    assert largest_difference([ACCOUNT], [other]) == 0.25


@pytest.mark.parametrize("other", [ACCOUNT[:1], [{"z": -0.1}, ACCOUNT[1]]], ids=["shorter", "another token"])
def test_another_answer_is_infinitely_far(other: Account) -> None:
    assert largest_difference([ACCOUNT], [other]) == math.inf


def test_a_token_at_the_edge_of_the_list_is_not_compared() -> None:
    assert largest_difference([ACCOUNT], [[{"a": -0.5, "e": -1.0}, ACCOUNT[1]]]) == 0


def test_after_a_tie_the_answers_are_different_texts() -> None:
    tied: Account = [{"b": -0.5, "a": -0.5}, {"q": -9.0}]
    assert largest_difference([[{"a": -0.5, "b": -0.5}, ACCOUNT[1]]], [tied]) == 0
