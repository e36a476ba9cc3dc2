from __future__ import annotations

import asyncio
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.http_middleware_patch import _PureASGIDispatch

from mmtok_sglang.entry_points import (
    answer_http,
    engine_async_generate,
    engine_generate,
    generate_request,
)


def a_request(**fields: Any) -> Any:
    return GenerateReqInput(text="x", image_data=["a.png"], **fields)


class Manager:
    """A tokenizer manager that answers with the fields of the request that it was given."""

    async def generate_request(self, obj: Any, request: Any = None) -> Any:
        yield getattr(obj, "mm_processor_kwargs", None)


class Engine:
    """As sgl.Engine makes its requests."""

    def generate(self, prompt: str, image_data: Any = None) -> Any:
        answers = generate_request(Manager.generate_request, Manager(), a_request(), None)
        return asyncio.run(answers.__anext__())

    async def async_generate(self, prompt: str, stream: bool = False) -> Any:
        answers = generate_request(Manager.generate_request, Manager(), a_request(), None)
        return answers if stream else await answers.__anext__()


def answer(body: Any, obj: Any = None) -> Any:
    """Returns what a request made of `body`, which SGLang passed nothing of on, is answered with."""
    request = SimpleNamespace() if body is None else SimpleNamespace(_json=body)
    answers = generate_request(Manager.generate_request, Manager(), obj or a_request(), request)
    return asyncio.run(answers.__anext__())


FIELDS = {"mmtok_budget": "25%", "mmtok_seed": 0}


def test_fields_that_an_entry_point_drops_are_handed_on() -> None:
    assert answer({"model": "tiny", "mm_processor_kwargs": FIELDS}) == FIELDS


@pytest.mark.parametrize("body", [None, {}, [], "text", {"mm_processor_kwargs": None}, {"mm_processor_kwargs": {}}])
def test_without_fields_a_request_stays_as_it_is(body: Any) -> None:
    given = {"mmtok_guidance": ["of a chat"]}
    assert answer(body, a_request(mm_processor_kwargs=given)) == given


