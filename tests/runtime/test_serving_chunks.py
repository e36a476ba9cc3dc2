"""Chunked prefill through the middle of images, retraction, and embeddings that no cache keeps."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mmtok_deploy.bench.tiny_checkpoints import TinyFamily
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import FAMILIES, judge_of, make_server
from tests.runtime.serving import Served

QUESTION = "What is in this picture, and which colours are there?"
BUDGET: dict[str, float] = {"qwen2.5-vl": 0.5, "llava-1.5": 0.1, "llava-next": 0.1}
# Each chunk of an image encodes it anew, and every eleventh step retracts a request if two or more are decoding.
ENVIRONMENT: dict[str, Any] = {
    "SGLANG_VLM_CACHE_SIZE_MB": "0",
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "11",
}


@pytest.fixture(scope="module", params=FAMILIES)
def chunked(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Chunks of 32 tokens, no cache of embeddings, retractions."""
    family: TinyFamily = request.param
    arguments = (f"--mmtok-budget={BUDGET[family]}", "--chunked-prefill-size=32")
    with make_server(family, *arguments, **ENVIRONMENT) as server:
        yield Served(family, server, judge_of(family))


def test_chunks_through_the_middle_of_images(chunked: Served) -> None:
    for chat in (
        Chat.ask(small("coffee"), QUESTION),
        Chat.ask(small("chelsea"), small("astronaut", 196, 280), QUESTION),
        Chat.ask("First some text, so that the image starts elsewhere in a chunk.", small("coffee"), QUESTION),
    ):
        chunked.check(chat, chunked.ask(chat), BUDGET[chunked.family])


def test_prompts_that_share_their_first_image(chunked: Served) -> None:
    chat = Chat.ask(small("coffee"), small("chelsea"), QUESTION)
    chunked.ask(chat)
    shorter = Chat.ask(small("coffee"), QUESTION)
    chunked.check(shorter, chunked.ask(shorter), BUDGET[chunked.family])
    chunked.check(chat, chunked.ask(chat), BUDGET[chunked.family])


def test_retracted_requests(chunked: Served) -> None:
    chats = [Chat.ask(small(name), f"{QUESTION} {name}") for name in ("coffee", "chelsea", "astronaut", "rocket")]
    with ThreadPoolExecutor(len(chats)) as pool:
        accounts = list(pool.map(lambda chat: chunked.ask(chat, max_tokens=40), chats))
    assert sum(account["num_retractions"] for account in accounts) > 0
    for chat, account in zip(chats, accounts, strict=True):
        chunked.check(chat, account, BUDGET[chunked.family])
