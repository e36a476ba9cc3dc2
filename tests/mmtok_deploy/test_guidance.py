from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest

from mmtok_deploy.guidance import ANSWER_INSTRUCTIONS, NON_VISUAL_WORDS, GuidanceRule, guidance_words

RULES: tuple[GuidanceRule, ...] = get_args(GuidanceRule)
# The authors' list, word by word.
STOP_WORDS = """
    a an the is are was were be been being have has had do does did it they he she we you i what where when why how who
    which and or but so if then question answer to for with by from at into onto upon
"""


def test_the_stop_words_are_the_authors() -> None:
    assert sorted(NON_VISUAL_WORDS) == sorted(STOP_WORDS.split())


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("word", STOP_WORDS.split())
def test_stop_words_are_dropped_in_any_case(word: str, case: Callable[[str], str]) -> None:
    assert guidance_words(f"{case(word)} red {case(word)}, {case(word)}-bus?", "keywords") == ["red", "bus"]
    assert guidance_words(f"x{word} {word}x", "keywords") == [f"x{word}", f"{word}x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What colour is the bus?", ["colour", "bus"]),
        ("<image>\nIs there a red bus in the image?", ["there", "red", "bus", "in", "image"]),
        ("red<image>bus", ["red", "bus"]),
        ("<image> <image>\nbus", ["bus"]),
        ("bus bus Bus", ["bus", "bus", "Bus"]),
        ("the driver's No. 42_b sign", ["driver", "s", "No", "42_b", "sign"]),
        ("Wo ist der Fußgänger?", ["Wo", "ist", "der", "Fußgänger"]),
        ("公交车 是 红色 吗", ["公交车", "是", "红色", "吗"]),
    ],
)
def test_keywords(text: str, words: list[str]) -> None:
    assert guidance_words(text, "keywords") == words


@pytest.mark.parametrize(
    "instruction",
    [
        "Answer the question using a single word or phrase.",
        "Answer with the option's letter from the given choices directly.",
    ],
)
def test_answer_instructions_are_dropped_from_keywords(instruction: str) -> None:
    assert instruction in ANSWER_INSTRUCTIONS
    assert guidance_words(f"What colour is the bus?\n{instruction}", "keywords") == ["colour", "bus"]
    assert guidance_words(f"What is it? {instruction}", "keywords") == ["What", "is", "it?"]
    assert guidance_words(instruction, "keywords") == []
    assert guidance_words(instruction, "question") == ["Question:", *instruction.split()]
    assert "single" in guidance_words("bus " + ANSWER_INSTRUCTIONS[0].lower(), "keywords")


@pytest.mark.parametrize("text", ["What is it?", "Who, then?", "?! ...", "<image>\nWhat is it?"])
def test_without_keywords_the_text_is_used_as_it_was(text: str) -> None:
    assert guidance_words(text, "keywords") == text.replace("<image>", "").split()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("text", ["", " \n\t", "<image>", "<image>\n<image> "])
def test_text_without_words_gives_none(text: str, rule: GuidanceRule) -> None:
    assert guidance_words(text, rule) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What is it?", ["Question:", "What", "is", "it?"]),
        ("<image>\n the  bus<image>stop ", ["Question:", "the", "bus", "stop"]),
    ],
)
def test_question(text: str, words: list[str]) -> None:
    assert guidance_words(text, "question") == words


@pytest.mark.parametrize("rule", ["", "Keywords", None])
@pytest.mark.parametrize("text", ["bus", ""])
def test_refuses_an_unknown_rule(text: str, rule: Any) -> None:
    with pytest.raises(ValueError, match=f"'keywords' or 'question', got {rule!r}"):
        guidance_words(text, rule)
