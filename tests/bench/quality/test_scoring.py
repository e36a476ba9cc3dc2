from __future__ import annotations

import pytest

from mmtok_bench.pocket.questions import Question
from mmtok_bench.quality.scoring import YesNo, chance, is_right, majority, normalise, yes_no


def existence(answer: str) -> Question:
    return Question("existence", "Is there a red star in the image?", answer)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Top left.", "top left"),
        (" the  digit 7", "digit 7"),
        ("Three", "3"),
        ("A", "a"),
        ("top-left", "top left"),
        ("", ""),
    ],
)
def test_normalise(said: str, words: str) -> None:
    assert normalise(said) == words


@pytest.mark.parametrize(
    ("kind", "answer", "said", "expected"),
    [
        ("existence", "yes", "Yes, there is.", True),
        ("existence", "no", "yes", False),
        ("existence", "no", "nothing", False),
        ("existence", "no", "", False),
        ("count", "3", "three", True),
        ("count", "3", "3 or 4", False),
        ("position", "top left", "top", False),
        ("position", "top left", "Top left.", True),
        ("reading", "K", "k", True),
        ("reading", "7", "1", False),
    ],
)
def test_is_right(kind: str, answer: str, said: str, expected: bool) -> None:
    assert is_right(Question(kind, "", answer), said) is expected


def test_popes_figures_by_hand() -> None:
    # 2 of 3 found; 1 of 3 that are not there "found"; one answer is neither yes nor no.
    there = [existence("yes")] * 3 + [existence("no")] * 3
    found = yes_no(there, ["yes", "yes", "no", "yes", "no", "red"])
    assert found == YesNo(accuracy=0.5, precision=2 / 3, recall=2 / 3, f1=2 / 3, yes_share=0.5)


def test_popes_figures_that_there_are_not() -> None:
    assert yes_no([existence("no")], ["no"]) == YesNo(1.0, None, None, None, 0.0)
    with pytest.raises(ValueError, match="at least one question"):
        yes_no([], [])


def test_baselines() -> None:
    digits = [Question("reading", "What digit is in the image?", answer) for answer in "1123"]
    letters = [Question("reading", "What letter is in the image?", answer) for answer in "BCBB"]
    assert majority(digits) == 0.5
    assert majority(digits + letters) == (2 + 3) / 8
    assert [chance(kind) for kind in ("existence", "count", "position", "reading")] == [1 / 2, 1 / 5, 1 / 4, 1 / 10]
