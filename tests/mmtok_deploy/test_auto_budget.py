from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from mmtok_deploy import Budget
from mmtok_deploy.auto_budget import SHARES, Asked, AutoBudget, parse_budget, parse_share, what_is_asked


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("Where is the red circle?", "where"),
        ("  where's the cat", "where"),
        ("Is there a red circle in the image?", "whether"),
        ("Is there a cat in the image?\nAnswer the question using a single word or phrase.", "whether"),
        ("Does it rain?", "whether"),
        ("How many stars are in the image?", "count"),
        ("Is the NUMBER OF stars three?", "count"),
        ("What digit is in the image?", "read"),
        ("What letter is in the image?", "read"),
        ("Where is the sign that says STOP?", "read"),
        ("Is there any text?", "read"),
        # Not the one thing alone.
        ("Is there a car, and what colour is it?", "other"),
        ("Where is the dog and how old is it?", "other"),
        ("Is there a dog? Is there a cat?", "other"),
        ("Isolate the subject.", "other"),
        ("Wherever you look, there is a cat.", "other"),
        ("What is unusual here?", "other"),
        ("Wo ist der Hund?", "other"),
        ("Describe the image.", "other"),
        ("", "other"),
        ("Is there a cat? " + "x" * 1000, "other"),
    ],
)
def test_what_is_asked(question: str, asked: Asked) -> None:
    assert what_is_asked(question) == asked


def test_what_is_not_known_keeps_as_much_as_the_neediest() -> None:
    assert SHARES["other"] == max(SHARES.values())


def test_shares_within_bounds() -> None:
    auto = AutoBudget(minimum=8)
    assert [auto.of(asked) for asked in SHARES] == [Budget(ratio=share, minimum=8) for share in SHARES.values()]
    assert auto.largest == auto.of("other")
    assert not auto.is_all
    bounded = AutoBudget(auto_min=Fraction(1, 10), auto_max=Fraction(1, 5))
    assert [str(bounded.of(asked)) for asked in ("where", "whether", "count")] == ["10%", "11%", "20%"]
    assert str(bounded.largest) == "20%"
    assert AutoBudget(auto_max=Fraction(1, 100)).of("where") == Budget(ratio=Fraction(1, 100))
    assert AutoBudget(auto_min=Fraction(1)).is_all


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"auto_min": Fraction(1, 2), "auto_max": Fraction(1, 5)}, "auto_min is at most auto_max, got 50% and 20%"),
        ({"auto_min": Fraction(0)}, "ratio is a Fraction above 0"),
        ({"auto_max": 0.5}, "ratio is a Fraction above 0"),
        ({"minimum": 0}, "minimum is a whole number of at least 1"),
    ],
)
def test_bounds_that_are_none(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoBudget(**fields)


def test_parse() -> None:
    auto = AutoBudget(auto_max=Fraction(1, 5))
    for value in ("auto", " AUTO "):
        assert parse_budget(value, auto, minimum=4) == AutoBudget(4, None, Fraction(1, 5))
    assert parse_budget("10%", auto, minimum=4) == Budget.parse("10%", minimum=4)
    with pytest.raises(ValueError, match=r"budget 'ten' is not understood: .*'all' for no pruning; or 'auto', chosen"):
        parse_budget("ten", auto)
    assert str(auto) == "auto"


def test_no_other_budget_is_auto() -> None:
    with pytest.raises(ValueError, match=r"budget 'auto' is a server's.*; expected a whole number of tokens"):
        Budget.parse("auto")


@pytest.mark.parametrize(("value", "share"), [("10%", "1/10"), ("0.25", "1/4"), ("100%", "1"), ("all", "1")])
def test_a_share(value: str, share: str) -> None:
    assert parse_share(value) == Fraction(share)


@pytest.mark.parametrize("value", ["64", "150%", "auto", "", "half"])
def test_what_is_no_share(value: str) -> None:
    with pytest.raises(ValueError, match=r"^is a share of an image's tokens \(10%, 0.1 or all\), got '"):
        parse_share(value)
