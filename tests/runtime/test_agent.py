"""The agent's client against a real HTTP server that answers as it is told."""

from __future__ import annotations

import asyncio
import io
import re
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from PIL import Image
from sglang.srt.utils import ImageData

from mmtok_deploy.runtime.sglang.agent import Agent
from tests.runtime.chats import data_url
from tests.runtime.test_metrics import value

CAT, DOG = (data_url(Image.new("RGB", (4, 4), colour)) for colour in ("red", "blue"))


def says(content: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


class Endpoint:
    """Chat completions; `answer` makes one of a request's text, and each request is kept."""

    def __init__(self, answer: Callable[[str], Any] = lambda text: says(f"an answer to {text}"), delay_s: float = 0):
        self.requests: list[Any] = []
        self._answer = answer
        self._delay_s = delay_s

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        await asyncio.sleep(self._delay_s)
        answer = self._answer(body["messages"][0]["content"][-1]["text"])
        return answer if isinstance(answer, web.Response) else web.json_response(answer)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()


def with_agent(
    endpoint: Endpoint, use: Callable[[Agent], Awaitable[Any]], timeout_ms: int = 20_000, suffix: str = ""
) -> Any:
    async def run() -> Any:
        async with endpoint.served() as url:
            return await use(Agent(url + suffix, "small", timeout_ms))

    return asyncio.run(run())


def joined(endpoint: Endpoint, images: list[Any], texts: list[str], wanted: list[bool], **options: Any) -> list[str]:
    texts_with_answers: list[str] = with_agent(endpoint, lambda agent: agent.join(images, texts, wanted), **options)
    return texts_with_answers


def counted() -> list[float]:
    return [value(f"agent_{name}") for name in ("milliseconds_count", "timeouts_total", "errors_total")]


def since(before: list[float]) -> list[float]:
    return [now - then for now, then in zip(counted(), before, strict=True)]


@pytest.mark.parametrize("suffix", ["", "/"])
def test_the_answer_joins_the_question(suffix: str) -> None:
    endpoint, before = Endpoint(), counted()
    assert joined(endpoint, [CAT], ["A cat?"], [True], suffix=suffix) == ["A cat? an answer to A cat?"]
    (request,) = endpoint.requests
    assert request["model"] == "small"
    assert request["temperature"] == 0
    assert 0 < request["max_tokens"] <= 64
    (message,) = request["messages"]
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": CAT}},
        {"type": "text", "text": "A cat?"},
    ]
    assert since(before) == [1, 0, 0]


def test_images_of_one_text_are_asked_about_together_and_others_not_at_all() -> None:
    endpoint = Endpoint()
    texts = ["two", "two", "one", "", "  ", "kept whole", "two"]
    wanted = [True, True, True, True, True, False, False]
    images = [CAT, DOG, CAT, CAT, CAT, CAT, CAT]
    answered = joined(endpoint, images, texts, wanted)
    assert answered == ["two an answer to two"] * 2 + ["one an answer to one", "", "  ", "kept whole", "two"]
    sent = sorted(
        [part["image_url"]["url"] for part in body["messages"][0]["content"][:-1]] for body in endpoint.requests
    )
    assert sent == sorted([[CAT, DOG], [CAT]])


def test_texts_are_asked_side_by_side() -> None:
    endpoint = Endpoint(delay_s=0.5)
    answered = joined(endpoint, [CAT] * 8, [f"text {place}" for place in range(8)], [True] * 8, timeout_ms=3000)
    assert all("an answer to" in text for text in answered)


@pytest.mark.parametrize("image", ["object", "bytes", "wrapped", "address"])
def test_every_form_of_an_image_reaches_the_agent(image: str) -> None:
    picture = Image.new("RGB", (4, 4), "red")
    file = io.BytesIO()
    picture.save(file, "PNG")
    address = "https://example.com/cat.png"
    given = {"object": picture, "bytes": file.getvalue(), "wrapped": ImageData(url=CAT), "address": address}[image]
    endpoint = Endpoint()
    joined(endpoint, [given], ["A cat?"], [True])
    url = endpoint.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    if image == "address":
        assert url == address
    else:
        sent = Image.open(io.BytesIO(b64decode(url.removeprefix("data:image/png;base64,"))))
        assert (sent.size, sent.getpixel((0, 0))) == ((4, 4), (255, 0, 0))


