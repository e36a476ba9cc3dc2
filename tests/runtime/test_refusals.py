from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client import REGISTRY

from mmtok_sglang import refusals
from mmtok_sglang.refusals import Kind, refusal
from mmtok_sglang.request import requested
from tests.runtime.stand_ins import make_settings


def count(kind: str) -> float:
    return REGISTRY.get_sample_value("mmtok:refused_requests_total", {"kind": kind}) or 0.0


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_refusal_has_its_message_and_is_counted_under_its_kind(kind: Kind) -> None:
    others = [other for other in get_args(Kind) if other != kind]
    before, before_others = count(kind), [count(other) for other in others]
    assert str(refusal(kind, ValueError("send fewer"))) == "send fewer"
    assert count(kind) - before == 1
    assert [count(other) for other in others] == before_others


def test_the_documentation_has_a_row_of_each_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "inside-a-server.md").read_text()
    _, _, table = page.partition("| kind | the request |")
    assert set(re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE)) == set(get_args(Kind))


def test_what_a_request_brought_is_shown_in_part() -> None:
    message = str(refusal("field", f"no field {'x' * 10**6}; a request may set mmtok_budget"))
    assert len(message) < 1100
    assert message.startswith("no field xxx")
    assert message.endswith("xxx; a request may set mmtok_budget")


def test_what_a_request_brought_can_be_sent_with_the_answer() -> None:
    with pytest.raises(ValueError, match=r"has no field mmtok_\\ud800; a request may set") as caught:
        requested({"mmtok_\ud800": 5}, make_settings())
    assert str(caught.value).encode()


def test_one_rank_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "is_first_rank", lambda: False)
    before = count("field")
    refusal("field", "no")
    assert count("field") == before


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("field", {"mmtok_budget": 0}),
        ("field", {"mmtok_alpha": 1}),
        ("field", {"mmtok_seed": -1}),
        ("method", {"mmtok_method": "fastv"}),
        ("method", {"mmtok_method": "even"}),
    ],
)
def test_what_a_request_asks_for_is_refused_once(kind: Kind, fields: dict[str, Any]) -> None:

    before = count(kind)
    with pytest.raises(ValueError, match="mmtok_"):
        requested(fields, replace(make_settings(), backend="triton"))
    assert count(kind) - before == 1
