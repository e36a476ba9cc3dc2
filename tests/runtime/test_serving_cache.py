"""What the caches share, and what they must not."""

from __future__ import annotations

import base64
import re
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch.multiprocessing
from PIL import Image
from safetensors.torch import load_file
from sglang.srt.utils import MultiprocessingSerializer

from tests.runtime.chats import Chat, data_url, small
from tests.runtime.conftest import checkpoint
from tests.runtime.hand_pruned import HandPruned
from tests.runtime.other_weights import with_other_weights
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

CUP = "What is in this cup?"
CATS = "How many cats are on the red table?"


@pytest.fixture
def cached(served: Served) -> Served:
    served.flush_cache()
    return served


def test_same_image_and_question_hit_the_cache(cached: Served) -> None:
    chat = Chat.ask(small("coffee"), f"{CUP} {CATS} {CUP}")
    first, again = cached.ask(chat), cached.ask(chat)
    assert first["cached_tokens"] == 0
    assert again["cached_tokens"] == cached.from_cache(again["prompt_tokens"] - 1) > 0
    cached.check(chat, again)


def test_another_question_shares_only_the_text_before_the_image(cached: Served) -> None:
    first, other = Chat.ask(small("coffee"), CUP), Chat.ask(small("coffee"), CATS)
    cached.ask(first)
    account = cached.ask(other)
    assert account["cached_tokens"] == _tokens_before_the_image(cached, other)
    cached.check(other, account)


@pytest.mark.parametrize("budget", ["all", "20%", 30])
def test_another_budget_shares_only_the_text_before_the_image(cached: Served, budget: str | int) -> None:
    chat = Chat.ask(small("coffee"), CUP)
    cached.ask(chat)
    assert cached.ask(chat, mmtok_budget=budget)["cached_tokens"] == _tokens_before_the_image(cached, chat)


def test_a_later_turn_keeps_the_selection_and_hits_the_cache(cached: Served) -> None:
    first = Chat.ask(small("coffee"), CUP)
    account = cached.ask(first)
    later = first.then("assistant", "A cup.").then("user", CATS)
    later_account = cached.ask(later)
    assert later_account["cached_tokens"] >= cached.from_cache(account["prompt_tokens"])
    cached.check(later, later_account)


def test_an_image_encoded_before_is_right_under_another_prompt(cached: Served) -> None:
    """The embedding comes from SGLang's cache, and so do the positions that go with it."""
    cached.ask(Chat.ask(small("coffee"), CUP))
    chat = Chat.ask("Look:", small("coffee"), CUP)
    repeated = Chat((("system", ("Be brief.",)),)).then("user", small("coffee"), CUP)
    for other in (chat, repeated):
        cached.check(other, cached.ask(other, mmtok_guidance=CUP), guidance=[CUP])


def test_another_question_does_not_encode_the_image_again(cached: Served) -> None:
    image = small("rocket", 252, 224)
    encoded, hits = cached.metric("encoded_images_total"), cached.metric("feature_cache_hits_total")
    for question, budget in ((CUP, 0.1), (CATS, 0.1), (CUP, 0.2)):
        chat = Chat.ask(image, question)
        cached.check(chat, cached.ask(chat, mmtok_budget=budget), budget)
    assert cached.metric("encoded_images_total") - encoded == 1
    assert cached.metric("feature_cache_hits_total") - hits == 2


def test_another_question_does_not_read_the_image_again(cached: Served) -> None:
    """SGLang keeps preprocessed images of a Qwen, with a budget by default."""
    if not cached.family.startswith("qwen"):
        pytest.skip("SGLang keeps none")
    image = small("coffee", 252, 252)
    steps = [f"image_{step}_milliseconds_count" for step in ("preprocess", "hash")]
    before = [cached.metric(step) for step in steps]
    for question, budget in ((CUP, 0.1), (CATS, 0.1), (CUP, 0.2)):
        chat = Chat.ask(image, question)
        cached.check(chat, cached.ask(chat, mmtok_budget=budget), budget)
    cached.ask(chat, mmtok_budget="all")
    assert [cached.metric(step) - each for step, each in zip(steps, before, strict=True)] == [1, 4]
    cached.flush_cache()
    cached.ask(Chat.ask(image, CUP))
    assert cached.metric(steps[0]) - before[0] == 2


