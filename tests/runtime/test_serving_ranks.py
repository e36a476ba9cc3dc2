"""Tensor and pipeline parallelism: every rank prunes alike, and later stages know the positions."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmtok_deploy.bench.tiny_checkpoints import TinyFamily
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import FAMILIES, make_server
from tests.runtime.hand_pruned import HandPruned
from tests.runtime.serving import Served

QUESTION = "How many cats are on the red table?"


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize("parallelism", ["--tp-size=2", "--pp-size=2"])
@pytest.mark.parametrize("ranks_family", FAMILIES)
def test_two_ranks(ranks_family: TinyFamily, parallelism: str, judge: Callable[[TinyFamily], HandPruned]) -> None:
    chats = [
        Chat.ask(small("coffee"), QUESTION),
        Chat.ask(small("chelsea"), small("coffee"), QUESTION),
        Chat.ask("No image."),
        Chat.ask(small("coffee"), QUESTION).then("assistant", "None.").then("user", "Why?"),
    ]
    with make_server(ranks_family, "--mmtok-budget=10%", parallelism, num_ranks=2) as server:
        served = Served(ranks_family, server, judge(ranks_family))
        with ThreadPoolExecutor(len(chats)) as pool:
            accounts = list(pool.map(served.ask, chats))
        for chat, account in zip(chats, accounts, strict=True):
            served.check(chat, account)
