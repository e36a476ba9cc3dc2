"""Videos beside images and text in a batch, in sessions, in caches and unpruned, on the servers of `test_serving`."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mmtok_bench.families import FamilyName
from tests.runtime.chats import Chat, small
from tests.runtime.films import film, needs_ffmpeg, steady
from tests.runtime.serving import LOGPROB_TOLERANCE, Served, prunes_videos

pytestmark = needs_ffmpeg()

QUESTION, OTHER = "Where does the square go?", "What colour is it?"


@pytest.fixture
def filmed(family: FamilyName, request: pytest.FixtureRequest) -> Served:
    """The server with a budget; none is started for a family whose videos are not pruned."""
    if not prunes_videos(family):
        pytest.skip("videos of this family are not pruned")
    served: Served = request.getfixturevalue("served")
    return served


def test_mixed_batch(filmed: Served) -> None:
    filmed.flush_cache()
    asked = Chat.ask(film(), QUESTION)
    both = Chat.ask(film(), small("chelsea"), QUESTION)
    cases: list[tuple[Chat, dict[str, Any], float | int | None]] = [
        (asked, {}, 0.1),
        (both, {"mmtok_video_budget": "frame"}, 0.1),
        (Chat.ask(steady(filmed.family), OTHER), {"mmtok_budget": "50%"}, 0.5),
        (Chat.ask(small("coffee"), film(seed=1), OTHER), {}, 0.1),
        (Chat.ask("Tell me about squares."), {}, 0.1),
        (Chat.ask(small("coffee"), OTHER), {"mmtok_budget": "all"}, None),
        (Chat.ask(film(seed=2), QUESTION), {"mmtok_budget": 7}, 7),
        (asked, {"mmtok_budget": 1_000_000}, None),
        (asked.then("assistant", "Right.").then("user", OTHER), {}, 0.1),
    ]
    with ThreadPoolExecutor(len(cases)) as pool:
        accounts = list(pool.map(lambda case: filmed.ask(case[0], **case[1]), cases))
    for (chat, fields, budget), account in zip(cases, accounts, strict=True):
        filmed.check(chat, account, budget, by_frame="mmtok_video_budget" in fields)


def test_session(filmed: Served) -> None:
    first = Chat.ask(film(seed=6), QUESTION)
    prompt = filmed.judge.prompt(first.for_template())
    session = json.loads(filmed.post("/open_session", {"capacity_of_str_len": 10_000}))
    answer = filmed.generate(prompt, first, session={"id": session})
    filmed.check(first, answer)

    second = Chat.ask(small("chelsea"), film(12, 5.0, seed=9), OTHER)
    turn = filmed.judge.prompt(second.for_template())
    account = filmed.generate(turn, second, session={"id": session, "rid": answer["id"]})
    whole = filmed.judge.prune(
        *(prompt + answer["text"] + turn, second.images, [QUESTION, OTHER, OTHER], 0.1),
        films=[*first.films, *second.films],
    )
    assert account["prompt_tokens"] == len(whole.embeddings)
    assert filmed.judge.max_error(whole, account) < LOGPROB_TOLERANCE
    filmed.post("/close_session", {"session_id": session})


def test_another_question_and_a_later_turn(filmed: Served) -> None:
    """Another question takes the film's features from a cache, a later turn its tokens."""
    filmed.flush_cache()
    encoded, hits = filmed.metric("encoded_images_total"), filmed.metric("feature_cache_hits_total")
    first, other = (Chat.ask(film(seed=4), question) for question in (QUESTION, OTHER))
    account = filmed.ask(first)
    filmed.check(first, account)
    filmed.check(other, filmed.ask(other))
    assert filmed.metric("encoded_images_total") - encoded == 1
    assert filmed.metric("feature_cache_hits_total") - hits == 1
    later = first.then("assistant", "Right.").then("user", OTHER)
    of_later = filmed.ask(later)
    assert of_later["cached_tokens"] >= filmed.from_cache(account["prompt_tokens"])
    filmed.check(later, of_later)


# Films and images of no other test: SGLang keeps embeddings, and one from a batch with others differs in its last bits.
UNSEEN = {
    "a film": lambda: Chat.ask(film(seed=21), QUESTION),
    "a film and an image": lambda: Chat.ask(film(12, 5.0, seed=22), small("rocket", 308, 224), QUESTION),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_the_whole_video_equals_the_server_without_the_plugin(
    filmed: Served, servers: tuple[Served, Served], name: str
) -> None:
    chat, answers = UNSEEN[name](), []
    for served in servers:
        served.flush_cache()
        fields: dict[str, Any] = {"mmtok_budget": "all"} if served is filmed else {}
        answers.append(served.ask(chat, **fields))
    assert answers[0]["video_tokens"] > 200
    for field in ("text", "prompt_tokens", "video_tokens", "output_token_logprobs", "output_top_logprobs"):
        assert answers[0][field] == answers[1][field]
