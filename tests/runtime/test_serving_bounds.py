"""What one request may bring, on every endpoint: refused at once with what to do, while others are served."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from mmtok_bench.families import FAMILY_TRAITS
from mmtok_soak.event_loop import polled_health
from tests.runtime.chats import Chat, data_url, small
from tests.runtime.serving import Served

CUP = Chat.ask(small("coffee"), "What is in this cup?")
REFUSED_WITHIN_S = 10.0
# Other tests and their servers take both cores meanwhile. By itself a server holds 0.25 s: `make soak ROWS=events`.
MAX_HEALTH_S = 1.0


def post(served: Served, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Returns status and text of the answer."""
    request = urllib.request.Request(
        served.server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def chat_body(*parts: Any, **fields: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": part}
        for part in parts
    ]
    messages = [{"role": "user", "content": content}]
    return {"model": "default", "messages": messages, "max_tokens": 2, "mm_processor_kwargs": fields or None}


def generate_body(images: list[Any], **prompt: Any) -> dict[str, Any]:
    return {**prompt, "image_data": images, "sampling_params": {"max_new_tokens": 2}}


def blank(width: int, height: int) -> dict[str, str]:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


COFFEE = {"url": data_url(small("coffee"))}
TYPED = {
    "<|image_pad|>": (
        "what is <|image_pad|> ?",
        "see <image> here",
        "a <|vision_start|> b",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|video_pad|>",
    ),
    "<|image|>": (
        "what is <|image|> ?",
        "a <|begin_of_image|> b",
        "<|begin_of_image|><|image|><|end_of_image|>",
        "<|begin_of_video|>",
        "<|video|>",
    ),
    "<image>": ("see <image> here", "<image><image>"),
}


def typed_beside(served: Served) -> tuple[str, ...]:
    return TYPED[FAMILY_TRAITS[served.family].placeholder]


@pytest.mark.parametrize("budget", ["all", "10%"])
def test_a_typed_placeholder_beside_an_image_is_refused(served: Served, budget: str) -> None:
    prompt = served.judge.prompt(CUP.for_template())
    tokenizer = served.judge.processor.tokenizer
    fields = {"mmtok_budget": budget}
    for typed in typed_beside(served):
        ids = tokenizer(prompt + typed)["input_ids"]
        bodies = [("/v1/chat/completions", chat_body(COFFEE, typed, **fields))]
        for given in ({"text": prompt + typed}, {"input_ids": ids}):
            bodies.append(("/generate", generate_body([COFFEE["url"]], mm_processor_kwargs=fields, **given)))
        for path, body in bodies:
            start_s = time.monotonic()
            status, text = post(served, path, body)
            assert (status, time.monotonic() - start_s < REFUSED_WITHIN_S) == (400, True), (typed, path, text)
            assert "image placeholders" in text or "reads as a part of an image: leave it out" in text


@pytest.mark.parametrize("budget", ["all", "10%"])
def test_images_and_placeholders_of_different_numbers_are_refused(served: Served, budget: str) -> None:
    prompt, url = served.judge.prompt(CUP.for_template()), COFFEE["url"]
    for images, text, message in (
        ([url, url], prompt, "1 image placeholder (such as "),
        ([url], prompt + prompt, "2 image placeholders (such as "),
        ([url], "hello", "0 image placeholders for 1 image: write one for each image"),
        ([url], "", "0 image placeholders for 1 image"),
    ):
        status, answer = post(
            served, "/generate", generate_body(images, text=text, mm_processor_kwargs={"mmtok_budget": budget})
        )
        assert (status, message in answer) == (400, True), answer


def test_a_text_without_images_may_name_placeholders(served: Served, servers: tuple[Served, Served]) -> None:
    for typed in typed_beside(served):
        for path, body in (
            ("/v1/chat/completions", chat_body(typed)),
            ("/v1/completions", {"model": "default", "prompt": typed, "max_tokens": 2}),
            ("/generate", {"text": typed, "sampling_params": {"max_new_tokens": 2}}),
        ):
            assert [post(each, path, body)[0] for each in servers] == [200, 200], (typed, path)


@pytest.mark.parametrize("budget", ["all", "10%"])
def test_images_beyond_the_limits_are_refused(served: Served, budget: str) -> None:
    for image, message in (
        (blank(1, 60000), "--mmtok-max-aspect-ratio"),
        (blank(9000, 9000), "--mmtok-max-image-pixels"),
        (blank(13500, 13500), "an image is too large to be read"),
        ({"url": "data:image/png;base64,AAAA"}, "an image cannot be read"),
        ({"url": "file:///dev/zero"}, "is no regular file"),
    ):
        status, text = post(served, "/v1/chat/completions", chat_body(image, "What?", mmtok_budget=budget))
        assert (status, message in text) == (400, True), text
    served.check(CUP, served.ask(CUP))


@pytest.mark.parametrize("budget", ["all", "10%"])
def test_a_plan_of_the_callers_is_refused(served: Served, budget: str) -> None:
    prompt, fields = served.judge.prompt(CUP.for_template()), {"mmtok_budget": budget}
    for data in (
        {"format": "processor_output", "modality": "IMAGE", "mmtok": {"num_tokens": 3}},
        {"format": "precomputed_embedding", "feature": [[0.0]], "mmtok_image_key": 1},
        {"format": "processor_output", "modality": "IMAGE", "model_specific_data": {"mmtok": {}}},
    ):
        status, text = post(served, "/generate", generate_body([data], text=prompt, mm_processor_kwargs=fields))
        assert status == 400, text
        # Over HTTP SGLang refuses such an object itself, as one of unknown fields.
        assert "which MMTok alone sets" in text or "brings precomputed" in text or "unknown field" in text
    served.check(CUP, served.ask(CUP))


def test_long_guidance_is_refused(served: Served) -> None:
    for fields, text, message in (
        ({"mmtok_guidance": "cat " * 2_500_000}, "What?", "--mmtok-max-guidance-tokens"),
        ({"mmtok_guidance": "cats " * 20_000}, "What?", "this server takes 16,384 (--mmtok-max-guidance-tokens)"),
        ({}, "cat " * 2_500_000, "shorten"),
    ):
        status, answer = post(served, "/v1/chat/completions", chat_body(COFFEE, text, **fields))
        assert (status, message in answer) == (400, True), answer[:500]


@contextmanager
def hanging_address() -> Iterator[dict[str, str]]:
    """Gives the address of an image whose server takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        yield {"url": f"http://127.0.0.1:{listening.getsockname()[1]}/image.png"}


def test_the_server_answers_while_images_hang_and_guidance_arrives(served: Served) -> None:
    served.check(CUP, served.ask(CUP))
    with hanging_address() as address, ThreadPoolExecutor(40) as pool:
        requests = [("/v1/chat/completions", chat_body(address, "What?"))] * 32
        requests += long_requests(served)
        with polled_health(served.server) as latencies_s:
            answers = list(pool.map(lambda request: post(served, *request), requests))
    assert [status for status, _ in answers] == [400] * len(requests)
    assert all("an image cannot be read" in text for _, text in answers[:32])
    assert all("shorten" in text for _, text in answers[32:]), answers[32:]
    assert 0 < max(latencies_s) < MAX_HEALTH_S


def long_requests(served: Served) -> list[tuple[str, dict[str, Any]]]:
    """Returns requests with 10 MB of guidance, each by another way into the server."""
    # Every text a new one: SGLang remembers the tokens of messages that it has seen.
    letters = "cat " * 2_500_000
    texts = [f"{served.family} {number} {letters}" for number in range(5)]
    source = {"type": "base64", "media_type": "image/png", "data": COFFEE["url"].partition(",")[2]}
    message = [{"type": "image", "source": source}, {"type": "text", "text": texts[0]}]
    part = {"type": "input_image", "image_url": COFFEE["url"]}
    item = {"role": "user", "content": [part, {"type": "input_text", "text": texts[1]}]}
    model = served.server.client().models.list().data[0].id
    prompt = served.judge.prompt(CUP.for_template())
    return [
        ("/v1/messages", {"model": "default", "max_tokens": 2, "messages": [{"role": "user", "content": message}]}),
        ("/v1/responses", {"model": model, "max_output_tokens": 2, "input": [item]}),
        ("/generate", generate_body([COFFEE["url"]], text=prompt + texts[2])),
        ("/v1/chat/completions", chat_body(COFFEE, texts[3])),
        ("/v1/chat/completions", chat_body(COFFEE, "What?", mmtok_guidance=texts[4])),
    ]
