"""Per-request fields and the account of images, at every entry point that takes images."""

from __future__ import annotations

import json
import re
import urllib.error
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from tests.runtime.chats import Chat, data_url, small
from tests.runtime.serving import Served

CUP = "What is in this cup?"
CHAT = Chat.ask(small("coffee"), CUP)
URL = data_url(small("coffee"))
SAMPLING = {"max_new_tokens": 2, "temperature": 0}


def _chat(served: Served) -> dict[str, Any]:
    return {"model": "default", "max_tokens": 2, "messages": CHAT.for_server()}


def _messages(served: Served) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": URL.partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": CUP}]
    return {"model": "default", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}


def _responses(served: Served) -> dict[str, Any]:
    content = [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": CUP}]
    model = served.server.client().models.list().data[0].id
    return {"model": model, "max_output_tokens": 2, "input": [{"role": "user", "content": content}]}


def _generate(served: Served) -> dict[str, Any]:
    return {"text": served.judge.prompt(CHAT.for_template()), "image_data": [URL], "sampling_params": SAMPLING}


def _messages_usage(answer: Any) -> int:
    return int(answer["usage"]["input_tokens"] + answer["usage"].get("cache_read_input_tokens", 0))


ENTRY_POINTS: dict[str, tuple[Callable[[Served], dict[str, Any]], Callable[[Any], int]]] = {
    "/v1/chat/completions": (_chat, lambda answer: answer["usage"]["prompt_tokens"]),
    "/invocations": (_chat, lambda answer: answer["usage"]["prompt_tokens"]),
    "/v1/messages": (_messages, _messages_usage),
    "/v1/responses": (_responses, lambda answer: answer["usage"]["input_tokens"]),
    "/generate": (_generate, lambda answer: answer["meta_info"]["prompt_tokens"]),
}


@pytest.mark.parametrize("path", ENTRY_POINTS)
def test_the_budget_of_a_request_holds(served: Served, path: str) -> None:
    body, prompt_tokens = ENTRY_POINTS[path]

    def read(**fields: Any) -> int:
        return prompt_tokens(served.post(path, {**body(served), "mm_processor_kwargs": fields or None}))

    (images,) = served.ask(CHAT)["mmtok"]
    assert read(mmtok_budget="all") - read() == images["image_tokens_in"] - images["image_tokens_kept"]
    assert read(mmtok_budget="all") - read(mmtok_budget="50%") == images["image_tokens_in"] - sum(
        image["tokens_kept"] for image in served.ask(CHAT, mmtok_budget="50%")["mmtok"][0]["images"]
    )
    assert read(mmtok_budget="auto") == read(mmtok_budget="50%") > read()
    if served.token_px is not None:
        (smaller,) = served.ask(CHAT, mmtok_budget="all", mmtok_encoder_scale=0.5)["mmtok"]
        scaled = read(mmtok_budget="all", mmtok_encoder_scale=0.5)
        assert read(mmtok_budget="all") - scaled == images["image_tokens_in"] - smaller["image_tokens_in"]


@pytest.mark.parametrize("path", ENTRY_POINTS)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mm_processor_kwargs": {"mmtok_budget": 1.0}}, r'mmtok_budget: budget 1.0 .* write \\"100%\\" or 1'),
        ({"mm_processor_kwargs": {"mmtok_bugdet": 5}}, "no field mmtok_bugdet"),
        ({"mm_processor_kwargs": {"mmtok_encoder_scale": 0}}, "mmtok_encoder_scale is a number above 0 and at most 1"),
        ({"mmtok_budget": "25%"}, r"mmtok_budget stands at the top .*mm_processor_kwargs"),
        ({"extra_body": {"mmtok_budget": 5}}, "extra_body is an argument"),
    ],
    ids=["1.0", "unknown", "scale", "top level", "extra_body"],
)
def test_fields_that_are_not_understood_are_refused(
    served: Served, path: str, fields: dict[str, Any], named: str
) -> None:
    counter = 'mmtok:refused_requests_total{kind="field"}'
    before = _counted(served, counter)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        served.post(path, ENTRY_POINTS[path][0](served) | fields)
    with refusal.value as answer:
        assert answer.code == 400
        assert pytest.approx(1) == _counted(served, counter) - before
        message = answer.read().decode()
    assert re.search(named, message), message


def test_a_vertex_request_has_the_fields_in_its_parameters(served: Served) -> None:
    instance = {"text": served.judge.prompt(CHAT.for_template()), "image_data": URL}
    parameters = {"sampling_params": SAMPLING}
    fields = {"mm_processor_kwargs": {"mmtok_budget": "all"}}

    def read(**more: Any) -> int:
        body = {"instances": [instance, instance], "parameters": parameters | more}
        first, second = served.post("/vertex_generate", body)["predictions"]
        assert first["meta_info"]["prompt_tokens"] == second["meta_info"]["prompt_tokens"]
        return int(first["meta_info"]["prompt_tokens"])

    (images,) = served.ask(CHAT)["mmtok"]
    assert read(**fields) - read() == images["image_tokens_in"] - images["image_tokens_kept"]