def test_fields_go_before_what_the_plugin_read_from_messages() -> None:
    def chat() -> Any:
        return a_request(mm_processor_kwargs={"mmtok_guidance": ["of a chat"], "num_crops": 4})

    sent = {"mmtok_guidance": "my own", "mmtok_budget": 5}
    assert answer({"mm_processor_kwargs": sent}, chat()) == {**sent, "num_crops": 4}
    # Null is SGLang's way of leaving a field out.
    assert answer({"mm_processor_kwargs": {"mmtok_guidance": None, "mmtok_budget": 5}}, chat()) == {
        "mmtok_guidance": ["of a chat"],
        "num_crops": 4,
        "mmtok_budget": 5,
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"mmtok_budget": "25%"}, r'^mmtok_budget stands at the top .* \{"mm_processor_kwargs": \{"mmtok_budget": '),
        ({"mmtok_seed": 1, "mmtok_method": "even", "mm_processor_kwargs": FIELDS}, "^mmtok_method, mmtok_seed stands"),
        ({"extra_body": {"mm_processor_kwargs": FIELDS}}, "extra_body is an argument of OpenAI's Python client"),
        ({"extra_body": FIELDS}, "extra_body is an argument"),
        ({"mm_processor_kwargs": "10%"}, r"mm_processor_kwargs is an object like .*, got '10%'"),
        ({"mm_processor_kwargs": [FIELDS]}, "mm_processor_kwargs is an object like"),
        ({"instances": [{"text": "x"}, FIELDS]}, "mmtok_budget, mmtok_seed stands within instances, where it is not"),
        ({"instances": [{"mm_processor_kwargs": FIELDS}]}, "stands within instances.*: in its parameters"),
        ({"sampling_params": FIELDS}, "stands within sampling_params"),
        ({"messages": [{"role": "user", "content": "x", "mm_processor_kwargs": FIELDS}]}, "stands within messages"),
        ({"messages": [{"content": [{"type": "text"}, {"type": "image_url", **FIELDS}]}]}, "stands within messages"),
        ({"messages": [{"content": [{"image_url": {"url": "x", **FIELDS}}]}]}, "stands within messages"),
        ({"input": [{"content": [{"type": "input_image", "mmtok_budget": 5}]}]}, "stands within input"),
        ({"input": [{"type": "function_call_output", "output": [FIELDS]}]}, "stands within input"),
        (
            {"messages": [{"content": [{"type": "tool_result", "content": [{"source": FIELDS}]}]}]},
            "stands within messages",
        ),
        ({"instances": [{}], "parameters": {"mm_processor_kwargs": FIELDS, **FIELDS}}, "stands within parameters"),
        ({"instances": [{}], "parameters": {"sampling_params": FIELDS}}, "stands within parameters"),
        ({"instances": [{}], "parameters": {"sampling_params": {"mm_processor_kwargs": FIELDS}}}, "within parameters"),
        ({"parameters": {"mm_processor_kwargs": FIELDS}}, "stands within parameters"),
        ({"chat_template_kwargs": FIELDS}, "stands within chat_template_kwargs"),
        ({"images": [{"url": "x", **FIELDS}]}, "stands within images"),
        ({"mmtok-budget": 5}, "^mmtok-budget stands at the top"),
        ({"extra_body": {"MMTOK_BUDGET": 5}}, "extra_body is an argument"),
        ({"mm_processor_kwargs": {"images_kwargs": FIELDS}}, "stands within mm_processor_kwargs.images_kwargs, where"),
        ({"mm_processor_kwargs": {"mmtok_budget": [{"a": FIELDS}]}}, "within mm_processor_kwargs.mmtok_budget, where"),
        (
            {"instances": [{}], "parameters": {"mm_processor_kwargs": {"images_kwargs": FIELDS}}},
            "stands within parameters",
        ),
    ],
)
def test_fields_in_the_wrong_place_are_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer(body)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": "x", "input": 5, "instances": None, "sampling_params": [None, 5, "x", [[]]]},
        {"messages": [{"content": [{"image_url": "x"}, "x", None]}, {"content": None}]},
        # A tool's arguments are the tool's.
        {"tools": [{"function": {"parameters": {"properties": FIELDS}}}]},
        {"messages": [{"content": [{"type": "tool_use", "input": FIELDS}]}, {"tool_calls": [FIELDS]}]},
        {"input": [{"type": "function_call", "arguments": FIELDS}], "text": {"format": {"schema": FIELDS}}},
        {"response_format": {"json_schema": FIELDS}, "sampling_params": {"custom_params": FIELDS}},
        # It is read there, where SGLang has put it on the request.
        {"instances": [{}], "parameters": {"mm_processor_kwargs": FIELDS}},
    ],
)
def test_what_has_no_fields_is_passed_over(body: dict[str, Any]) -> None:
    assert answer(body) is None


def test_deep_json_is_walked_without_recursion() -> None:
    body: dict[str, Any] = dict(FIELDS)
    for _ in range(5000):
        body = {"a": [body]}
    with pytest.raises(ValueError, match="stands within a,"):
        answer(body)


def test_fields_that_reach_the_request_must_be_an_object() -> None:
    # As /vertex_generate makes it, of whatever is in its parameters.
    for sent in ("10%", [FIELDS], 5):
        with pytest.raises(ValueError, match="mm_processor_kwargs is an object like"):
            answer({"instances": [{}], "parameters": {}}, a_request(mm_processor_kwargs=sent))


