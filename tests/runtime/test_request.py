from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput

from mmtok_deploy import Budget
from mmtok_deploy.auto_budget import AutoBudget, parse_budget
from mmtok_sglang.request import (
    Requested,
    add_chat_guidance,
    check_messages,
    guidance_texts,
    message_guidance,
    prompt_guidance,
    requested,
)
from tests.runtime.stand_ins import make_settings

SERVER = replace(make_settings(), budget=Budget.parse(64, minimum=4))
IMAGE = {"type": "image_url", "image_url": {"url": "file:///cat.png"}}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PLACEHOLDER = "<|image_pad|>"


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def chat(*messages: tuple[str, Any]) -> Any:
    turns = [{"role": role, "content": content} for role, content in messages]
    return ChatCompletionRequest(model="tiny", messages=turns)


@pytest.mark.parametrize("kwargs", [None, {}, {"mmtok_budget": None}, {"mmtok_guidance": "a cat"}, {"num_crops": 4}])
def test_a_request_without_a_budget_has_the_servers(kwargs: dict[str, Any] | None) -> None:
    assert requested(kwargs, SERVER) == Requested(SERVER.budget, "mmtok", 0)


@pytest.mark.parametrize("value", [8, "8", "10%", 0.1, "all"])
def test_a_requests_budget_goes_before_the_servers(value: str | int | float) -> None:
    assert requested({"mmtok_budget": value}, SERVER).budget == Budget.parse(value, minimum=4)


def test_the_servers_minimum_holds_for_requests() -> None:
    assert requested({"mmtok_budget": 1}, SERVER).budget == Budget(tokens=1, minimum=4)


def test_auto_goes_before_the_servers_budget_and_keeps_its_bounds() -> None:
    settings = replace(SERVER, auto=AutoBudget(auto_max=Fraction(1, 5)))
    budget = requested({"mmtok_budget": "auto"}, settings).budget
    assert budget == AutoBudget(minimum=4, auto_max=Fraction(1, 5))
    of_server = replace(settings, budget=budget)
    assert requested(None, of_server).budget == budget
    assert requested({"mmtok_budget": 8}, of_server).budget == Budget(tokens=8, minimum=4)


@pytest.mark.parametrize(
    ("budget", "fields"),
    [
        ("10%", {"mmtok_method": "downsample", "mmtok_budget": "auto"}),
        ("auto", {"mmtok_method": "downsample"}),
    ],
)
def test_downsample_takes_no_auto(budget: str, fields: dict[str, Any]) -> None:
    settings = replace(make_settings(), budget=parse_budget(budget, AutoBudget()))
    with pytest.raises(ValueError, match=r"^mm_processor_kwargs.mmtok_budget auto does not go with the method downsam"):
        requested(fields, settings)
    assert requested(fields | {"mmtok_budget": "10%"}, settings).budget == Budget.parse("10%")


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, True, "", "ten", [], [64], {}, {"tokens": 64}, float("nan"), float("inf"), "9" * 5000]
)
def test_a_bad_budget_is_refused_and_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^mm_processor_kwargs\.mmtok_budget: "):
        requested({"mmtok_budget": value}, SERVER)


def test_an_unknown_field_is_refused_with_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match=r"no field mmtok_alpha, mmtok_budgets; .* mmtok_budget, mmtok_encoder_scale, mmtok_g"
    ):
        requested({"mmtok_budgets": 5, "mmtok_alpha": 1, "num_crops": 4}, SERVER)


@pytest.mark.parametrize("name", ["mmtok-budget", "MMTOK_BUDGET", "mmtokBudget", "mmtok"])
def test_a_field_that_is_written_in_another_way_is_not_passed_over(name: str) -> None:
    with pytest.raises(ValueError, match=f"^mm_processor_kwargs has no field {name}; a request may set mmtok_budget"):
        requested({name: 5}, SERVER)


