from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from mmtok_bench.pocket.questions import Question
from mmtok_bench.quality.asking import Asker, Request, RequestError, Said
from tests.bench.quality.stand_in import Reply, completion, question_of, serving

POSITION = Question("position", "Where is the red star?", "top left")
FIELDS: dict[str, str | int] = {"mmtok_budget": "25%"}


def ask(reply: Reply, questions: list[Question], num_at_once: int = 4, max_tokens: int | None = None) -> list[Said]:
    async def run(url: str) -> list[Said]:
        async with Asker(url, num_at_once=num_at_once, max_tokens=max_tokens) as asker:
            return await asker.ask_all([Request("data:,", each, FIELDS) for each in questions], lambda: None)

    with serving(reply) as url:
        return asyncio.run(run(url))


def test_answers_come_in_the_order_of_the_questions() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number = int(question_of(body))
        time.sleep(0.05 * (number % 3))
        return 200, completion(f"said {number}", number)

    said = ask(reply, [Question("count", str(number), "0") for number in range(12)])
    assert [(each.text, each.num_image_tokens) for each in said] == [(f"said {n}", n) for n in range(12)]


def test_no_more_requests_at_once_than_allowed() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return 200, completion("yes", 4)

    ask(reply, [POSITION] * 20, num_at_once=3)
    assert most == 3


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 2), (7, 7)])
def test_what_is_sent(max_tokens: int | None, expected: int) -> None:
    sent: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        sent.append(body)
        return 200, completion("top left", 4)

    ask(reply, [POSITION], max_tokens=max_tokens)
    assert (sent[0]["max_tokens"], sent[0]["temperature"]) == (expected, 0)
    assert sent[0]["mm_processor_kwargs"] == FIELDS


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (
            400,
            {"error": {"message": "no such budget"}},
            "'Where is the red star.' with .*25%.* failed: .*no such budget",
        ),
        (200, {**completion("top left", 4), "usage": None}, "without text or usage"),
        (200, completion(None, 4), "without text or usage"),
    ],
)
def test_a_failed_request_is_an_error(status: int, answer: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask(lambda body: (status, answer), [POSITION] * 8)
