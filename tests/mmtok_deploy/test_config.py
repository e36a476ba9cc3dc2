from __future__ import annotations

from typing import Any

import pytest

from mmtok_deploy import SelectionConfig


def test_defaults_are_the_authors_for_llava() -> None:
    assert SelectionConfig() == SelectionConfig(tv_temp=0.02, vv_temp=0.2, alpha=0.5, coverage="multimodal")


@pytest.mark.parametrize("fields", [{"alpha": 0}, {"alpha": 2.0}, {"tv_temp": 1}, {"coverage": "text"}])
def test_accepts(fields: dict[str, Any]) -> None:
    config = SelectionConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("tv_temp", [0, -0.02, float("nan"), float("inf")], "a positive number"),
        ("vv_temp", [0, -0.2, float("nan"), float("inf")], "a positive number"),
        ("alpha", [-0.5, float("nan"), float("inf")], "a number of at least 0"),
        ("coverage", ["", "image", None], "one of multimodal, text, vision"),
    ],
)
def test_refuses(name: str, values: list[Any], expected: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is {expected}, got {value!r}"):
            SelectionConfig(**{name: value})
