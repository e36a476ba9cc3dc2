"""What the prefix cache shares, and what it must not."""

from __future__ import annotations

import pytest

from tests.runtime.chats import Chat, small
from tests.runtime.serving import Served

CUP = "What is in this cup?"
CATS = "How many cats are on the red table?"


@pytest.fixture
def cached(served: Served) -> Served:
    served.flush_cache()
    return served


def test_same_image_and_question_hit_the_cache(cached: Served) -> None:
    chat = Chat.ask(small("coffee"), CUP)
    first, again = cached.ask(chat), cached.ask(chat)
    assert first["cached_tokens"] == 0
    assert again["cached_tokens"] == again["prompt_tokens"] - 1
    cached.check(chat, again)


def test_another_question_shares_only_the_text_before_the_image(cached: Served) -> None:
    first, other = Chat.ask(small("coffee"), CUP), Chat.ask(small("coffee"), CATS)
    cached.ask(first)
    account = cached.ask(other)
    assert account["cached_tokens"] == _tokens_before_the_image(cached, other)
    cached.check(other, account)


@pytest.mark.parametrize("budget", ["all", "20%", 30])
def test_another_budget_shares_only_the_text_before_the_image(cached: Served, budget: str | int) -> None:
    chat = Chat.ask(small("coffee"), CUP)
    cached.ask(chat)
    assert cached.ask(chat, mmtok_budget=budget)["cached_tokens"] == _tokens_before_the_image(cached, chat)


def test_a_later_turn_keeps_the_selection_and_hits_the_cache(cached: Served) -> None:
    first = Chat.ask(small("coffee"), CUP)
    account = cached.ask(first)
    later = first.then("assistant", "A cup.").then("user", CATS)
    later_account = cached.ask(later)
    assert later_account["cached_tokens"] >= account["prompt_tokens"]
    cached.check(later, later_account)


def test_an_image_encoded_before_is_right_under_another_prompt(cached: Served) -> None:
    """The embedding comes from SGLang's cache, and so do the positions that go with it."""
    cached.ask(Chat.ask(small("coffee"), CUP))
    chat = Chat.ask("Look:", small("coffee"), CUP)
    repeated = Chat((("system", ("Be brief.",)),)).then("user", small("coffee"), CUP)
    for other in (chat, repeated):
        cached.check(other, cached.ask(other, mmtok_guidance=CUP), guidance=[CUP])


def _tokens_before_the_image(served: Served, chat: Chat) -> int:
    ids = served.judge.processor.tokenizer(served.judge.prompt(chat.for_template()))["input_ids"]
    before: int = ids.index(served.judge.model.config.image_token_id)
    return before
