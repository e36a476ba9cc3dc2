"""The agent's client against a real HTTP server that answers as it is told."""

from __future__ import annotations

import asyncio
import gzip
import io
import re
import subprocess
import sys
import zlib
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import BasicAuth, web
from multidict import CIMultiDict
from PIL import Image
from sglang.srt.utils import ImageData

from mmtok_sglang import agent as agent_module
from mmtok_sglang.agent import Agent, refuse_chains
from mmtok_sglang.flush_count import make_flush_count
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
        if isinstance(answer, web.HTTPException):
            raise answer
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


def num_skipped() -> float:
    return value("agent_skips_total")


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
        (web.Response(status=503, text="busy"), "HTTP 503: 'busy'"),
        (web.Response(status=204), "HTTP 204"),
        (web.HTTPFound("http://127.0.0.1:9/v1/chat/completions"), "HTTP 302 and a redirect, which is not followed"),
        (web.HTTPTemporaryRedirect("/v1/chat/completions"), "HTTP 307 and a redirect, which is not followed"),
        ({"choices": []}, "no chat completion"),
        ({"error": "no such model"}, "no chat completion: .*no such model"),
        (["a list"], "no chat completion"),
        (web.Response(text="no JSON", content_type="application/json"), "JSONDecodeError"),
        (web.Response(text="<html>"), "JSONDecodeError"),
        (web.Response(body=b"\xff\xfe\xff"), "UnicodeDecodeError"),
        (web.Response(body=b""), "JSONDecodeError"),
        (web.Response(text="[" * 65_000), "RecursionError"),
        (web.Response(text='{"choices":' * 5_000), "RecursionError"),
        (web.Response(text="9" * 60_000), "ValueError"),
        (web.Response(body=b" " * 70_000), "more than 65536 bytes"),
        (web.Response(body=gzip.compress(b" " * 10**8), headers={"Content-Encoding": "gzip"}), "packed by 'gzip'"),
        (
            web.Response(body=zlib.compress(b" " * 10**8), headers={"Content-Encoding": "deflate"}),
            "packed by 'deflate'",
        ),
        ({"choices": {"0": 1}}, "no chat completion"),
        ({"choices": "text"}, "no chat completion"),
        ({"choices": [[]]}, "no chat completion"),
        ({"choices": [{"message": "text"}]}, "no chat completion"),
        ({"choices": [{"message": {"content": 3}}]}, "its content is a int, expected a text"),
        ({"choices": [{"message": {"content": ["a"]}}]}, "its content is a list, expected a text"),
        ({"choices": [{"message": {"content": {"text": "a"}}}]}, "its content is a dict, expected a text"),
        (None, "no chat completion"),
    ],
)
def test_what_is_no_answer_is_an_error_that_is_counted(caplog: pytest.LogCaptureFixture, answer: Any, why: str) -> None:
    before = counted()
    assert joined(Endpoint(lambda _: answer), [CAT], ["A cat?"], [True]) == ["A cat?"]
    assert since(before) == [1, 0, 1]
    assert caplog.records[0].levelname == "WARNING"
    assert re.search(why, caplog.messages[0])


@pytest.mark.parametrize("images", [[CAT], [CAT, CAT, CAT], [], None])
def test_images_that_are_not_one_a_text_are_not_sent(images: Any) -> None:
    endpoint, before = Endpoint(), counted()
    assert joined(endpoint, images, ["A cat?", "A dog?"], [True, True]) == ["A cat?", "A dog?"]
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


