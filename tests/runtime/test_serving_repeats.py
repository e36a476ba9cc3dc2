"""Patches that the encoder does not read: the answers are those of a model in which nothing attends to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.runtime.chats import Chat, small
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

QUESTION = "What is in this cup?"


def page(seed: int | None = None) -> Image.Image:
    """White, with a photograph in it; with a seed, the white is noisy by 2 of 255."""
    image = Image.new("RGB", (336, 336), "white")
    if seed is not None:
        noise = np.random.default_rng(seed).integers(253, 256, (336, 336, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
    image.paste(small("coffee", 150, 120), (70, 90))
    return image


PAGE = page()
CHAT = Chat.ask(PAGE, QUESTION)


@pytest.fixture
def skipping(served: Served) -> Served:
    if not served.family.startswith("qwen"):
        pytest.skip("its encoder reads whole images")
    served.flush_cache()
    return served


def repeated(served: Served, image: Image.Image, max_difference: int) -> Tensor:
    """The tokens that repeat a neighbour, from the pixels that Hugging Face's processor makes."""
    inputs = served.judge.processor.image_processor(images=[image], return_tensors="pt")
    _, rows, columns = (inputs["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    std = torch.tensor(served.judge.processor.image_processor.image_std)
    pixels = inputs["pixel_values"].view(rows * columns, 4, 3, -1) * std[:, None] * 255
    shown: list[int] = []
    for place, token in enumerate(pixels):
        neighbours = ([shown[-1]] if place % columns else []) + ([shown[place - columns]] if place >= columns else [])
        like = [each for each in neighbours if (pixels[each] - token).abs().max() < max_difference + 0.5]
        shown.append(like[0] if like else place)
    return torch.tensor(shown) != torch.arange(len(shown))


def check(
    served: Served, chat: Chat, account: dict[str, Any], budget: float | int | None, max_difference: int = 0
) -> None:
    masks = [repeated(served, image, max_difference) for image in chat.images]
    kept = [(~mask).nonzero().flatten() for mask in masks]
    pruned = served.judge.prune(
        *(served.judge.prompt(chat.for_template()), chat.images, chat.guidance, budget or 1),
        kept=kept if budget is None else None,
        skipped=masks,
    )
    assert account["prompt_tokens"] == len(pruned.embeddings)
    assert account["image_tokens"] == pruned.num_image_tokens
    assert served.judge.max_error(pruned, account) < LOGPROB_TOLERANCE
    (told,) = account["mmtok"]
    assert [image["tokens_encoded"] for image in told["images"]] == [int((~mask).sum()) for mask in masks]
    assert [image["tokens_in"] for image in told["images"]] == [len(mask) for mask in masks]


@pytest.mark.parametrize(("budget", "expected"), [(9, 9), ("10%", 0.1), ("all", None)])
def test_the_answer_is_that_of_a_model_without_the_patches(
    skipping: Served, budget: str | int, expected: float | int | None
) -> None:
    num_skipped = skipping.metric("skipped_tokens_total")
    account = skipping.ask(CHAT, mmtok_budget=budget, mmtok_skip_repeats=0)
    check(skipping, CHAT, account, expected)
    mask = repeated(skipping, PAGE, 0)
    assert 0.5 < mask.float().mean() < 0.9
    assert skipping.metric("skipped_tokens_total") == num_skipped + mask.sum()
    # The mask matters: with all patches read, logprobs are others.
    whole = skipping.judge.prune(skipping.judge.prompt(CHAT.for_template()), [PAGE], CHAT.guidance, 9)
    if budget == 9:
        assert skipping.judge.max_error(whole, account) > 10 * LOGPROB_TOLERANCE


def test_pixels_that_differ_little_are_repeated_within_the_difference(skipping: Served) -> None:
    chat = Chat.ask(page(seed=0), QUESTION)
    for max_difference in (0, 4):
        check(
            *(skipping, chat, skipping.ask(chat, mmtok_budget=9, mmtok_skip_repeats=max_difference)),
            *(9, max_difference),
        )
    assert repeated(skipping, chat.images[0], 4).sum() > 10 > repeated(skipping, chat.images[0], 0).sum()


def test_images_with_and_without_repetitions_are_encoded_together(skipping: Served) -> None:
    chat = Chat.ask(small("chelsea", 280, 224), PAGE, small("rocket", 224, 280), page(seed=1), QUESTION)
    check(skipping, chat, skipping.ask(chat, mmtok_budget="15%", mmtok_skip_repeats=3), 0.15, 3)


def test_all_that_is_encoded_is_kept_whatever_is_asked(skipping: Served) -> None:
    first = skipping.ask(CHAT, mmtok_budget="all", mmtok_skip_repeats=0)
    later = Chat.ask(PAGE, "How many cats are there?")
    encoded = skipping.metric("encoded_images_total")
    for budget in ("all", "95%"):
        account = skipping.ask(later, mmtok_budget=budget, mmtok_skip_repeats=0)
        check(skipping, later, account, None)
        assert account["cached_tokens"] >= skipping.from_cache(first["image_tokens"])
    assert skipping.metric("encoded_images_total") == encoded
    (told,) = account["mmtok"]
    assert (told["images"][0]["method"], told["num_fallbacks"]) == ("even", 0)


@pytest.mark.parametrize("is_whole_first", [True, False])
def test_an_image_that_is_read_whole_is_another_one(skipping: Served, is_whole_first: bool) -> None:
    fields: list[dict[str, Any]] = [
        {"mmtok_budget": "all"},
        {"mmtok_budget": "all", "mmtok_skip_repeats": 0},
        {"mmtok_budget": 9},
    ]
    answers = [(each, skipping.ask(CHAT, **each)) for each in (fields if is_whole_first else fields[::-1])]
    for each, account in answers:
        if "mmtok_skip_repeats" in each:
            check(skipping, CHAT, account, None)
        else:
            skipping.check(CHAT, account, 9 if each["mmtok_budget"] == 9 else None)


def test_another_question_encodes_nothing(skipping: Served) -> None:
    skipping.ask(CHAT, mmtok_budget=9, mmtok_skip_repeats=0)
    encoded = skipping.metric("encoded_images_total")
    later = Chat.ask(PAGE, "How many cats are on the red table?")
    check(skipping, later, skipping.ask(later, mmtok_budget=12, mmtok_skip_repeats=0), 12)
    assert skipping.metric("encoded_images_total") == encoded


def test_an_image_without_repetitions_is_read_as_ever(skipping: Served) -> None:
    chat = Chat.ask(small("coffee"), QUESTION)
    account = skipping.ask(chat, mmtok_budget=9, mmtok_skip_repeats=0)
    skipping.check(chat, account, 9)
    again = skipping.ask(chat, mmtok_budget=9)
    assert again["cached_tokens"] == skipping.from_cache(again["prompt_tokens"] - 1)


def test_a_blank_page_is_a_token(skipping: Served) -> None:
    chat = Chat.ask(Image.new("RGB", (336, 336), "white"), QUESTION)
    account = skipping.ask(chat, mmtok_budget="all", mmtok_skip_repeats=0)
    check(skipping, chat, account, None)
    assert account["image_tokens"] == 1


@pytest.mark.parametrize("value", [-2, 256, 1.0, "8", True])
def test_a_bad_difference_is_refused(served: Served, value: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"skip_repeats is a whole number from -1 \(off\) to 255, got"):
        served.ask(CHAT, mmtok_skip_repeats=value)


def test_what_cannot_leave_patches_out_is_refused(served: Served) -> None:
    fields: dict[str, Any]
    if served.family.startswith("qwen"):
        fields, message = {"mmtok_method": "downsample"}, "skip_repeats 0 does not go with the method downsample"
    else:
        fields, message = {}, "mmtok_skip_repeats 0 does not run on this model: its vision encoder reads whole images"
    with pytest.raises(openai.BadRequestError, match=message):
        served.ask(CHAT, **fields, mmtok_skip_repeats=0)
