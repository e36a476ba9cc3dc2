from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtok_deploy import Budget

COUNTS = st.integers(1, 10**6)
RATIOS = st.floats(0, 1, exclude_min=True, exclude_max=True)
PERCENTAGES = st.decimals(0, 100, places=6).filter(lambda share: 0 < share < 100).map(lambda share: f"{share}%")
NO_BUDGETS = [0, -3, 0.0, 1.0, 1.5, -0.1, True, None, float("nan"), float("inf"), [64]]
NO_NUMBERS_IN_RANGE = ["0", "-3", "1.0", "1.5", "0.0", "0%", "-5%", "150%", "100.01%", "1e3", "nan", "inf"]
NO_NOTATIONS = ["", " ", "%", ".", "+3", "10 %", "10%%", "1_000", "1/2", "٣", "ten", "64 tokens", "None"]
TOO_LONG_TO_EXPAND = ["1e-9999999", "0.1e9999999", "1e-9999999%"]
BUDGETS = st.one_of(COUNTS, RATIOS, PERCENTAGES, st.just("all")).map(Budget.parse)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (64, Budget(tokens=64)),
        ("64", Budget(tokens=64)),
        (" 064 ", Budget(tokens=64)),
        (1, Budget(tokens=1)),
        ("10%", Budget(ratio=Fraction(1, 10))),
        ("12.5%", Budget(ratio=Fraction(1, 8))),
        (".5%", Budget(ratio=Fraction(1, 200))),
        (0.1, Budget(ratio=Fraction(1, 10))),
        ("0.1", Budget(ratio=Fraction(1, 10))),
        (".25", Budget(ratio=Fraction(1, 4))),
        (1e-05, Budget(ratio=Fraction(1, 100_000))),
        ("100%", Budget(ratio=Fraction(1))),
        ("all", Budget()),
        ("ALL", Budget()),
    ],
)
def test_parse(value: str | int | float, expected: Budget) -> None:
    assert Budget.parse(value) == expected
    assert Budget.parse(value, minimum=7).minimum == 7


def test_parse_returns_a_budget_as_it_is() -> None:
    budget = Budget(tokens=3, minimum=2)
    assert Budget.parse(budget, minimum=9) is budget


@pytest.mark.parametrize(
    "value",
    [*NO_BUDGETS, *NO_NUMBERS_IN_RANGE, *NO_NOTATIONS, *TOO_LONG_TO_EXPAND],
    ids=repr,
)
def test_parse_refuses_nonsense_and_lists_what_is_accepted(value: Any) -> None:
    with pytest.raises(ValueError, match=r"\(64\).*\(10%\).*\(0\.1\).*'all'") as refusal:
        Budget.parse(value)
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "0." + "0" * 5000 + "1", "1" * 401 + "%", 10**5000], ids=["n", "f", "p", "i"]
)
def test_numbers_of_thousands_of_digits_are_refused_with_what_is_accepted(value: Any) -> None:
    with pytest.raises(ValueError, match=r"more than 400 letters is not understood: .*\(64\)"):
        Budget.parse(value)


@pytest.mark.parametrize("value", [1.0, "1.0", "1.00", "1.", "1e0"])
def test_one_point_zero_is_refused_with_both_of_its_readings(value: Any) -> None:
    with pytest.raises(ValueError, match='it may be every token or one, write "100%" or 1;'):
        Budget.parse(value)
    assert (Budget.parse("100%").is_all, Budget.parse(1).tokens) == (True, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 64, "ratio": Fraction(1, 2)}, "a count or a ratio, not both"),
        ({"tokens": 0}, "at least 1 token, got 0"),
        ({"tokens": 1.5}, "whole number .* got 1.5"),
        ({"tokens": True}, "whole number .* got True"),
        ({"ratio": Fraction(0)}, r"above 0 and at most 1, got Fraction\(0, 1\)"),
        ({"ratio": Fraction(3, 2)}, r"above 0 and at most 1, got Fraction\(3, 2\)"),
        ({"ratio": 0.29}, "a Fraction above 0 and at most 1, got 0.29"),
        ({"minimum": 0}, "minimum .* at least 1 token, got 0"),
        ({"minimum": True}, "minimum .* got True"),
        ({"minimum": 2.0}, r"minimum .* got 2\.0"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


@given(BUDGETS)
def test_str_round_trips(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("value", "written"),
    [(64, "64"), (0.1, "10%"), ("0.125", "12.5%"), ("33.3%", "33.3%"), ("all", "all"), ("100%", "all")],
)
def test_str(value: str | int | float, written: str) -> None:
    assert str(Budget.parse(value)) == written


@given(BUDGETS, st.integers(1, 10**6), st.integers(1, 100))
def test_num_kept_is_from_the_minimum_to_all(budget: Budget, num_tokens: int, minimum: int) -> None:
    raised = Budget(budget.tokens, budget.ratio, minimum)
    assert 1 <= budget.num_kept(num_tokens) <= num_tokens
    assert raised.num_kept(num_tokens) == max(budget.num_kept(num_tokens), min(minimum, num_tokens))


@pytest.mark.parametrize(
    ("value", "num_tokens", "num_kept"),
    [
        (64, 576, 64),
        (64, 63, 63),
        ("all", 576, 576),
        ("100%", 576, 576),
        ("10%", 576, 57),
        ("1%", 5, 1),
        ("29%", 100, 29),
        (0.29, 100, 29),
        (64, 0, 0),
        ("10%", 0, 0),
    ],
)
def test_num_kept(value: str | int | float, num_tokens: int, num_kept: int) -> None:
    assert Budget.parse(value).num_kept(num_tokens) == num_kept


def test_num_kept_refuses_a_negative_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="not negative, got -1"):
        Budget(tokens=1).num_kept(-1)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.25, 0.5])
def test_ratios_keep_what_the_authors_keep(ratio: float) -> None:
    budget = Budget.parse(ratio)
    sizes = range(1, 5001)
    assert [budget.num_kept(size) for size in sizes] == [max(1, int(ratio * size)) for size in sizes]


@pytest.mark.parametrize(("value", "is_all"), [("all", True), ("100%", True), ("99.9%", False), (10**6, False)])
def test_is_all(value: str | int, is_all: bool) -> None:
    assert Budget.parse(value).is_all is is_all