def test_a_flush_forgets_features(cached: Served) -> None:
    image = small("rocket", 224, 252)
    encoded = cached.metric("encoded_images_total")
    for question in (CUP, CATS):
        cached.ask(Chat.ask(image, question))
        assert cached.metric("feature_cache_bytes") > 0
        cached.flush_cache()
        assert cached.metric("feature_cache_bytes") == 0
    assert cached.metric("encoded_images_total") - encoded == 2


@pytest.mark.parametrize("budget", ["10%", "25%", "all"])
@pytest.mark.parametrize(
    "sizes",
    [[(336, 336), (1008, 112)], [(112, 1008), (336, 336)], [(252, 336), (336, 252), (126, 168)]],
    ids=["wider", "square", "turned"],
)
def test_blank_pages_of_different_shapes_are_different_images(
    cached: Served, sizes: list[tuple[int, int]], budget: str
) -> None:
    """Their pixels are the same numbers in the same order; how they lie, their padding and their sizes are not.

    All tokens of a blank page are alike, so which are kept depends on the encoder's rounding: the server is held
    against itself with empty caches.
    """
    if cached.family == "internvl3":
        pytest.skip("its tiles have one size: as many of them are the same input")
    scale = (cached.token_px or 28) / 28
    pages = [Image.new("RGB", (round(width * scale), round(height * scale)), "white") for width, height in sizes]
    chats = [Chat.ask(page, CUP) for page in pages]
    alone = []
    for chat in chats:
        cached.flush_cache()
        alone.append(cached.ask(chat, mmtok_budget=budget))
    cached.flush_cache()
    for chat, expected in zip(chats, alone, strict=True):
        account = cached.ask(chat, mmtok_budget=budget)
        assert account["cached_tokens"] <= _tokens_before_the_image(cached, chat)
        assert _difference(account, expected) < LOGPROB_TOLERANCE
    for chat, expected in zip(chats, alone, strict=True):
        again = cached.ask(chat, mmtok_budget=budget)
        assert again["cached_tokens"] == cached.from_cache(again["prompt_tokens"] - 1)
        assert _difference(again, expected) < LOGPROB_TOLERANCE


def test_an_image_that_brings_its_own_padding_is_another_image(cached: Served) -> None:
    """Padded to a square by the model's processor, both are the same pixels; which may be picked is not the same."""
    image_processor = getattr(cached.judge.processor, "image_processor", None)
    image, mean = small("coffee"), getattr(image_processor, "image_mean", [0.5] * 3)
    square = Image.new("RGB", (336, 336), tuple(int(255 * value) for value in mean))
    square.paste(image, (0, 42))
    for each in (image, square, image):
        chat = Chat.ask(each, CUP)
        cached.check(chat, cached.ask(chat))


@pytest.mark.parametrize("name", ["cache_salt", "extra_key"])
def test_callers_that_keep_apart_share_nothing(cached: Served, name: str) -> None:
    chat = Chat.ask(small("coffee"), f"{CUP} {CATS}")
    encoded = cached.metric("encoded_images_total")
    values: list[dict[str, Any]] = [{}, {name: "a"}, {name: "b"}]
    for value in values:
        account = cached.ask(chat, **value)
        assert account["cached_tokens"] == 0
        cached.check(chat, account)
    assert cached.metric("encoded_images_total") - encoded == 3
    for value in values:
        account = cached.ask(chat, **value)
        assert account["cached_tokens"] == cached.from_cache(account["prompt_tokens"] - 1)
        cached.check(chat, account)
        # Another question about the image, of the same caller.
        other = Chat.ask(small("coffee"), CATS)
        cached.check(other, cached.ask(other, **value))
    assert cached.metric("encoded_images_total") - encoded == 3


