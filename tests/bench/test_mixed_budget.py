from __future__ import annotations

import pytest

from mmtok_bench.mixed_budget import MixedBudget


@pytest.mark.parametrize(
    ("text", "shown", "flags", "fields"),
    [
        ("0.1", "10%", ("--mmtok-budget=10%",), {"mmtok_budget": "10%"}),
        ("auto", "auto", ("--mmtok-budget=auto",), {"mmtok_budget": "auto"}),
        ("64@1", "64", ("--mmtok-budget=64",), {"mmtok_budget": "64"}),
        (
            *("25%@.50", "25%@0.5", ("--mmtok-budget=25%", "--mmtok-encoder-scale=0.5")),
            {"mmtok_budget": "25%", "mmtok_encoder_scale": 0.5},
        ),
        (
            *("all@0.75", "all@0.75", ("--mmtok-budget=all", "--mmtok-encoder-scale=0.75")),
            {"mmtok_budget": "all", "mmtok_encoder_scale": 0.75},
        ),
        (
            *("all~0", "all~0", ("--mmtok-budget=all", "--mmtok-skip-repeats=0")),
            {"mmtok_budget": "all", "mmtok_skip_repeats": 0},
        ),
        (
            "10%@0.5~008",
            "10%@0.5~8",
            ("--mmtok-budget=10%", "--mmtok-encoder-scale=0.5", "--mmtok-skip-repeats=8"),
            {"mmtok_budget": "10%", "mmtok_encoder_scale": 0.5, "mmtok_skip_repeats": 8},
        ),
    ],
)
def test_a_budget_and_what_is_encoded_in_one_word(
    text: str, shown: str, flags: tuple[str, ...], fields: dict[str, object]
) -> None:
    mixed = MixedBudget.parse(text)
    assert (str(mixed), mixed.flags, mixed.fields) == (shown, flags, fields)
    assert MixedBudget.parse(shown) == mixed


@pytest.mark.parametrize(
    "text", ["10%@", "10%@0", "10%@2", "10%@half", "10%@nan", "10%@0.5@0.5", "10%~", "10%~-1", "10%~256", "10%~8@0.5"]
)
def test_what_is_no_scale_or_difference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is not understood: .* as 10%, 10%@0.5 or 10%@0.5~8"):
        MixedBudget.parse(text)


def test_a_budget_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="budget 'ten' is not understood"):
        MixedBudget.parse("ten@0.5")
