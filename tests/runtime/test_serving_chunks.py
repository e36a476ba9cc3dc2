"""Chunked prefill through the middle of images, retraction, and embeddings that no cache keeps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.runtime.chats import Chat, small
from tests.runtime.serving import Served

QUESTION = "What is in this picture, and which colours are there?"


@pytest.fixture(scope="module")
def chunked(serve: Callable[..., Served]) -> Served:
    """Chunks of 32 tokens, KV cache for two requests or so, and no cache of embeddings: each chunk encodes anew."""
    arguments = ("--chunked-prefill-size=32", "--max-total-tokens=640", "--mmtok-budget=50%", "--page-size=1")
    return serve("qwen2.5-vl", *arguments, SGLANG_VLM_CACHE_SIZE_MB="0")


def test_chunks_through_the_middle_of_images(chunked: Served) -> None:
    for chat in (
        Chat.ask(small("coffee"), QUESTION),
        Chat.ask(small("chelsea"), small("astronaut", 196, 280), QUESTION),
        Chat.ask("First some text, so that the image starts elsewhere in a chunk.", small("coffee"), QUESTION),
    ):
        chunked.check(chat, chunked.ask(chat), 0.5)


def test_prefix_that_ends_inside_an_image(chunked: Served) -> None:
    """The same image and guidance under two continuations, the first of them aborted in the middle of its prefill."""
    chat = Chat.ask(small("coffee"), small("chelsea"), QUESTION)
    chunked.ask(chat)
    shorter = Chat.ask(small("coffee"), QUESTION)
    chunked.check(shorter, chunked.ask(shorter), 0.5)
    chunked.check(chat, chunked.ask(chat), 0.5)


def test_retracted_requests(chunked: Served) -> None:
    chats = [Chat.ask(small(name), f"{QUESTION} {name}") for name in ("coffee", "chelsea", "astronaut", "rocket")]
    with ThreadPoolExecutor(len(chats)) as pool:
        accounts = list(pool.map(lambda chat: chunked.ask(chat, max_tokens=160), chats))
    assert sum(account["num_retractions"] for account in accounts) > 0, "nothing was retracted: make the cache smaller"
    for chat, account in zip(chats, accounts, strict=True):
        chunked.check(chat, account, 0.5)
