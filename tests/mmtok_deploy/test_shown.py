from __future__ import annotations

import sys
from typing import Any

import pytest

from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import check_method
from mmtok_deploy.shown import shown


@pytest.mark.parametrize("value", ["10%", 'a "b"', "", 0, -1.5, 2**63, None, True, [], ["a", 1], {"a": [1]}, "x" * 150])
def test_a_short_value_is_shown_whole(value: Any) -> None:
    assert shown(value) == repr(value)


def test_a_long_value_is_shown_in_part() -> None:
    assert len(shown("x" * 10**6)) <= 200
    assert shown([1] * 10**6) == "[1, 1, 1, 1, 1, 1, ...]"


def test_only_what_is_shown_is_read() -> None:
    class Unread:
        def __repr__(self) -> str:
            pytest.fail("read")

    assert shown([0] * 10 + [Unread()]) == "[0, 0, 0, 0, 0, 0, ...]"


def test_a_deep_value_is_shown() -> None:
    deep: Any = []
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    assert shown(deep) == "[[[[[...]]]]]"
    for read in (Budget.parse, check_method):
        with pytest.raises(ValueError, match=r"\[\[\[\[\[\.\.\.\]\]\]\]\]"):
            read(deep)