@pytest.mark.parametrize(
    ("instance", "parameters", "named"),
    [
        ({"mm_processor_kwargs": {"mmtok_budget": 5}}, {}, "mmtok_budget stands within instances, where it is not"),
        ({}, {"mmtok_budget": "25%"}, "mmtok_budget stands where it is not read: send mm_processor_kwargs"),
        ({}, {"stream": True, "mmtok_seed": 1}, "mmtok_seed stands where it is not read"),
        ({}, {"extra_body": {"mmtok_budget": 5}}, "extra_body stands where it is not read"),
        ({}, {"sampling_params": {"mmtok_budget": 5}}, "mmtok_budget stands within parameters"),
        ({}, {"mm_processor_kwargs": "25%"}, "mm_processor_kwargs is an object like"),
        ({}, {"mm_processor_kwargs": {"mmtok_budget": 1.0}}, "mmtok_budget: budget 1.0"),
        # Without an image nothing of ours is read: SGLang would answer 500 to what is no parameter.
        ({"image_data": None}, {"mmtok_budget": "25%"}, "mmtok_budget stands where it is not read"),
        ({"image_data": None}, {"sampling_params": {"mmtok_budget": 5}}, "mmtok_budget stands where it is not read"),
    ],
)
def test_a_vertex_request_with_fields_elsewhere_is_refused(
    served: Served, instance: dict[str, Any], parameters: dict[str, Any], named: str
) -> None:
    instance = {"text": served.judge.prompt(CHAT.for_template()), "image_data": URL} | instance
    with pytest.raises(urllib.error.HTTPError) as refusal:
        served.post(
            "/vertex_generate", {"instances": [instance], "parameters": {"sampling_params": SAMPLING} | parameters}
        )
    with refusal.value as answer:
        assert answer.code == 400
        assert named in answer.read().decode()


def _events(served: Served, path: str, body: dict[str, Any]) -> list[Any]:
    """Returns the events of a streamed answer."""
    text: str = served.post(path, body)
    *events, end = (line.removeprefix("data: ") for line in text.splitlines() if line)
    assert end == "[DONE]"
    return [json.loads(event) for event in events]


def _counted(served: Served, name: str) -> float:
    lines = [line for line in served.get("/metrics").splitlines() if line.startswith(name)]
    return float(lines[0].split()[-1]) if lines else 0.0


def test_the_account_of_an_answer(served: Served) -> None:
    served.flush_cache()
    two = Chat.ask(small("chelsea"), small("coffee"), CUP)
    (account,) = served.ask(two)["mmtok"]
    (again,) = served.ask(two)["mmtok"]
    assert account == again
    prompt = served.judge.prompt(two.for_template())
    whole, pruned = (served.judge.prune(prompt, two.images, two.guidance, budget) for budget in (None, 0.1))
    assert account["image_tokens_kept"] == pruned.num_image_tokens
    assert len(account["images"]) == 2
    for image in account["images"]:
        assert image["method"] == "mmtok"
        assert 0 < image["coverage"] <= image["coverage_bound"] <= 1
        assert not image["is_fallback"]
        assert image["tokens_kept"] < image["tokens_in"]
    if served.family != "llava-next":
        assert account["image_tokens_in"] == whole.num_image_tokens
    assert account["num_fallbacks"] == 0
    assert "mmtok" not in served.ask(Chat.ask("Tell me about cats."))
    (more,) = served.ask(two, mmtok_budget="60%")["mmtok"]
    (drawn,) = served.ask(two, mmtok_method="random")["mmtok"]
    for some, many, none in zip(account["images"], more["images"], drawn["images"], strict=True):
        assert some["coverage"] < many["coverage"]
        assert (none["method"], none["coverage"], none["coverage_bound"], none["is_fallback"]) == (
            *("random", None, None, False),
        )


def test_a_fallback_is_in_the_account(served: Served) -> None:
    if served.family != "llava-1.5":
        pytest.skip("only LLaVA-1.5 excludes padding: of a line of 1 x 1000 pixels every patch is")
    line = Chat.ask(Image.new("RGB", (1000, 1), "red"), CUP)
    for _ in range(2):
        (account,) = served.ask(line)["mmtok"]
        assert account["num_fallbacks"] == 1
        assert (account["images"][0]["coverage"], account["images"][0]["is_fallback"]) == (None, True)