@asynccontextmanager
async def speaking(send: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that reads a request's head and then writes what it likes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await send(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


async def reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def half_an_answer(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b'Content-Length: 1000\r\n\r\n{"choices": [')
    await writer.drain()


async def no_http(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\x01\x02 220 ready\r\n\r\n")
    await writer.drain()


async def endless_body(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while not writer.transport.is_closing():
        writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
        await writer.drain()


async def endless_head(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    while not writer.transport.is_closing():
        writer.write(b"X-More: " + b"a" * 1000 + b"\r\n")
        await writer.drain()


async def drop_by_drop(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"Content-Length: 1000\r\n\r\n")
    while not writer.transport.is_closing():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("send", "is_timeout"),
    [
        (reset, False),
        (half_an_answer, False),
        (no_http, False),
        (endless_body, False),
        (endless_head, False),
        (drop_by_drop, True),
    ],
)
def test_a_connection_that_misbehaves_ends_no_request(
    send: Callable[[asyncio.StreamWriter], Awaitable[None]], is_timeout: bool
) -> None:
    async def ask() -> list[str]:
        async with speaking(send) as url:
            return await Agent(url, "small", 1000 if is_timeout else 20_000).join([CAT], ["A cat?"], [True])

    before = counted()
    assert asyncio.run(ask()) == ["A cat?"]
    assert since(before) == [1, is_timeout, not is_timeout]


def test_half_a_surrogate_pair_is_no_letter() -> None:
    answer = web.Response(text='{"choices": [{"message": {"content": "a \\ud800 cat"}}]}')
    (text,) = joined(Endpoint(lambda _: answer), [CAT], ["A cat?"], [True])
    assert text == "A cat? a ? cat"
    text.encode()


def test_a_question_says_that_it_is_for_an_agent_and_asks_for_nothing_packed() -> None:
    heads: list[Any] = []

    class Listening(Endpoint):
        async def _complete(self, request: web.Request) -> web.StreamResponse:
            heads.append(request.headers)
            return await super()._complete(request)

    joined(Listening(), [CAT], ["A cat?"], [True])
    assert heads[0]["X-MMTok-Agent"] == "1"
    assert heads[0]["Accept-Encoding"] == "identity"


def test_a_server_with_an_agent_refuses_what_is_for_an_agent() -> None:
    convert = refuse_chains(lambda original, serving, request, raw_request: request)
    for raw_request in (None, SimpleNamespace(headers=CIMultiDict({"X-Other": "1"}))):
        assert convert(None, None, "a chat", raw_request) == "a chat"
    with pytest.raises(ValueError, match="answers no question that is for an agent"):
        convert(None, None, "a chat", SimpleNamespace(headers=CIMultiDict({"x-mmtok-agent": "1"})))


def test_so_many_calls_are_under_way_and_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "_MAX_CALLS", 3)
    now, most = 0, 0

    class Counting(Endpoint):
        async def _complete(self, request: web.Request) -> web.StreamResponse:
            nonlocal now, most
            now += 1
            most = max(most, now)
            try:
                return await super()._complete(request)
            finally:
                now -= 1

    async def ask(agent: Agent) -> list[list[str]]:
        return await asyncio.gather(*(agent.join([CAT], [f"text {place}"], [True]) for place in range(12)))

    answers = with_agent(Counting(delay_s=0.05), ask)
    assert all("an answer to" in text for (text,) in answers)
    assert most == 3


class TestBreaker:
    def test_it_opens_tries_once_and_closes(self, caplog: pytest.LogCaptureFixture) -> None:
        now_s = 1000.0
        endpoint = Endpoint(lambda text: says("well") if text.startswith("well") else web.Response(status=500))

        async def ask(url: str) -> None:
            nonlocal now_s
            agent = Agent(url, "small", 20_000, now_s=lambda: now_s)

            async def asks(text: str) -> bool:
                """Whether the endpoint was asked."""
                num_asked, skipped = len(endpoint.requests), num_skipped()
                (answer,) = await agent.join([CAT], [text], [True])
                assert answer == (
                    f"{text} well" if text.startswith("well") and len(endpoint.requests) > num_asked else text
                )
                is_asked = len(endpoint.requests) == num_asked + 1
                assert num_skipped() - skipped == (not is_asked)
                return is_asked

            assert [await asks(f"ill {place}") for place in range(7)] == [True] * 5 + [False] * 2
            now_s += 29.9
            assert not await asks("well early")
            now_s += 0.2
            # Several at once: one of them tries.
            assert sum([await asks("ill again"), await asks("well too early")]) == 1
            now_s += 30.1
            assert await asks("well now")
            assert [await asks(f"ill later {place}") for place in range(6)] == [True] * 5 + [False]
            # What is remembered is not asked.
            assert await agent.join([CAT], ["well now"], [True]) == ["well now well"]

        async def run() -> None:
            async with endpoint.served() as url:
                await ask(url)

        asyncio.run(run())
        assert any("it failed 5 times" in message for message in caplog.messages)

    def test_one_tries_at_a_time(self) -> None:
        now_s = 1000.0
        endpoint = Endpoint(lambda text: web.Response(status=500), delay_s=0.2)

        async def run() -> None:
            nonlocal now_s
            async with endpoint.served() as url:
                agent = Agent(url, "small", 20_000, now_s=lambda: now_s)
                for place in range(5):
                    await agent.join([CAT], [f"ill {place}"], [True])
                now_s += 31
                await asyncio.gather(*(agent.join([CAT], [f"text {place}"], [True]) for place in range(8)))

        asyncio.run(run())
        assert len(endpoint.requests) == 6

    def test_a_client_that_leaves_the_trial_leaves_it_to_the_next(self) -> None:
        now_s = 1000.0
        endpoint = Endpoint(lambda text: says("well") if text == "well" else web.Response(status=500), delay_s=0.1)

        async def run() -> list[str]:
            nonlocal now_s
            async with endpoint.served() as url:
                agent = Agent(url, "small", 20_000, now_s=lambda: now_s)
                for place in range(5):
                    await agent.join([CAT], [f"ill {place}"], [True])
                now_s += 31
                leaving = asyncio.ensure_future(agent.join([CAT], ["well"], [True]))
                while len(endpoint.requests) < 6:
                    await asyncio.sleep(0.01)
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
                return await agent.join([CAT], ["well"], [True])

        assert asyncio.run(run()) == ["well well"]

    @pytest.mark.parametrize("status", [400, 413, 415, 422])
    def test_what_is_the_questions_fault_opens_nothing(self, status: int) -> None:
        endpoint = Endpoint(lambda text: web.Response(status=status))

        async def ask(agent: Agent) -> None:
            for place in range(8):
                await agent.join([CAT], [f"text {place}"], [True])

        with_agent(endpoint, ask)
        assert len(endpoint.requests) == 8

    def test_a_hung_agent_opens_it_and_unreadable_images_do_not(self) -> None:
        endpoint = Endpoint(delay_s=60)

        async def ask(agent: Agent) -> None:
            for place in range(8):
                await agent.join([b"no image"], [f"text {place}"], [True])
            for place in range(8):
                await agent.join([CAT], [f"text {place}"], [True])

        before = counted()
        with_agent(endpoint, ask, timeout_ms=100)
        assert len(endpoint.requests) == 5
        assert since(before) == [13, 5, 8]


def test_warnings_are_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    async def ask(agent: Agent) -> None:
        for place in range(50):
            await agent.join([CAT], [f"text {place}"], [True])

    before = counted()
    with_agent(Endpoint(lambda _: web.Response(status=422)), ask)
    assert since(before) == [50, 0, 50]
    assert len(caplog.records) == 5


def test_images_and_texts_that_run_together_are_told_apart() -> None:
    endpoint = Endpoint()
    cat, dog = "https://example.com/cat.png", "https://example.com/dog.png"

    async def ask(agent: Agent) -> None:
        await agent.join([cat], [f"{dog}\nA cat?"], [True])
        await agent.join([cat, dog], ["A cat?"] * 2, [True] * 2)

    with_agent(endpoint, ask)
    assert len(endpoint.requests) == 2


def test_a_flush_forgets_the_answers_and_those_still_to_come() -> None:
    endpoint = Endpoint(delay_s=0.1)

    async def ask(agent: Agent) -> None:
        under_way = asyncio.ensure_future(agent.join([DOG], ["A dog?"], [True]))
        await agent.join([CAT], ["A cat?"], [True])
        agent.clear()
        await under_way
        await agent.join([CAT], ["A cat?"], [True])
        await agent.join([CAT], ["A cat?"], [True])

    async def late(agent: Agent) -> None:
        under_way = asyncio.ensure_future(agent.join([DOG], ["A dog?"], [True]))
        while not endpoint.requests:
            await asyncio.sleep(0.01)
        agent.clear()
        await under_way
        await agent.join([DOG], ["A dog?"], [True])

    with_agent(endpoint, ask)
    assert [body["messages"][0]["content"][-1]["text"] for body in endpoint.requests].count("A cat?") == 2
    endpoint.requests.clear()
    with_agent(endpoint, late)
    assert len(endpoint.requests) == 2


SECRETS = ("jürgen:p@ss/word", "jürgen", "p@ss/word", "t0ken-abc", "j%C3%BCrgen", "p%40ss%2Fword")


@pytest.mark.parametrize("status", [200, 401])
def test_credentials_are_sent_and_never_logged(caplog: pytest.LogCaptureFixture, status: int) -> None:
    seen: list[web.Request] = []

    class Echo(Endpoint):
        async def _complete(self, request: web.Request) -> web.StreamResponse:
            seen.append(request)
            if status == 200:
                return web.json_response(says("a cat"))
            told = f"bad {request.headers['Authorization']} {request.path_qs} {' '.join(SECRETS)}"
            return web.Response(status=status, text=told[:180])

    async def run() -> list[str]:
        async with Echo().served() as url:
            address = url.replace("//", "//j%C3%BCrgen:p%40ss%2Fword@") + "?key=t0ken-abc&v=1"
            return await Agent(address, "small", 20_000).join([CAT], ["A cat?"], [True])

    assert asyncio.run(run()) == ["A cat? a cat" if status == 200 else "A cat?"]
    assert dict(seen[0].query) == {"key": "t0ken-abc", "v": "1"}
    assert BasicAuth.decode(seen[0].headers["Authorization"]) == BasicAuth("jürgen", "p@ss/word")
    logged = caplog.text
    assert (status == 401) == ("***@127.0.0.1:" in logged)
    basic = seen[0].headers["Authorization"].removeprefix("Basic ")
    assert not any(secret in logged for secret in (*SECRETS, basic))


def test_credentials_are_not_in_what_a_library_says(caplog: pytest.LogCaptureFixture) -> None:
    address = "http://me:s3cret-word@127.0.0.1:9/v1?key=t0ken-abc"
    assert asyncio.run(Agent(address, "small", 20_000).join([CAT], ["A cat?"], [True])) == ["A cat?"]
    assert "http://***@127.0.0.1:9/v1?***" in caplog.text
    assert "s3cret" not in caplog.text
    assert "t0ken" not in caplog.text


def test_a_flush_that_reaches_another_process_forgets_the_answers_too() -> None:
    flush_count = make_flush_count()
    endpoint = Endpoint()
    raised = f"from mmtok_sglang.flush_count import FlushCount; FlushCount({flush_count!r}).add()"

    async def ask(url: str) -> None:
        agent = Agent(url, "small", 20_000, flush_count)
        for _ in range(2):
            await agent.join([CAT], ["A cat?"], [True])
        assert len(endpoint.requests) == 1
        subprocess.run([sys.executable, "-c", raised], check=True)
        await agent.join([CAT], ["A cat?"], [True])

    async def run() -> None:
        async with endpoint.served() as url:
            await ask(url)

    asyncio.run(run())
    assert len(endpoint.requests) == 2