def test_a_requests_method_and_seed_go_before_the_servers() -> None:
    settings = replace(make_settings(), method="even", seed=3)
    fields = {"mmtok_method": "random", "mmtok_seed": 5}
    assert requested(fields, settings) == Requested(settings.budget, "random", 5)
    # Only what draws has a seed: others share what is cached under any.
    for without in (None, {}, {"mmtok_method": None, "mmtok_seed": None}, {"mmtok_seed": 5}):
        assert requested(without, settings) == Requested(settings.budget, "even", 0)
    assert requested({"mmtok_method": "random"}, settings).seed == 3


@pytest.mark.parametrize("value", ["fastv", "", 3, ["even"], True])
def test_a_bad_method_is_refused_and_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^mm_processor_kwargs\.mmtok_method: method is one of mmtok, "):
        requested({"mmtok_method": value}, make_settings())


def test_a_method_that_the_backend_does_not_run_is_refused() -> None:
    settings = replace(make_settings(), backend="triton")
    assert requested({"mmtok_method": "mmtok"}, settings).method == "mmtok"
    with pytest.raises(ValueError, match=r"mmtok_method: triton runs the method mmtok alone, not even"):
        requested({"mmtok_method": "even"}, settings)


def test_a_requests_keys_go_before_the_servers() -> None:
    settings = replace(make_settings(), keys="output")
    assert requested(None, settings).keys == requested({"mmtok_keys": None}, settings).keys == "output"
    assert requested({"mmtok_keys": "input"}, settings).keys == "input"
    # Methods that compare no tokens by keys share what is cached under either.
    assert requested({"mmtok_keys": "output", "mmtok_method": "divprune"}, make_settings()).keys == "input"
    for value in ("both", "", 1, True, ["input"]):
        with pytest.raises(ValueError, match=r"^mm_processor_kwargs\.mmtok_keys is one of input, output, got "):
            requested({"mmtok_keys": value}, settings)


def test_keys_that_the_backend_does_not_run_are_refused() -> None:
    settings = replace(make_settings(), backend="triton", keys="output")
    assert requested({"mmtok_keys": "output"}, settings).keys == "output"
    with pytest.raises(ValueError, match=r"mmtok_keys input is not what triton runs .* compares .* projector's output"):
        requested({"mmtok_keys": "input"}, settings)


@pytest.mark.parametrize("value", [-1, 2**63, 0.5, "1", True, [1]])
def test_a_bad_seed_is_refused_and_named(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^mm_processor_kwargs\.mmtok_seed is a whole number from 0 to 9223372036854775807, got "
    ):
        requested({"mmtok_seed": value}, make_settings())


def test_a_requests_scale_goes_before_the_servers() -> None:
    settings = replace(make_settings("10%"), encoder_scale=0.5)
    assert requested(None, settings).encoder_scale == 0.5
    assert requested({"mmtok_encoder_scale": None}, settings).encoder_scale == 0.5
    assert requested({"mmtok_encoder_scale": 0.25}, settings).encoder_scale == 0.25
    assert requested({"mmtok_encoder_scale": 1}, settings).encoder_scale == 1
    # Whatever the budget: all tokens of a smaller image are kept then.
    assert not requested({"mmtok_budget": "all"}, settings).changes_nothing
    assert requested({"mmtok_budget": "all", "mmtok_encoder_scale": 1}, settings).changes_nothing


def test_a_requests_limit_of_repetitions_goes_before_the_servers() -> None:
    settings = replace(make_settings("all"), skip_repeats=8)
    for given, expected in ((None, 8), (0, 0), (255, 255), (-1, -1)):
        asked = requested({"mmtok_skip_repeats": given}, settings)
        assert (asked.skip_repeats, asked.changes_nothing) == (expected, expected == -1)


@pytest.mark.parametrize("value", [0, -1, 1.5, 2, True, "0.5", "50%", [0.5], float("nan"), float("inf"), 10**400])
def test_a_bad_scale_is_refused_and_named(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^mm_processor_kwargs\.mmtok_encoder_scale is a number above 0 and at most 1, got "
    ):
        requested({"mmtok_encoder_scale": value}, SERVER)


