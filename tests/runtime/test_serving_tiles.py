"""A server whose tiles share the budget of their image, against a model pruned by hand that selects so, too."""

from __future__ import annotations

import pytest

from tests.runtime.chats import Chat, small
from tests.runtime.conftest import checkpoint, make_server
from tests.runtime.hand_pruned import HandPruned
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

QUESTION = "What is in this cup, and which colours are there?"

pytestmark = pytest.mark.slow


def test_tiles_share_the_budget_of_their_image() -> None:
    judge = HandPruned("llava-next", checkpoint("llava-next"), share_tiles=True)
    with make_server("llava-next", "--mmtok-budget=10%", "--mmtok-share-tiles") as server:
        served = Served("llava-next", server, judge)
        # 5 tiles; 5 and 3; the first again, from the cache of features.
        chats = [Chat.ask(small("coffee", 600, 400), QUESTION)]
        chats.append(Chat.ask(small("coffee", 600, 400), small("chelsea", 300, 600), "Which of them is a cat?"))
        for chat in chats:
            account = served.ask(chat)
            served.check(chat, account)
            assert [image["tokens_kept"] for image in account["mmtok"][0]["images"]] == [288, 172][: len(chat.images)]
        account = served.ask(chats[0], mmtok_budget=40)
        served.check(chats[0], account, 40)
        assert account["image_tokens"] == 40
        # Tile by tile the answer is another one.
        judge.share_tiles = False
        prompt = judge.prompt(chats[0].for_template())
        tile_by_tile = judge.prune(prompt, chats[0].images, chats[0].guidance, 8)
        assert judge.max_error(tile_by_tile, account) > LOGPROB_TOLERANCE
