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
from tests.runtime.tiny_drafts import draft_arguments

# SGLang reserves room for two rounds behind a request: each of all drafts, or of the branches of all steps.
ROOM = {"ngram": 20, "eagle3": 48, "eagle3-chain": 8, "head": 8}
CASES = [
    *((family, "ngram") for family in FAMILIES if not family.startswith("qwen3.5")),
    *(
        (family, drafts)
        for family in ("qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")
        for drafts in ("eagle3", "eagle3-chain")
    ),
    *(("qwen3.5", "head"), ("qwen3.5-moe", "head")),
]
OFTEN = [("qwen2.5-vl", "ngram"), ("qwen2.5-vl", "eagle3"), ("qwen3.5", "head")]
CONTEXT = 1024

pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id="-".join(case), marks=() if case in OFTEN else pytest.mark.exhaustive) for case in CASES
    ],
)
def speculating(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, str]]:
    """A server that drafts, with chunks of 64 tokens and a retraction at every fifth step."""
    family: FamilyName
    family, drafts = request.param
    judge, folder = judge_of(family), tmp_path_factory.mktemp(family)
    arguments = ["--mmtok-budget=10%", "--chunked-prefill-size=64", f"--context-length={CONTEXT}"]
    arguments += draft_arguments(drafts, judge.model, folder / "draft")
    environment: dict[str, Any] = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    environment |= speculation_environment(folder / "plugin")
    with make_server(family, *arguments, **environment) as server:
        yield Served(family, server, judge), drafts


def test_answers(speculating: tuple[Served, str]) -> None:
    served, _ = speculating
    chats = [*CHATS, *([Chat.ask(film(), QUESTION)] if prunes_videos(served.family) and has_ffmpeg() else [])]
    answers = [served.ask(chat, max_tokens=40) for chat in chats]
    _check(served, chats, answers)
    num_retractions, many = 0, chats * 2
    # Which requests decode at the same time depends on the machine.
    for _ in range(20):
        with ThreadPoolExecutor(len(many)) as pool:
            together = list(pool.map(lambda chat: served.ask(chat, max_tokens=40), many))
        _check(served, many, together)
        answers += together
        num_retractions += sum(account["num_retractions"] for account in together)
        if num_retractions:
            break
    assert num_retractions > 0
    assert sum(account["spec_num_correct_drafts"] for account in answers) > 0


def test_drafts_at_the_end_of_the_context(speculating: tuple[Served, str]) -> None:
    """By itself SGLang would write drafts into the row of another request, or behind the table of all requests."""
    served, drafts = speculating

    def ask(num_words: int, max_tokens: int) -> dict[str, Any]:
        chat = Chat((("system", ("x " * num_words,)),)).then("user", small("coffee"), QUESTION)
        return served.ask(chat, max_tokens=max_tokens)

    short, longer = (ask(num_words, 1)["prompt_tokens"] for num_words in (100, 200))
    num_words = 100 + (CONTEXT - 90 - short) * 100 // (longer - short)
    num_left = CONTEXT - ask(num_words, 1)["prompt_tokens"]
    assert 60 < num_left < 120
    # With a draft model SGLang refuses a request that asks for tokens of the last round.
    account = ask(num_words, num_left if drafts == "ngram" else num_left - ROOM[drafts] // 2)
    assert num_left - ROOM[drafts] <= account["completion_tokens"] < num_left
    assert account["finish_reason"]["type"] == "length"
    served.check(CHATS[0], served.ask(CHATS[0]))


def _check(served: Served, chats: list[Chat], accounts: list[dict[str, Any]]) -> None:
    for chat, account in zip(chats, accounts, strict=True):
        served.check(chat, account)
        # Every token is the model's own next one, as without drafts.
        chosen = [logprob for logprob, _, _ in account["output_token_logprobs"]]
        best = [top[0][0] for top in account["output_top_logprobs"]]
        assert chosen == pytest.approx(best, abs=1e-6)
        assert len(chosen) == 40