@pytest.mark.parametrize(
    ("server", "fields"),
    [
        ({}, {"mmtok_method": "downsample", "mmtok_encoder_scale": 0.5}),
        ({"encoder_scale": 0.5}, {"mmtok_method": "downsample"}),
        ({"method": "downsample"}, {"mmtok_encoder_scale": 0.5}),
    ],
)
def test_downsample_takes_no_scale(server: dict[str, Any], fields: dict[str, Any]) -> None:
    settings = replace(make_settings("10%"), **server)
    with pytest.raises(ValueError, match=r"mmtok_encoder_scale 0.5 does not go with the method downsample.*: take 1,"):
        requested(fields, settings)
    assert requested(fields | {"mmtok_encoder_scale": 1}, settings).method == "downsample"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("user", [IMAGE, text_part("Where is"), text_part("the cat?")])], ["Where is the cat?"]),
        ([("user", [text_part("first"), IMAGE, text_part("second")])], ["first second"]),
        ([("user", [IMAGE, text_part("two"), IMAGE])], ["two", "two"]),
        ([("user", [IMAGE])], [""]),
        ([("user", "no image")], []),
        ([("user", [IMAGE]), ("user", "What is it?")], ["What is it?"]),
        ([("user", "What is it?"), ("user", [IMAGE])], ["What is it?"]),
        ([("system", "Be brief."), ("user", [IMAGE, text_part("A cat?")])], ["A cat?"]),
        (
            [
                ("user", [IMAGE, text_part("A cat?")]),
                ("assistant", "Yes."),
                ("user", [IMAGE, text_part("A dog?")]),
                ("assistant", None),
                ("user", "Sure?"),
            ],
            ["A cat?", "A dog?"],
        ),
        # Another role's image has the nearest user text before it, else the first after it.
        ([("assistant", [IMAGE, text_part("Look.")]), ("user", "What?")], ["What?"]),
        (
            [("tool", [IMAGE]), ("user", "What?"), ("user", "Which?"), ("assistant", "x"), ("user", "So?")],
            ["What? Which?"],
        ),
        ([("user", "What?"), ("tool", [IMAGE, text_part('{"ok": true}')])], ["What?"]),
        ([("user", "A?"), ("assistant", "x"), ("user", "B?"), ("tool", [IMAGE]), ("user", "C?")], ["B?"]),
        ([("user", "A?"), ("assistant", "x"), ("user", [IMAGE]), ("tool", [IMAGE]), ("user", "C?")], ["", "A?"]),
        ([("system", [IMAGE, text_part("Be brief.")]), ("user", [IMAGE]), ("user", "A?")], ["A?", "A?"]),
        ([("system", [IMAGE]), ("user", [IMAGE]), ("assistant", "x"), ("user", "B?")], ["B?", ""]),
        ([("system", [IMAGE, text_part("Describe it.")])], ["Describe it."]),
        ([("tool", [IMAGE])], [""]),
    ],
)
def test_guidance_of_a_chat(messages: list[tuple[str, Any]], expected: list[str]) -> None:
    assert message_guidance(chat(*messages).messages) == expected


def test_later_turns_do_not_change_what_guides_a_tools_image() -> None:
    turns: list[tuple[str, Any]] = [("system", [IMAGE]), ("user", "Open the shop."), ("tool", [IMAGE])]
    for later in [("assistant", "Done."), ("user", "Now buy a cup."), ("tool", [IMAGE]), ("user", "Thanks.")]:
        turns.append(later)
        assert message_guidance(chat(*turns).messages)[:2] == ["Open the shop.", "Open the shop."]
    assert message_guidance(chat(*turns).messages)[2] == "Now buy a cup."


