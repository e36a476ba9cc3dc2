"""Guidance as token ids, and a prompt of token ids as text."""

from __future__ import annotations

import asyncio

import pytest
from transformers import AutoTokenizer

from mmtok_sglang.guidance_tokenizer import GuidanceTokenizer
from tests.runtime.conftest import checkpoint
from tests.runtime.stand_ins import make_settings


def test_each_text_is_tokenised_word_by_word() -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen2.5-vl"))
    words = GuidanceTokenizer(make_settings(2))
    ids = asyncio.run(words.of(["Where is it?", "", "Where is it?"], tokenizer))
    assert list(ids) == ["Where is it?", ""]
    assert ids[""] == []
    alone = ("Question:", "Where", "is", "it?")
    one_by_one = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in alone]
    assert ids["Where is it?"] == [each for of_word in one_by_one for each in of_word]


@pytest.mark.parametrize("ids", [[1 << 40], [-1], ["a"], [None], [[1]]])
def test_ids_that_the_model_has_not_are_refused(ids: list[object]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen2.5-vl"))
    words = GuidanceTokenizer(make_settings(2))
    asked = tokenizer("Where is it?")["input_ids"]
    assert asyncio.run(words.decode(asked, tokenizer)) == "Where is it?"
    with pytest.raises(ValueError, match=r"^input_ids are token ids of the model: "):
        asyncio.run(words.decode([*asked, *ids], tokenizer))  # type: ignore[list-item]
