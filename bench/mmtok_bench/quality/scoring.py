"""Marks: which answers are right, what POPE counts, and what guessing would reach."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmtok_bench.pocket.questions import Kind, Question

__all__ = ["YesNo", "chance", "is_right", "majority", "normalise", "yes_no"]

_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NO_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_NUM_ANSWERS: dict[Kind, int] = {"existence": 2, "count": 5, "position": 4, "reading": 10}


@dataclass(frozen=True, slots=True)
class YesNo:
    """POPE's figures; "yes" is what is looked for. A share is None where it would divide by nothing."""

    accuracy: float
    precision: float | None
    recall: float | None
    f1: float | None
    yes_share: float


def normalise(text: str) -> str:
    """Returns the words of an answer in lower case, without punctuation, leading articles, and numbers as digits."""
    words = text.lower().translate(_NO_PUNCTUATION).split()
    while len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words)


def is_right(question: Question, said: str) -> bool:
    """True where the normalised answers are equal; for yes and no, where the first word is."""
    words = normalise(said)
    if question.kind == "existence":
        words = words.partition(" ")[0]
    return words == normalise(question.answer)


def yes_no(questions: Sequence[Question], said: Sequence[str]) -> YesNo:
    """Returns POPE's figures of answers to questions about existence; what begins with neither word is no "yes".

    Raises:
        ValueError: No questions.

    Source: POPE (arXiv 2305.10355, section 4), with "yes" as the positive class.
    """
    if not questions:
        raise ValueError("expected at least one question about existence")
    found = [normalise(answer).partition(" ")[0] == "yes" for answer in said]
    there = [question.answer == "yes" for question in questions]
    true_yes = sum(yes and real for yes, real in zip(found, there, strict=True))
    num_right = sum(is_right(question, answer) for question, answer in zip(questions, said, strict=True))
    precision = true_yes / sum(found) if any(found) else None
    recall = true_yes / sum(there) if any(there) else None
    either = sum(found) + sum(there)
    return YesNo(
        num_right / len(questions),
        precision,
        recall,
        2 * true_yes / either if either else None,
        sum(found) / len(found),
    )


def chance(kind: Kind) -> float:
    """Returns the accuracy of an answer drawn evenly from those that the kind's questions have."""
    return 1 / _NUM_ANSWERS[kind]


def majority(questions: Sequence[Question]) -> float:
    """Returns the accuracy of always giving the answer that is right most often for the question's first two words."""
    by_form: dict[str, Counter[str]] = {}
    for question in questions:
        by_form.setdefault(" ".join(question.text.split()[:2]), Counter())[question.answer] += 1
    return sum(max(answers.values()) for answers in by_form.values()) / len(questions)
