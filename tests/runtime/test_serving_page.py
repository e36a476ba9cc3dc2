"""What the page of `mmtok demo --page --url URL --model-path FOLDER` draws is what that server reads."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from starlette.testclient import TestClient

from mmtok_bench.page.app import make_app
from mmtok_bench.page.command import content_of
from mmtok_bench.page.served import RunningServer
from mmtok_bench.selected_patches import OneGridFamily
from tests.runtime.chats import Chat
from tests.runtime.conftest import checkpoint
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

QUESTION = "What is in this cup?"
# The last pick's gain is 1.9% and more above the next token's, and the next token in its place moves logprobs by 0.25.
BUDGET = 40


def test_the_page_draws_the_patches_that_the_server_keeps(served: Served) -> None:
    if served.family not in get_args(OneGridFamily):
        pytest.skip("the page shows no patches of this family")
    running = RunningServer(served.server.url)
    # The page does not follow --mmtok-min-tokens-in; this picture has more tokens than that.
    content = content_of(running.url, {**running.info, "mmtok_min_tokens_in": 0}, checkpoint(served.family))
    asked = {"picture": "coffee", "question": QUESTION}
    runs = [{"budget": "all"}, {"budget": str(BUDGET), "method": "mmtok"}]
    with TestClient(make_app(content, running), base_url="http://127.0.0.1") as page:
        drawn = page.post("/api/selection", json={**asked, "method": "mmtok"}).json()
        lines = page.post("/api/answers", json={**asked, "runs": runs}).text.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event for event in events if "error" in event] == []
    (told,) = (event["account"]["images"][0] for event in events if event["run"] == 1 and "account" in event)
    assert (told["tokens_in"], told["tokens_kept"]) == (drawn["tokens"], BUDGET)
    assert told["coverage"] == pytest.approx(drawn["coverage"][BUDGET - 1], abs=2e-4)
    # A coverage may be that of other tokens; logprobs are those of these alone, even of one other among them.
    chat = Chat.ask(content.pictures.get("coffee").sent, QUESTION)
    account = served.ask(chat, mmtok_budget=BUDGET)
    prompt = served.judge.prompt(chat.for_template())
    order = drawn["order"]
    for kept, is_theirs in ((order[:BUDGET], True), ([*order[: BUDGET - 1], order[BUDGET]], False)):
        pruned = served.judge.prune(
            *(prompt, chat.images, chat.guidance, BUDGET), kept=[torch.tensor(sorted(kept), dtype=torch.int64)]
        )
        assert (served.judge.max_error(pruned, account) < LOGPROB_TOLERANCE) is is_theirs