def test_images_that_the_caller_names_are_refused(cached: Served) -> None:
    chat = Chat.ask(small("coffee"), CUP)
    message = chat.for_server()
    message[0]["content"][0]["image_url"]["content_hash"] = "sha256:" + "0" * 64
    body = {"text": cached.judge.prompt(chat.for_template()), "image_data": [data_url(small("coffee"))]}
    for path, request in (
        ("/v1/chat/completions", {"model": "default", "messages": message}),
        ("/generate", body | {"mm_hashes": ["0xabc"]}),
        ("/generate", body | {"mm_content_hashes": ["sha256:" + "0" * 64]}),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            cached.post(path, request)
        assert error.value.code == 400
        assert "--mmtok-trust-image-hashes" in error.value.read().decode()


def test_a_name_that_the_caller_gives_an_unpruned_image_misleads_nobody(cached: Served) -> None:
    """SGLang would give the second image the embedding of the first."""
    images = [small(name) for name in ("coffee", "rocket")]
    for budget, share in (("all", None), ("10%", 0.1)):
        for image in images:
            chat = Chat.ask(image, CUP)
            body = {
                "text": cached.judge.prompt(chat.for_template()),
                "image_data": [data_url(image)],
                "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
                "return_logprob": True,
                "top_logprobs_num": 5,
                "mm_processor_kwargs": {"mmtok_budget": "all"},
                "mm_hashes": ["0xabc"],
            }
            cached.check(chat, cached.post("/generate", body)["meta_info"], None)
            cached.check(chat, cached.ask(chat, mmtok_budget=budget), share)


@pytest.mark.parametrize("way", ["from disk", "from tensors"])
def test_other_weights_take_nothing_from_the_old_ones(cached: Served, way: str, tmp_path: Path) -> None:
    """Neither tokens, nor features, nor selections, nor the text before the image."""
    old = checkpoint(cached.family)
    new = with_other_weights(old, tmp_path / "new")
    other_judge = HandPruned(cached.family, new)
    chats = [Chat.ask(small("coffee"), f"{CUP} {CATS}"), Chat.ask("Look:", small("coffee"), f"{CATS} {CUP}")]
    for path, judge in ((None, cached.judge), (new, other_judge), (old, cached.judge)):
        if path is not None:
            if way == "from disk":
                assert cached.post("/update_weights_from_disk", {"model_path": str(path)})["success"]
            else:
                _update_from_tensors(cached, path)
        served = Served(cached.family, cached.server, judge)
        for chat in chats:
            account = served.ask(chat)
            served.check(chat, account)
            again = served.ask(chat)
            assert again["cached_tokens"] == cached.from_cache(again["prompt_tokens"] - 1)
            served.check(chat, again)


def test_retracted_requests_go_on_with_other_weights(cached: Served, tmp_path: Path) -> None:
    """As a trainer changes the weights of a running server: the images are encoded again, under other keys."""
    old = checkpoint(cached.family)
    new = with_other_weights(old, tmp_path / "new")
    num_tokens = 400

    def answer(client: openai.OpenAI, name: str, chunks: list[Any]) -> None:
        stream = client.chat.completions.create(
            model="default",
            messages=cast(Any, Chat.ask(small(name), CUP).for_server()),
            max_tokens=num_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            chunks.append(chunk)

    answers: dict[str, list[Any]] = {"coffee": [], "rocket": []}
    with cached.server.client() as client, ThreadPoolExecutor() as pool:
        asked = [pool.submit(answer, client, *each) for each in answers.items()]
        while not all(answers.values()):
            assert not any(each.done() for each in asked)
            time.sleep(0.001)
        cached.post("/pause_generation", {"mode": "retract"})
        try:
            assert not any(each.done() for each in asked)
            for path in (new, old):
                update = {"model_path": str(path), "flush_cache": path == new}
                assert cached.post("/update_weights_from_disk", update)["success"]
        finally:
            cached.post("/continue_generation")
        for each in asked:
            each.result(60)
    assert [chunks[-1].usage.completion_tokens for chunks in answers.values()] == [num_tokens, num_tokens]
    chat = Chat.ask(small("coffee"), CATS)
    cached.check(chat, cached.ask(chat))


def test_what_selection_did_is_in_the_metrics_and_in_the_log(cached: Served) -> None:
    names = ("selections_total", "selection_tokens_in_total", "selection_tokens_kept_total")
    calls = "selection_milliseconds_count"
    before = [cached.metric(name) for name in (*names, calls)]
    account = cached.ask(Chat.ask(small("rocket", 224, 224), small("coffee", 224, 224), CUP))
    selections, tokens_in, tokens_kept, num_calls = (
        cached.metric(name) - value for name, value in zip((*names, calls), before, strict=True)
    )
    assert num_calls == 1
    # LLaVA-NeXT selects from each tile.
    assert selections >= 2
    assert tokens_kept == account["image_tokens"]
    assert tokens_in > 9 * tokens_kept
    assert cached.metric("selection_milliseconds_sum") > 0
    assert re.search(r"MMTok: \d+ selections in 1 calls of .* tokens, 0 fallbacks; ", cached.server.log_text())


PARTS = ("vision_encoder_milliseconds_sum", "selection_milliseconds_sum", "language_prefill_milliseconds_sum")
COUNTS = ("vision_encoder_images_total", "language_prefill_requests_total", "language_prefill_tokens_total")


@pytest.mark.parametrize("budget", ["10%", "all"])
def test_the_parts_of_a_prefill_are_in_the_metrics(cached: Served, budget: str) -> None:
    before = [cached.metric(name) for name in (*PARTS, *COUNTS)]
    chat = Chat.ask(small("astronaut", 224, 252), CUP)
    start_s = time.perf_counter()
    account = cached.ask(chat, max_tokens=1, mmtok_budget=budget)
    to_first_token_ms = (time.perf_counter() - start_s) * 1000
    values = [cached.metric(name) - value for name, value in zip((*PARTS, *COUNTS), before, strict=True)]
    encoder_ms, selection_ms, prefill_ms = values[:3]
    assert encoder_ms > 0
    assert prefill_ms > 0
    assert (selection_ms > 0) is (budget != "all")
    assert encoder_ms + selection_ms + prefill_ms < to_first_token_ms
    assert values[3:] == [1, 1, account["prompt_tokens"]]


def test_a_selection_that_fell_back_is_made_anew(cached: Served) -> None:
    """Its prefix matches no new request; another selection from the same features goes on."""
    chat = Chat.ask(small("coffee"))
    encoded, fallbacks = cached.metric("encoded_images_total"), cached.metric("selection_fallbacks_total")
    accounts = [cached.ask(chat, mmtok_method="text-coverage") for _ in range(3)]
    before_the_image = _tokens_before_the_image(cached, chat)
    assert [account["cached_tokens"] for account in accounts] == [0, before_the_image, before_the_image]
    assert cached.metric("encoded_images_total") - encoded == 1
    assert cached.metric("selection_fallbacks_total") - fallbacks >= 3
    assert max(_difference(account, accounts[0]) for account in accounts) < LOGPROB_TOLERANCE
    selected = cached.ask(chat)
    assert cached.ask(chat)["cached_tokens"] == cached.from_cache(selected["prompt_tokens"] - 1)
    cached.check(chat, selected)


def _update_from_tensors(served: Served, path: Path) -> None:
    """Sends a checkpoint's weights in two parts, as a trainer does, and asks in between; caches are not flushed."""
    # By files: another process may not ask this one for a tensor's file descriptor.
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        (file,) = path.glob("*.safetensors")
        weights = list(load_file(file).items())
        assert served.post("/begin_weight_update")["success"]
        for part in (weights[::2], weights[1::2]):
            sent = base64.b64encode(MultiprocessingSerializer.serialize(part)).decode()
            update = {"serialized_named_tensors": [sent], "flush_cache": False}
            assert served.post("/update_weights_from_tensor", update)["success"]
            served.ask(Chat.ask(small("coffee"), f"{CUP} {CATS}"))
        assert served.post("/end_weight_update")["success"]
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def _difference(account: dict[str, Any], expected: dict[str, Any]) -> float:
    """Returns the largest difference of the logprobs of two answers, infinity where they are of other tokens."""
    pairs = [
        (one, other)
        for step, expected_step in zip(account["output_top_logprobs"], expected["output_top_logprobs"], strict=True)
        for one, other in zip(step, expected_step, strict=True)
    ]
    if any(one[1] != other[1] for one, other in pairs):
        return float("inf")
    return max(abs(float(one[0]) - float(other[0])) for one, other in pairs)


def _tokens_before_the_image(served: Served, chat: Chat) -> int:
    inputs = served.judge.processor(text=[served.judge.prompt(chat.for_template())], images=chat.images)
    before: int = list(inputs["input_ids"][0]).index(served.judge.model.config.image_token_id)
    return served.from_cache(before)
