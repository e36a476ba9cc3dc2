"""The budget auto: each image has the share of its tokens that its question needs."""

from __future__ import annotations

from typing import Any

import pytest

from mmtok_deploy.auto_budget import SHARES, Asked
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
    assert auto_of(account) == [{"asks": asked, "share": f"{100 * share}%"}]
    # The same tokens for the same question, however many were asked for: one entry in all caches.
    again = served.ask(chat, mmtok_budget=f"{100 * share}%")
    assert auto_of(again) == [None]
    assert again["prompt_tokens"] == account["prompt_tokens"]
    assert again["cached_tokens"] == served.from_cache(account["prompt_tokens"] - 1)


def test_each_image_has_the_share_of_its_own_question(served: Served) -> None:
    later = WHERE.then("assistant", "Left.").then("user", small("chelsea"), "What does it say?")
    account = served.ask(later, mmtok_budget="auto")
    served.check(later, account, [float(SHARES["where"]), float(SHARES["read"])])
    assert auto_of(account) == [{"asks": "where", "share": "5%"}, {"asks": "read", "share": "50%"}]
