"""Images that a server makes smaller before the encoder: as if the client had sent the smaller ones."""

from __future__ import annotations

import openai
import pytest
from PIL import Image

from tests.runtime.chats import Chat, small
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

CUP = "What is in this cup?"
IMAGE = small("coffee", 336, 336)
CHAT = Chat.ask(IMAGE, CUP)
# Qwen3-VL makes 10 x 10 tokens of the image.
SIDE = {"qwen2-vl": 6, "qwen2.5-vl": 6, "qwen3-vl": 5, "qwen3-vl-moe": 5, "glm-4.1v": 6, "glm-4.5v": 6}


@pytest.fixture
def scaling(served: Served) -> Served:
    if served.family not in SIDE:
        pytest.skip("its encoder reads images of one size")
    served.flush_cache()
    return served


def sent_smaller(served: Served) -> Chat:
    assert served.token_px is not None
    side_px = SIDE[served.family] * served.token_px
    return Chat.ask(IMAGE.resize((side_px, side_px), Image.Resampling.BICUBIC), CUP)


@pytest.mark.parametrize(("budget", "share"), [("25%", 0.25), (7, 7), ("all", None)])
def test_the_answer_is_that_of_the_smaller_image(scaling: Served, budget: str | int, share: float | int | None) -> None:
    smaller = sent_smaller(scaling)
    counted = scaling.metric("smaller_images_total")
    account = scaling.ask(CHAT, mmtok_budget=budget, mmtok_encoder_scale=0.5)
    assert scaling.metric("smaller_images_total") == counted + 1
    scaling.check(smaller, account, share)
    (images,) = account["mmtok"]
    assert images["image_tokens_in"] == SIDE[scaling.family] ** 2
    # The same pixels, so the same keys, and with them all that is cached.
    sent = scaling.ask(smaller, mmtok_budget=budget)
    assert sent["mmtok"] == account["mmtok"]
    assert sent["cached_tokens"] == sent["prompt_tokens"] - 1
    logprobs, expected = ([logprob for logprob, _, _ in each["output_token_logprobs"]] for each in (account, sent))
    assert logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_another_scale_is_another_image(scaling: Served) -> None:
    encoded = scaling.metric("encoded_images_total")
    accounts = [scaling.ask(CHAT, mmtok_budget=7, mmtok_encoder_scale=scale) for scale in (1, 0.5, 0.7)]
    assert scaling.metric("encoded_images_total") == encoded + 3
    assert {account["image_tokens"] for account in accounts} == {7}
    before_the_image = [account["cached_tokens"] for account in accounts]
    assert before_the_image[0] == 0
    assert max(before_the_image) < accounts[0]["prompt_tokens"] - 7
    scaling.check(CHAT, accounts[0], 7)
    # Another question, at the same scale, encodes nothing.
    scaling.ask(Chat.ask(IMAGE, "How many cats?"), mmtok_budget=7, mmtok_encoder_scale=0.5)
    assert scaling.metric("encoded_images_total") == encoded + 3


def test_a_later_turn_keeps_the_selection(scaling: Served) -> None:
    first = scaling.ask(CHAT, mmtok_budget="25%", mmtok_encoder_scale=0.5)
    more = ("assistant", "A cup."), ("user", "How many cats are on the red table?")
    later, smaller = CHAT, sent_smaller(scaling)
    for turn in more:
        later, smaller = later.then(*turn), smaller.then(*turn)
    account = scaling.ask(later, mmtok_budget="25%", mmtok_encoder_scale=0.5)
    assert account["cached_tokens"] >= first["prompt_tokens"]
    scaling.check(smaller, account, 0.25)


def test_a_model_whose_encoder_reads_one_size_refuses_a_scale(served: Served) -> None:
    if served.family in SIDE:
        pytest.skip("its encoder reads images of any size")
    with pytest.raises(
        openai.BadRequestError, match=r"mmtok_encoder_scale 0.5 does not run on this model: .* one size"
    ):
        served.ask(CHAT, mmtok_encoder_scale=0.5)
    assert served.ask(CHAT, mmtok_encoder_scale=1)["mmtok"] == served.ask(CHAT)["mmtok"]