def test_a_field_that_is_no_argument_of_a_request_is_answered_with_400() -> None:
    def ask(name: str, called: Any = GenerateReqInput, *, begun: bool = False) -> tuple[int, str]:
        async def original(middleware: Any, scope: Any, receive: Any, send: Any) -> None:
            if begun:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            called(**{name: 5})

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(answer_http(original, None, {"type": "http"}, None, send))
        return sent[0]["status"], sent[1]["body"].decode()

    for name, called in (
        ("mmtok_budget", GenerateReqInput),
        ("extra_body", GenerateReqInput),
        ("mmtok_k", SamplingParams),
    ):
        status, message = ask(name, called)
        assert status == 400
        assert message.startswith(f'{{"error":{{"message":"{name} stands where it is not read: send mm_processor_kwarg')
    with pytest.raises(TypeError, match="'temperature'"):
        ask("temperature")
    with pytest.raises(TypeError, match="'mmtok_budget'"):
        ask("mmtok_budget", begun=True)


def test_sglangs_own_application_answers_400(monkeypatch: pytest.MonkeyPatch) -> None:
    """To what it fails for before it has made a request; the server behind it is not asked."""
    original = _PureASGIDispatch.__call__
    monkeypatch.setattr(_PureASGIDispatch, "__call__", partialmethod(partial(answer_http, original)))
    client = TestClient(http_server.app, raise_server_exceptions=False)

    def ask(**parameters: Any) -> Any:
        return client.post("/vertex_generate", json={"instances": [{"text": "x"}], "parameters": parameters})

    refused = ask(mmtok_budget="25%")
    assert refused.status_code == 400
    assert "mmtok_budget stands where it is not read" in refused.json()["error"]["message"]
    assert ask(no_field=5).status_code == 500


def test_a_refusal_waits_until_the_answer_is_asked_for() -> None:
    # Where SGLang's own are raised: before that no entry point catches it.
    request = SimpleNamespace(_json={"mmtok_budget": 5})
    answers = generate_request(Manager.generate_request, Manager(), a_request(), request)
    with pytest.raises(ValueError, match="mmtok_budget stands"):
        asyncio.run(answers.__anext__())


def test_of_a_request_without_images_nothing_is_read() -> None:
    for body in ({"mmtok_budget": "25%"}, {"mm_processor_kwargs": FIELDS}):
        assert answer(body, GenerateReqInput(text="x")) is None
        assert answer(body, EmbeddingReqInput(text="x")) is None


def test_embeddings_have_the_servers_settings() -> None:
    def request() -> Any:
        return EmbeddingReqInput(text="x", image_data=["a.png"])

    assert answer({"mm_processor_kwargs": {"num_crops": 4}}, request()) is None
    with pytest.raises(ValueError, match=r"mmtok_budget, mmtok_seed: images of embedding requests have the server's"):
        answer({"mm_processor_kwargs": FIELDS}, request())


def test_the_engine_takes_the_field_as_an_argument() -> None:
    engine = Engine()
    assert engine_generate(Engine.generate, engine, "x", mm_processor_kwargs=FIELDS) == FIELDS
    assert engine_generate(Engine.generate, engine, prompt="x", image_data=[]) is None
    with pytest.raises(ValueError, match="mm_processor_kwargs is an object like"):
        engine_generate(Engine.generate, engine, "x", mm_processor_kwargs="10%")  # type: ignore[arg-type]
    # Nothing of one call is left for the next.
    assert engine_generate(Engine.generate, engine, "x") is None


def test_calls_of_an_engine_side_by_side_keep_their_fields() -> None:
    async def ask(stream: bool, seed: int | None) -> Any:
        fields = None if seed is None else {"mmtok_seed": seed}
        asked = await engine_async_generate(
            Engine.async_generate, Engine(), "x", stream=stream, mm_processor_kwargs=fields
        )
        return [each async for each in asked] if stream else [asked]

    async def all_of_them() -> Any:
        return await asyncio.gather(*(ask(stream, seed) for stream in (False, True) for seed in (1, None, 2)))

    assert asyncio.run(all_of_them()) == [[{"mmtok_seed": 1}], [None], [{"mmtok_seed": 2}]] * 2