CHATML = (
    "<|im_start|>system\nBe helpful.<|im_end|>\n"
    f"<|im_start|>user\n{QWEN_IMAGE}A cat?<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n"
    f"<|im_start|>user\n{QWEN_IMAGE}A dog\nor {QWEN_IMAGE} a cow?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("prompt", "placeholder", "expected"),
    [
        (CHATML, PLACEHOLDER, ["A cat?", "A dog or a cow?", "A dog or a cow?"]),
        ("Be kind. USER: <image>\nA cat? ASSISTANT:", "<image>", ["A cat?"]),
        ("USER: <image> A? ASSISTANT: No.</s>USER: <image> B? ASSISTANT:", "<image>", ["A?", "B?"]),
        ("USER: <image> Which USERNAME? ASSISTANT:", "<image>", ["Which USERNAME?"]),
        ("<s>[INST] <image>\nA cat? [/INST] Yes</s>[INST] And now? [/INST]", "<image>", ["A cat?"]),
        ("[INST] <image>\nunfinished", "<image>", ["unfinished"]),
        (
            "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nA cat?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<image>",
            ["A cat?"],
        ),
        (
            "[gMASK]<sop><|system|>\nBe kind.<|user|>\n<|begin_of_image|><|image|><|end_of_image|>A\ncat?/nothink"
            "<|assistant|>\n<think></think>Yes.<|user|>\nAnd USER: <|image|>?<|user|>\n<|image|> C?<|assistant|>\n",
            "<|image|>",
            ["A cat?", "And USER: ?", "C?"],
        ),
        (
            "<|im_start|>system\nUSER: is who asks.<|im_end|>\n"
            "<|im_start|>user\n<image>What is [INST]?<|im_end|>\n<|im_start|>assistant\n",
            "<image>",
            ["What is [INST]?"],
        ),
        (
            "<s>[INST] <image>\nUSER: or ASSISTANT: on the sign? [/INST]",
            "<image>",
            ["USER: or ASSISTANT: on the sign?"],
        ),
        ("<image> a photo of", "<image>", ["a photo of"]),
        ("<image><image>", "<image>", ["", ""]),
        ("", "<image>", []),
        ("USER: no image ASSISTANT:", "<image>", []),
    ],
)
def test_guidance_of_a_prompt(prompt: str, placeholder: str, expected: list[str]) -> None:
    assert prompt_guidance(prompt, placeholder) == expected


def test_an_image_outside_the_user_turns_has_the_nearest_one() -> None:
    turns = f"<|im_start|>user\n{QWEN_IMAGE} A? <|im_end|> then {QWEN_IMAGE} <|im_start|>user\nB?<|im_end|>{QWEN_IMAGE}"
    assert prompt_guidance(f"{QWEN_IMAGE} before {turns}", PLACEHOLDER) == ["A?", "A?", "A?", "B?"]
    no_words = f"<|im_start|>system\n{QWEN_IMAGE} Be brief.<|im_end|><|im_start|>user\n{QWEN_IMAGE}<|im_end|>"
    assert prompt_guidance(no_words, PLACEHOLDER) == ["Be brief.", ""]


def test_a_tools_result_in_a_users_turn_is_no_user_text() -> None:
    asked = "<|im_start|>user\nOpen the shop.<|im_end|>\n<|im_start|>assistant\n<tool_call>x</tool_call><|im_end|>\n"
    result = f"<tool_response>\nloaded {QWEN_IMAGE}\n</tool_response>"
    answered = f"<|im_start|>user\n{result}\n{result}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_guidance(asked + answered, PLACEHOLDER) == ["Open the shop."] * 2
    mixed = f"<|im_start|>user\n{result} {QWEN_IMAGE} Which one?<|im_end|>"
    assert prompt_guidance(asked + mixed, PLACEHOLDER) == ["Open the shop.", "Which one?"]
    assert prompt_guidance(mixed, PLACEHOLDER) == ["Which one?", "Which one?"]


