"""What the caches share, and what they must not."""

from __future__ import annotations

import re
import time

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


def test_another_question_does_not_encode_the_image_again(cached: Served) -> None:
    image = small("rocket", 252, 224)
    encoded, hits = cached.metric("encoded_images_total"), cached.metric("feature_cache_hits_total")
    for question, budget in ((CUP, 0.1), (CATS, 0.1), (CUP, 0.2)):
        chat = Chat.ask(image, question)
        cached.check(chat, cached.ask(chat, mmtok_budget=budget), budget)
    assert cached.metric("encoded_images_total") - encoded == 1
    assert cached.metric("feature_cache_hits_total") - hits == 2


def test_a_flush_forgets_features(cached: Served) -> None:
    image = small("rocket", 224, 252)
    encoded = cached.metric("encoded_images_total")
    for question in (CUP, CATS):
        cached.ask(Chat.ask(image, question))
        assert cached.metric("feature_cache_bytes") > 0
        cached.flush_cache()
        assert cached.metric("feature_cache_bytes") == 0
    assert cached.metric("encoded_images_total") - encoded == 2


def test_what_selection_did_is_in_the_metrics_and_in_the_log(cached: Served) -> None:
    names = ("selections_total", "selection_tokens_in_total", "selection_tokens_kept_total")
    calls = "selection_milliseconds_count"
    before = [cached.metric(name) for name in (*names, calls)]
    account = cached.ask(Chat.ask(small("rocket", 224, 224), small("coffee", 224, 224), CUP))
    selections, tokens_in, tokens_kept, num_calls = (
        cached.metric(name) - value for name, value in zip((*names, calls), before, strict=True)
    )
    assert num_calls == 1
    # LLaVA-NeXT selects from each tile.
    assert selections >= 2
    assert tokens_kept == account["image_tokens"]
    assert tokens_in > 9 * tokens_kept
    assert cached.metric("selection_milliseconds_sum") > 0
    assert re.search(r"MMTok: \d+ selections in 1 calls of .* tokens, 0 fallbacks; ", cached.server.log_text())


PARTS = ("vision_encoder_milliseconds_sum", "selection_milliseconds_sum", "language_prefill_milliseconds_sum")
COUNTS = ("vision_encoder_images_total", "language_prefill_requests_total", "language_prefill_tokens_total")


@pytest.mark.parametrize("budget", ["10%", "all"])
def test_the_parts_of_a_prefill_are_in_the_metrics(cached: Served, budget: str) -> None:
    before = [cached.metric(name) for name in (*PARTS, *COUNTS)]
    chat = Chat.ask(small("astronaut", 224, 252), CUP)
    start_s = time.perf_counter()
    account = cached.ask(chat, max_tokens=1, mmtok_budget=budget)
    to_first_token_ms = (time.perf_counter() - start_s) * 1000
    values = [cached.metric(name) - value for name, value in zip((*PARTS, *COUNTS), before, strict=True)]
    encoder_ms, selection_ms, prefill_ms = values[:3]
    assert encoder_ms > 0
    assert prefill_ms > 0
    assert (selection_ms > 0) is (budget != "all")
    assert encoder_ms + selection_ms + prefill_ms < to_first_token_ms
    assert values[3:] == [1, 1, account["prompt_tokens"]]


def _tokens_before_the_image(served: Served, chat: Chat) -> int:
    ids = served.judge.processor.tokenizer(served.judge.prompt(chat.for_template()))["input_ids"]
    before: int = ids.index(served.judge.model.config.image_token_id)
    return before