def test_an_unpruned_images_account(served: Served) -> None:
    (account,) = served.ask(CHAT, mmtok_budget="all")["mmtok"]
    (image,) = account["images"]
    assert image == {
        "tokens_in": account["image_tokens_in"],
        "tokens_encoded": account["image_tokens_in"],
        "tokens_kept": account["image_tokens_in"],
        "method": None,
        "coverage": None,
        "coverage_bound": None,
        "is_fallback": False,
        "auto": None,
    }
    assert account["num_fallbacks"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_account_of_an_answer_without_tokens(served: Served, stream: bool) -> None:
    (expected,) = served.ask(CHAT)["mmtok"]
    body = _generate(served) | {"sampling_params": {**SAMPLING, "max_new_tokens": 0}, "stream": stream}
    answer = _events(served, "/generate", body)[-1] if stream else served.post("/generate", body)
    assert answer["meta_info"]["completion_tokens"] == 0
    assert answer["meta_info"]["mmtok"] == [expected]


def test_the_account_of_a_stream(served: Served) -> None:
    (expected,) = served.ask(CHAT)["mmtok"]
    events = _events(served, "/generate", _generate(served) | {"stream": True})
    assert [event["meta_info"]["mmtok"] for event in events] == [[expected]] * len(events)
    # An OpenAI client's stream has what is kept in its usage.
    body = _chat(served) | {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = _events(served, "/v1/chat/completions", body)
    assert last["usage"]["prompt_tokens_details"]["image_tokens"] == expected["image_tokens_kept"]


def test_a_text_beside_images_has_no_account(served: Served) -> None:
    of_image = _generate(served)
    prompts = {"text": [of_image["text"], "Tell me about cats."], "image_data": [[URL], None]}
    image, text = served.post("/generate", of_image | prompts)
    assert len(image["meta_info"]["mmtok"]) == 1
    assert not text["meta_info"].get("mmtok")


def test_a_tools_image_is_guided_by_the_user(served: Served) -> None:
    if served.token_px is None:
        pytest.skip("the chat template of this family has no tools")
    served.flush_cache()
    asked = Chat.ask("Open the page of the cup.").then("assistant", "Opening.").then("tool", small("coffee"), "loaded")
    first = served.ask(asked)
    served.check(asked, first, guidance=["Open the page of the cup."])
    later = asked.then("assistant", "Done.").then("user", "How many cats are there?")
    second = served.ask(later)
    served.check(later, second, guidance=["Open the page of the cup."])
    # All but the end of the first prompt, where the answer would begin, is in the prefix cache.
    assert second["cached_tokens"] >= served.from_cache(first["prompt_tokens"] - 29)


def test_a_system_image_is_guided_by_the_first_question(served: Served) -> None:
    if served.token_px is None:
        pytest.skip("the chat template of this family takes no image in a system message")
    chat = Chat((("system", (small("coffee"), "This is the menu.")),)).then("user", CUP)
    served.check(chat, served.ask(chat), guidance=[CUP])
    later = chat.then("assistant", "Coffee.").then("user", "How many cats are there?")
    served.check(later, served.ask(later), guidance=[CUP])


def _messages_thread(served: Served, image: dict[str, Any]) -> dict[str, Any]:
    """As an agent sends it: a question, a call of a tool, and its result in a user message with more text."""
    call = {"type": "tool_use", "id": "call_1", "name": "open", "input": {"page": "cup"}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [image, {"type": "text", "text": "loaded"}]}
    more = {"type": "text", "text": "How many cats are there? " + "Look again. " * 40}
    said = {"type": "text", "text": "Opening."}
    turns = [("user", "Open the page of the cup."), ("assistant", [said, call]), ("user", [result, more])]
    return {**_messages(served), "messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("path", ["/v1/messages", "/generate"])
def test_a_tools_image_is_guided_by_the_user_at_other_entry_points(served: Served, path: str) -> None:
    if served.token_px is None:
        pytest.skip("the chat template of this family has no tools")
    if path == "/v1/messages":
        source = {"type": "base64", "media_type": "image/png", "data": URL.partition(",")[2]}
        body = _messages_thread(served, {"type": "image", "source": source})
    else:
        chat = Chat.ask("Open the page of the cup.").then("assistant", "Opening.").then("tool", small("coffee"), "done")
        chat = chat.then("user", "How many cats are there? " + "Look again. " * 40)
        body = _generate(served) | {"text": served.judge.prompt(chat.for_template())}

    def ask(**fields: Any) -> tuple[int, int]:
        answer = served.post(path, {**body, "mm_processor_kwargs": fields or None})
        if path == "/generate":
            return answer["meta_info"]["prompt_tokens"], answer["meta_info"]["cached_tokens"]
        return _messages_usage(answer), answer["usage"].get("cache_read_input_tokens", 0)

    served.flush_cache()
    ask()
    # All of a request is in the prefix cache if the same text guides it, and nothing from its image on if another does.
    num_read, num_cached = ask(mmtok_guidance="Open the page of the cup.")
    assert num_cached >= served.from_cache(num_read - 1)
    _, num_others = ask(mmtok_guidance="How many cats are there?")
    assert num_others < num_cached - 64
