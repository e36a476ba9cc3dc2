"""Servers of several processes: ranks that prune alike, later stages that know positions, tokenizers that all cut."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmtok_bench.families import FamilyName
from tests.runtime.chats import CHATS, QUESTION, Chat, small
from tests.runtime.conftest import FAMILIES, checkpoint, judge_of, make_server
from tests.runtime.films import film, has_ffmpeg
from tests.runtime.serving import Served, prunes_videos

FILM_CHATS: tuple[Callable[[], Chat], ...] = (
    lambda: Chat.ask(film(), QUESTION),
    lambda: Chat.ask(film(seed=1), small("coffee"), QUESTION),
)
# About an image of before: its features are held by every rank, or by none.
ANOTHER = Chat.ask(small("coffee"), "Which colours are there?")

pytestmark = pytest.mark.slow


def chats_of(family: FamilyName) -> list[Chat]:
    """Returns the chats of a family, with films where they are pruned and can be decoded."""
    films = [make() for make in FILM_CHATS] if prunes_videos(family) and has_ffmpeg() else []
    return [*CHATS, *films]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize("parallelism", ["--tp-size=2", "--pp-size=2"])
@pytest.mark.parametrize("ranks_family", FAMILIES)
def test_two_ranks(ranks_family: FamilyName, parallelism: str) -> None:
    if ranks_family in ("qwen2-vl", "internvl3") and parallelism == "--pp-size=2":
        pytest.skip("refused: SGLang has no pipeline stages for it")
    environment = {}
    if ranks_family.startswith("qwen3-vl") and parallelism == "--pp-size=2":
        # The model has 4 layers, and DeepStack adds to the first three.
        environment = {"SGLANG_PP_LAYER_PARTITION": "3,1"}
    _check(ranks_family, parallelism, num_ranks=2, **environment)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two replicas need two cores")
def test_two_replicas() -> None:
    """Replicas of data parallelism have caches of their own, and requests go to them in turns."""
    arguments = ("--mmtok-budget=10%", "--dp-size=2", "--load-balance-method=round_robin")
    with make_server("qwen2.5-vl", *arguments, num_ranks=2) as server:
        served = Served("qwen2.5-vl", server, judge_of("qwen2.5-vl"))
        for chat in (*chats_of("qwen2.5-vl"), *CHATS[:1]):
            served.check(chat, served.ask(chat))
        assert {"DP0", "DP1"} == set(re.findall(r"(DP\d).*Prefill batch", server.log_text()))


def test_two_tokenizer_workers() -> None:
    """Each worker gets its arguments through shared memory, and installs the hooks as it reads them."""
    _check("qwen2.5-vl", "--tokenizer-worker-num=2")


def _check(family: FamilyName, *arguments: str, num_ranks: int = 1, **environment: str) -> None:
    arguments = ("--mmtok-budget=10%", "--enable-metrics", *arguments)
    with make_server(family, *arguments, num_ranks=num_ranks, **environment) as server:
        served = Served(family, server, judge_of(family))
        chats = chats_of(family)
        with ThreadPoolExecutor(len(chats)) as pool:
            accounts = list(pool.map(served.ask, chats))
        accounts.append(served.ask(ANOTHER))
        for chat, account in zip((*chats, ANOTHER), accounts, strict=True):
            served.check(chat, account)
        assert served.metric("feature_cache_hits_total") > 0
        # What moves keys on reaches all processes between the same two requests, or their prefix caches would differ.
        fallbacks = served.metric("selection_fallbacks_total")
        silent = Chat.ask(small("coffee"))
        fallen = [served.ask(silent, mmtok_method="text-coverage") for _ in range(3)]
        assert fallen[2]["cached_tokens"] == fallen[1]["cached_tokens"] < fallen[1]["prompt_tokens"] - 1
        assert served.metric("selection_fallbacks_total") > fallbacks
        if num_ranks == 1:
            return
        same = {"model_path": str(checkpoint(family)), "flush_cache": False}
        assert served.post("/update_weights_from_disk", same)["success"]
        for num_cached in (0, served.from_cache(accounts[0]["prompt_tokens"] - 1)):
            account = served.ask(CHATS[0])
            served.check(CHATS[0], account)
            assert account["cached_tokens"] == num_cached
