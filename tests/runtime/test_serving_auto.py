"""The budget auto: each image has the share of its tokens that its question needs."""

from __future__ import annotations

from fractions import Fraction
from typing import Any
from unittest.mock import ANY

import pytest
from PIL import Image

from mmtok_deploy.auto_budget import SHARES, Asked
from mmtok_deploy.repeated_tokens import share_of_distinct
from tests.runtime.chats import Chat, small
from tests.runtime.serving import Served

CUP = small("coffee")
WHERE = Chat.ask(CUP, "Where is the cup?")


def auto_of(account: dict[str, Any]) -> list[Any]:
    (images,) = account["mmtok"]
    return [image["auto"] for image in images["images"]]


@pytest.mark.parametrize(
    ("question", "asked"),
    [("Where is the cup?", "where"), ("Is there a cup?", "whether"), ("How many cups are there?", "count")],
)
def test_the_answer_is_that_of_the_share_and_says_why(served: Served, question: str, asked: Asked) -> None:
    served.flush_cache()
    chat, share = Chat.ask(CUP, question), SHARES[asked]
    account = served.ask(chat, mmtok_budget="auto")
    served.check(chat, account, float(share))
    assert auto_of(account) == [{"asks": asked, "distinct": ANY, "share": f"{100 * share}%"}]
    # The same tokens for the same question, however many were asked for: one entry in all caches.
    again = served.ask(chat, mmtok_budget=f"{100 * share}%")
    assert auto_of(again) == [None]
    assert again["prompt_tokens"] == account["prompt_tokens"]
    assert again["cached_tokens"] == served.from_cache(account["prompt_tokens"] - 1)


def test_each_image_has_the_share_of_its_own_question(served: Served) -> None:
    later = WHERE.then("assistant", "Left.").then("user", small("chelsea"), "What does it say?")
    account = served.ask(later, mmtok_budget="auto")
    served.check(later, account, [float(SHARES["where"]), float(SHARES["read"])])
    assert auto_of(account) == [
        {"asks": "where", "distinct": ANY, "share": "5%"},
        {"asks": "read", "distinct": ANY, "share": "50%"},
    ]


def test_an_image_that_is_mostly_blank_keeps_no_more_than_what_is_distinct(served: Served) -> None:
    page = Image.new("RGB", (448, 336), "white")
    page.paste(small("coffee", 112, 84), (168, 126))
    chat = Chat.ask(page, "What does it say?")
    account = served.ask(chat, mmtok_budget="auto")
    ((auto,), (images,)) = auto_of(account), account["mmtok"]
    (image,) = images["images"]
    distinct = share_of_distinct(page, image["tokens_in"])
    if served.family == "llava-next":
        # Each of its tiles keeps as much, and one may have all of the cup.
        assert auto == {"asks": "read", "distinct": None, "share": "50%"}
    else:
        assert distinct < Fraction(30, 100)
        assert auto == {"asks": "read", "distinct": f"{100 * distinct}%", "share": f"{100 * distinct}%"}
        served.check(chat, account, float(distinct))
