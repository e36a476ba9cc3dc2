"""Drafted tokens are verified at the positions of a pruned prompt: answers are those without speculation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mmtok_bench.families import FamilyName
from tests.runtime.chats import CHATS, QUESTION, Chat, small
from tests.runtime.conftest import FAMILIES, judge_of, make_server
from tests.runtime.emulated_speculation import speculation_environment
from tests.runtime.films import film, has_ffmpeg
from tests.runtime.serving import Served, prunes_videos

NUM_DRAFTS = 6
SPECULATED = [name for name in FAMILIES if not name.startswith("qwen3.5")]

pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=[each if each == "qwen2.5-vl" else pytest.param(each, marks=pytest.mark.exhaustive) for each in SPECULATED],
)
def speculating(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with trees of 6 drafts, chunks of 64 tokens, and a retraction at every fifth step."""
    family: FamilyName = request.param
    arguments = ("--mmtok-budget=10%", "--speculative-algorithm=NGRAM", f"--speculative-num-draft-tokens={NUM_DRAFTS}")
    environment: dict[str, Any] = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    environment |= speculation_environment(tmp_path_factory.mktemp(family))
    with make_server(family, *arguments, "--chunked-prefill-size=64", **environment) as server:
        yield Served(family, server, judge_of(family))


def test_answers(speculating: Served) -> None:
    chats = [*CHATS, *([Chat.ask(film(), QUESTION)] if prunes_videos(speculating.family) and has_ffmpeg() else [])]
    _check(speculating, chats, [speculating.ask(chat, max_tokens=40) for chat in chats])
    num_retractions, many = 0, chats * 2
    # Which requests decode at the same time depends on the machine.
    for _ in range(6):
        with ThreadPoolExecutor(len(many)) as pool:
            together = list(pool.map(lambda chat: speculating.ask(chat, max_tokens=40), many))
        _check(speculating, many, together)
        num_retractions += sum(account["num_retractions"] for account in together)
        if num_retractions:
            break
    assert num_retractions > 0


def test_drafts_at_the_end_of_the_context(speculating: Served) -> None:
    """By itself SGLang would write drafts into the row of another request, or behind the table of all requests."""

    def ask(num_words: int, max_tokens: int) -> dict[str, Any]:
        chat = Chat((("system", ("x " * num_words,)),)).then("user", small("coffee"), QUESTION)
        return speculating.ask(chat, max_tokens=max_tokens)

    short, longer = (ask(num_words, 1)["prompt_tokens"] for num_words in (100, 200))
    context = speculating.server.server_info()["context_length"] or 8192
    num_words = 100 + (context - 60 - short) * 100 // (longer - short)
    num_left = context - ask(num_words, 1)["prompt_tokens"]
    assert 40 < num_left < 100
    account = ask(num_words, num_left)
    assert num_left - 2 * NUM_DRAFTS <= account["completion_tokens"] < num_left
    assert account["finish_reason"]["type"] == "length"
    speculating.check(CHATS[0], speculating.ask(CHATS[0]))


def _check(served: Served, chats: list[Chat], accounts: list[dict[str, Any]]) -> None:
    for chat, account in zip(chats, accounts, strict=True):
        served.check(chat, account)
        # Every token is the model's own next one, as without drafts.
        chosen = [logprob for logprob, _, _ in account["output_token_logprobs"]]
        best = [top[0][0] for top in account["output_top_logprobs"]]
        assert chosen == pytest.approx(best, abs=1e-6)
        assert len(chosen) == 40
    assert sum(account["spec_num_correct_drafts"] for account in accounts) > 0
