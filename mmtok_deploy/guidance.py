"""The words of a question that guide the selection.

Source: MMTok, github Ironieser/MMTok, behaviour of mmtok/core/text_processor.py and mmtok/core/mmtok_core.py.
"""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["ANSWER_INSTRUCTIONS", "NON_VISUAL_WORDS", "GuidanceRule", "guidance_words"]

GuidanceRule = Literal["keywords", "question"]

ANSWER_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)

_WORDS = (
    "a an the is are was were be been being have has had do does did it they he she we you i "
    "what where when why how who which and or but so if then question answer "
    "to for with by from at into onto upon"
)
NON_VISUAL_WORDS = frozenset(_WORDS.split())
"""Words, in lower case, that say nothing about an image."""


def guidance_words(text: str, rule: GuidanceRule) -> list[str]:
    """Returns the words to embed, in order; they are to be tokenised one by one, as the authors do.

    Args:
        text: The user's question. `<image>` markers in it are dropped.
        rule: "keywords" (LLaVA) drops the benchmark instructions and the words without visual meaning; if nothing is
            left, all words are used. "question" (Qwens) is `Question: ` and the whole text.

    Returns:
        Words without white space; empty if `text` holds no word, which leaves the image alone to be covered.

    Raises:
        ValueError: An unknown rule.
    """
    text = text.replace("<image>", " ")
    if rule == "question":
        return ["Question:", *text.split()] if text.strip() else []
    if rule != "keywords":
        raise ValueError(f"guidance rule is 'keywords' or 'question', got {rule!r}")
    for instruction in ANSWER_INSTRUCTIONS:
        text = text.replace(instruction, "")
    keywords = [word for word in re.findall(r"\b\w+\b", text) if word.lower() not in NON_VISUAL_WORDS]
    return keywords or text.split()
