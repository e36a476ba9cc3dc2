from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from mmtok_bench.client import Answer, RequestError, ask, image_url, in_parallel, openai_client
from tests.bench.quality.stand_in import Reply, completion, question_of, serving

USAGE = {
    "prompt_tokens": 125,
    "completion_tokens": 2,
    "total_tokens": 127,
    "prompt_tokens_details": {"cached_tokens": 40, "image_tokens": 29},
}


def chunk(content: str | None = None, usage: dict[str, Any] | None = None) -> dict[str, Any]:
    choices = [] if content is None else [{"index": 0, "delta": {"content": content}, "finish_reason": None}]
    kind = "chat.completion.chunk"
    return {"id": "1", "object": kind, "created": 0, "model": "default", "choices": choices, "usage": usage}


def client_of(chunks: list[dict[str, Any]], requests: list[dict[str, Any]]) -> openai.OpenAI:
    """Returns a client of a server that streams these chunks and notes what it was asked."""

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(json.loads(request.content))
        events = [*(json.dumps(each) for each in chunks), "[DONE]"]
        body = "".join(f"data: {event}\n\n" for event in events)
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=body)

    transport = httpx.Client(transport=httpx.MockTransport(handle))
    return openai.OpenAI(base_url="http://server/v1", api_key="none", http_client=transport)


def test_an_answer_is_put_together_and_its_tokens_counted() -> None:
    requests: list[dict[str, Any]] = []
    client = client_of([chunk(""), chunk("a cu"), chunk("p"), chunk(usage=USAGE)], requests)
    answer = ask(client, "data:image/png;base64,AA==", "What is it?", max_tokens=2)
    assert answer.text == "a cup"
    assert answer.ttft_ms > 0
    assert (answer.num_prompt_tokens, answer.num_image_tokens, answer.num_cached_tokens) == (125, 29, 40)
    (request,) = requests
    assert request["stream_options"] == {"include_usage": True}
    assert request["messages"][0]["content"][1] == {"type": "text", "text": "What is it?"}
    assert (request["max_tokens"], request["ignore_eos"], request["temperature"]) == (2, True, 0)


@pytest.mark.parametrize(("chunks", "missing"), [([chunk("a")], "usage"), ([chunk(usage=USAGE)], "text")])
def test_a_stream_without_text_or_usage_is_refused(chunks: list[dict[str, Any]], missing: str) -> None:
    with pytest.raises(RequestError, match=f"came back without {missing}"):
        ask(client_of(chunks, []), "", "What is it?")


def test_logprobs_are_those_of_the_answer_as_a_whole() -> None:
    requests: list[dict[str, Any]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(json.loads(request.content))
        tokens: list[dict[str, Any]] = [
            {"token": each, "logprob": logprob, "top_logprobs": []} for each, logprob in (("a", -0.5), ("b", -1))
        ]
        message = {"role": "assistant", "content": "ab"}
        choice = {"index": 0, "finish_reason": "length", "message": message, "logprobs": {"content": tokens}}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "default", "choices": [choice]}
        return httpx.Response(200, json=answer | {"usage": USAGE})

    transport = httpx.Client(transport=httpx.MockTransport(handle))
    client = openai.OpenAI(base_url="http://server/v1", api_key="none", http_client=transport)
    answer = ask(client, "data:,", "What is it?", with_logprobs=True)
    assert (answer.text, answer.logprobs, answer.num_image_tokens) == ("ab", (-0.5, -1), 29)
    assert requests[0]["logprobs"] is True
    assert not requests[0].get("stream")


def test_an_image_travels_as_a_png() -> None:
    assert image_url(Image.new("RGB", (2, 2))).startswith("data:image/png;base64,iVBORw0KGgo")


FIELDS = {"mm_processor_kwargs": {"mmtok_budget": "25%"}}


def ask_all(reply: Reply, questions: list[str], num_at_once: int = 4) -> list[Answer]:
    with serving(reply) as url:
        client = openai_client(url)
        return in_parallel(
            num_at_once, lambda question: ask(client, "data:,", question, max_tokens=2, fields=FIELDS), questions
        )


def test_answers_come_in_the_order_of_the_questions() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number = int(question_of(body))
        time.sleep(0.05 * (number % 3))
        return 200, completion(f"said {number}", number)

    said = ask_all(reply, [str(number) for number in range(12)])
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

    ask_all(reply, ["Where?"] * 20, num_at_once=3)
    assert most == 3


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (
            400,
            {"error": {"message": "no such budget"}},
            "'Where.' with .*25%.* failed: .*no such budget",
        ),
        (200, {**completion("top left", 4), "usage": None}, "without usage"),
        (200, completion(None, 4), "without text"),
    ],
)
def test_a_failed_request_is_an_error(status: int, answer: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask_all(lambda body: (status, answer), ["Where?"] * 8)