def test_after_the_time_limit_the_question_alone_guides(caplog: pytest.LogCaptureFixture) -> None:
    endpoint, before = Endpoint(delay_s=60), counted()
    assert joined(endpoint, [CAT], ["A cat?"], [True], timeout_ms=200) == ["A cat?"]
    assert since(before) == [1, 1, 0]
    assert value("agent_milliseconds_sum") >= 200
    assert "the question alone guides" in caplog.messages[0]
    assert "no answer within 0.2 s" in caplog.messages[0]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (web.Response(status=503, text="busy"), "HTTP 503: busy"),
        ({"choices": []}, "no chat completion"),
        ({"error": "no such model"}, "no chat completion: .*no such model"),
        (["a list"], "no chat completion"),
        (web.Response(text="no JSON", content_type="application/json"), "JSONDecodeError"),
        (web.Response(text="<html>"), "ContentTypeError"),
    ],
)
def test_what_is_no_answer_is_an_error_that_is_counted(caplog: pytest.LogCaptureFixture, answer: Any, why: str) -> None:
    before = counted()
    assert joined(Endpoint(lambda _: answer), [CAT], ["A cat?"], [True]) == ["A cat?"]
    assert since(before) == [1, 0, 1]
    assert caplog.records[0].levelname == "WARNING"
    assert re.search(why, caplog.messages[0])


def test_images_that_are_not_one_a_text_are_not_sent() -> None:
    endpoint, before = Endpoint(), counted()
    assert joined(endpoint, [CAT], ["A cat?", "A dog?"], [True, True]) == ["A cat?", "A dog?"]
    assert endpoint.requests == []
    assert since(before) == [0, 0, 1]


def test_an_agent_that_is_not_there_is_an_error_that_is_counted() -> None:
    before = counted()
    # Port 9, which nothing listens on.
    answered = asyncio.run(Agent("http://127.0.0.1:9/v1", "small", 20_000).join([CAT], ["A cat?"], [True]))
    assert answered == ["A cat?"]
    assert since(before) == [1, 0, 1]


def test_an_image_that_cannot_be_read_is_left_to_the_processor() -> None:
    before = counted()
    assert joined(Endpoint(), [b"no image"], ["A cat?"], [True]) == ["A cat?"]
    assert since(before) == [1, 0, 1]


@pytest.mark.parametrize("content", [None, "", "  "])
def test_an_empty_answer_adds_nothing(content: Any) -> None:
    before = counted()
    assert joined(Endpoint(lambda _: says(content)), [CAT], ["A cat?"], [True]) == ["A cat?"]
    assert since(before) == [1, 0, 0]


def test_an_endless_answer_is_cut() -> None:
    (text,) = joined(Endpoint(lambda _: says("word " * 10_000)), [CAT], ["A cat?"], [True])
    assert len(text) < 300


def test_the_same_question_about_the_same_image_is_asked_once() -> None:
    endpoint, before = Endpoint(), counted()

    async def ask(agent: Agent) -> list[str]:
        return [
            (await agent.join([image], [text], [True]))[0]
            for image, text in ((CAT, "A cat?"), (CAT, "A cat?"), (DOG, "A cat?"), (CAT, "A dog?"), (CAT, "A cat?"))
        ]

    answers = with_agent(endpoint, ask)
    assert answers[0] == answers[1] == answers[4] == "A cat? an answer to A cat?"
    assert len(endpoint.requests) == 3
    assert since(before) == [3, 0, 0]


def test_a_failure_is_not_remembered() -> None:
    answers = iter([web.Response(status=503), says("a cat")])
    endpoint = Endpoint(lambda _: next(answers))

    async def ask(agent: Agent) -> list[list[str]]:
        return [await agent.join([CAT], ["A cat?"], [True]) for _ in range(2)]

    assert with_agent(endpoint, ask) == [["A cat?"], ["A cat? a cat"]]


def test_the_event_loop_goes_on_while_the_agent_thinks() -> None:
    async def ask(agent: Agent) -> int:
        waiting = asyncio.ensure_future(agent.join([CAT], ["A cat?"], [True]))
        num_turns = 0
        while not waiting.done():
            await asyncio.sleep(0.01)
            num_turns += 1
        return num_turns

    assert with_agent(Endpoint(delay_s=0.5), ask) > 20