@pytest.mark.parametrize(
    "unit", ["<tool_response>", "<tool_response></tool_response>a", "USER:", "<|", "[INST]x", "<|user|>\n"]
)
def test_no_prompt_takes_long_to_read(unit: str) -> None:
    start_s = time.process_time()
    for turn in ("", "<|im_start|>user\n", "<|user|>\n"):
        prompt_guidance(turn + unit * (10**6 // len(unit)), PLACEHOLDER)
    # Half a second; quadratic in the length, it would take hours.
    assert time.process_time() - start_s < 10


def test_an_image_may_stand_under_sglangs_own_name() -> None:
    prompt = CHATML.replace(QWEN_IMAGE, "<image>")
    expected = ["A cat?", "A dog or a cow?", "A dog or a cow?"]
    assert guidance_texts(None, prompt, 3, PLACEHOLDER) == expected
    # Beside the model's it is the user's word.
    assert guidance_texts(None, f"{QWEN_IMAGE} <image>?", 1, PLACEHOLDER) == ["<image>?"]


def test_given_guidance_goes_before_the_prompt() -> None:
    one_for_all = guidance_texts({"mmtok_guidance": "a cat"}, CHATML, 3, PLACEHOLDER)
    one_each = guidance_texts({"mmtok_guidance": ["a", "", "c"]}, CHATML, 3, PLACEHOLDER)
    assert (one_for_all, one_each) == (["a cat"] * 3, ["a", "", "c"])


@pytest.mark.parametrize("given", [[], ["a"], ["a", 1], ["a", None], 5, True, {"0": "a", "1": "b"}, [["a"], ["b"]]])
def test_given_guidance_of_another_shape_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"mmtok_guidance is one text, or a list .* 2 images and videos, got "):
        guidance_texts({"mmtok_guidance": given}, "USER: <image><image>", 2, "<image>")


@pytest.mark.parametrize("kwargs", [None, {}, {"mmtok_guidance": None}])
def test_without_given_guidance_the_prompt_is_read(kwargs: dict[str, Any] | None) -> None:
    assert guidance_texts(kwargs, CHATML, 3, PLACEHOLDER)[0] == "A cat?"


@pytest.mark.parametrize(
    ("prompt", "num_images", "expected"),
    [
        ("USER: <image><image><image> A cat? ASSISTANT:", 1, ["A cat?"]),
        ("USER: <image><image> A? ASSISTANT: x USER: <image><image> B? ASSISTANT:", 2, ["A? B?", "A? B?"]),
        ("USER: A cat? ASSISTANT:", 1, [""]),
    ],
)
def test_placeholders_that_are_not_one_an_image_share_the_text(
    prompt: str, num_images: int, expected: list[str]
) -> None:
    assert guidance_texts(None, prompt, num_images, "<image>") == expected


def converted(images: list[str] | None, mm_processor_kwargs: dict[str, Any] | None, request: Any) -> Any:
    """Returns what `add_chat_guidance` makes of the request that SGLang would convert `request` to."""
    adapted = GenerateReqInput(text="prompt", image_data=images, mm_processor_kwargs=mm_processor_kwargs)

    def original(serving: str, given: Any, raw_request: None) -> tuple[Any, Any]:
        assert serving == "serving"
        return adapted, given

    result, same_request = add_chat_guidance(SERVER, original, "serving", request)
    assert result is adapted
    assert same_request is request
    return result.mm_processor_kwargs


QUESTION = chat(("system", "Be brief."), ("user", [IMAGE, text_part("A cat?")]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"mmtok_guidance": ["A cat?"]}),
        ({"mmtok_budget": 5}, {"mmtok_guidance": ["A cat?"], "mmtok_budget": 5}),
        ({"mmtok_guidance": "my own"}, {"mmtok_guidance": "my own"}),
    ],
)
def test_a_chats_texts_travel_with_its_request(given: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    assert converted(["cat.png"], given, QUESTION) == expected


def test_the_callers_fields_are_not_changed() -> None:
    given = {"mmtok_budget": 5}
    converted(["cat.png"], given, QUESTION)
    assert given == {"mmtok_budget": 5}


@pytest.mark.parametrize("images", [None, [], ["a.png", "b.png"]])
def test_without_one_text_an_image_the_prompt_is_left_to_be_read(images: list[str] | None) -> None:
    assert converted(images, None, QUESTION) is None


LONG = "word " * 60_000


@pytest.mark.parametrize(
    ("messages", "kwargs", "sent", "message"),
    [
        ([("user", [IMAGE, text_part(LONG)])], None, None, "--mmtok-max-guidance-tokens"),
        ([("system", LONG), ("user", [IMAGE])], None, None, None),
        ([("user", [IMAGE, text_part(LONG)])], {"mmtok_guidance": "a cat"}, None, None),
        ([("user", [IMAGE, text_part(LONG)])], {"mmtok_budget": "all"}, None, None),
        ([("user", [IMAGE, text_part(LONG)])], {"mmtok_method": "even"}, None, None),
        # What /v1/messages was sent, which its chat lacks.
        ([("user", [IMAGE, text_part(LONG)])], None, {"mm_processor_kwargs": {"mmtok_budget": "all"}}, None),
        ([("user", [IMAGE, text_part(LONG)])], None, {"mm_processor_kwargs": "a text"}, None),
        ([("user", LONG)], None, None, None),
    ],
)
def test_a_text_too_long_to_guide_is_refused_before_it_is_tokenised(
    messages: list[Any], kwargs: Any, sent: Any, message: str | None
) -> None:
    request = chat(*messages)
    request.mm_processor_kwargs = kwargs

    def original(serving: Any, given: Any, raw_request: Any) -> Any:
        assert message is None
        return GenerateReqInput(text="prompt"), given

    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        add_chat_guidance(SERVER, original, "serving", request, SimpleNamespace(_json=sent))


@pytest.mark.parametrize(("letters", "is_refused"), [(32_000, False), (33_000, True)])
@pytest.mark.parametrize("has_image", [False, True])
def test_messages_longer_than_any_prompt_are_refused_before_they_are_tokenised(
    letters: int, is_refused: bool, has_image: bool
) -> None:
    image = [IMAGE] if has_image else []
    request = chat(("system", "x" * (letters - 1000)), ("user", [*image, text_part("y" * 1000)]))
    serving = SimpleNamespace(tokenizer_manager=SimpleNamespace(max_req_input_len=1000))

    def original(same_serving: Any, same_request: Any, is_multimodal: bool, **kwargs: Any) -> str:
        assert not (has_image and is_refused)
        return "tokenised"

    if has_image and is_refused:
        with pytest.raises(ValueError, match="the prompt has 33,000 characters, the longest prompt of this server 1,0"):
            check_messages(SERVER, original, serving, request, True)
    else:
        assert check_messages(SERVER, original, serving, request, True, output_constrained=False) == "tokenised"


LETTERS = "x" * 33_000


@pytest.mark.parametrize(
    ("turn", "fields"),
    [
        ({}, {"tools": [{"type": "function", "function": {"name": "look", "description": LETTERS}}]}),
        (
            {},
            {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"properties": {LETTERS: 1}}}}]},
        ),
        ({}, {"chat_template_kwargs": {"documents": [{"text": LETTERS}]}}),
        ({"tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": LETTERS}}]}, {}),
        ({"reasoning_content": LETTERS}, {}),
        ({"content": [{"type": "thinking", "thinking": LETTERS}]}, {}),
    ],
    ids=["tool", "schema", "template", "call", "reasoning", "thinking"],
)
def test_all_that_a_template_renders_is_counted_before_it_is_tokenised(turn: Any, fields: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    serving = SimpleNamespace(tokenizer_manager=SimpleNamespace(max_req_input_len=1000))

    def ask(*turns: Any, **fields: Any) -> Any:
        request = ChatCompletionRequest(
            model="tiny", messages=[{"role": "user", "content": [image, text_part("Hello.")]}, *turns], **fields
        )
        return check_messages(SERVER, lambda *_: "tokenised", serving, request, True)

    assert ask({"role": "assistant", "content": "Hello."}) == "tokenised"
    with pytest.raises(ValueError, match=r"the prompt has 33,0\d\d characters, the longest prompt of this server 1"):
        ask({"role": "assistant", "content": "Hello.", **turn}, **fields)
