"""Scores of answers: right or wrong, POPE's figures, the accuracy of guessing, and intervals."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mmtok_bench.pocket.questions import PAGE_KINDS, Question

__all__ = [
    "Interval",
    "YesNo",
    "accuracy_interval",
    "auroc_interval",
    "chance",
    "difference_interval",
    "is_right",
    "majority",
    "max_words",
    "normalise",
    "share_interval",
    "yes_no",
]

_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NO_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
# On pages: one to three digits, or one to three of ten letters.
_NUM_VALUES = 2 * (10 + 10**2 + 10**3)
_NUM_ANSWERS: dict[str, int] = {
    **{"existence": 2, "count": 5, "position": 4, "reading": 10},
    **dict.fromkeys(PAGE_KINDS, _NUM_VALUES),
}
_LEVEL = 0.95
_NUM_RESAMPLES = 2000
_SEED = 0

_Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class YesNo:
    """POPE's figures; "yes" is the positive class. A share whose denominator is 0 is None."""

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
    """Returns whether the normalised answers are equal.

    Only the first words count for questions about existence, and spaces do not count for questions about pages.
    """
    words, expected = normalise(said), normalise(question.answer)
    if question.kind == "existence":
        words = words.partition(" ")[0]
    if question.kind in PAGE_KINDS:
        words, expected = words.replace(" ", ""), expected.replace(" ", "")
    return words == expected


def max_words(question: Question) -> int:
    """Returns the most words that an answer may have: those of the right answer, and one more for pages.

    Values on pages have different lengths, so a model must also know where a value ends.
    """
    return len(normalise(question.answer).split()) + (question.kind in PAGE_KINDS)


def yes_no(questions: Sequence[Question], said: Sequence[str]) -> YesNo:
    """Returns POPE's figures of answers to questions about existence.

    An answer that begins with neither "yes" nor "no" counts as "no" in the shares of "yes", and is never right.

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


def chance(kind: str) -> float:
    """Returns the accuracy of an answer drawn evenly from those that the kind's questions have."""
    return 1 / _NUM_ANSWERS[kind]


def majority(questions: Sequence[Question]) -> float:
    """Returns the accuracy of always giving the answer that is right most often for the question's first two words."""
    by_form: dict[str, Counter[str]] = {}
    for question in questions:
        by_form.setdefault(" ".join(question.text.split()[:2]), Counter())[question.answer] += 1
    return sum(max(answers.values()) for answers in by_form.values()) / len(questions)


@dataclass(frozen=True, slots=True)
class Interval:
    """A score with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of_draws(cls, value: float, draws: _Counts) -> Interval:
        """Returns the score with the percentile interval of [n] scores of resampled scenes."""
        low, high = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
        return cls(float(value), float(low), float(high))

    def metrics(self, name: str) -> dict[str, float]:
        """Returns the score as the metric `name`, and its ends as `name_low` and `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def accuracy_interval(num_right: _Counts, num_asked: _Counts) -> Interval:
    """Returns the accuracy with its interval, from resampled scenes: questions about one scene are not independent.

    If all answers are right or all are wrong, all resamples are equal: the interval is then the exact one
    (Clopper-Pearson) of as many trials as there are scenes.

    Args:
        num_right: [scenes], right answers.
        num_asked: [scenes], questions.

    Raises:
        ValueError: The shapes differ, or there are fewer than two scenes.
    """
    drawn = _ratio_interval(num_right, num_asked)
    if drawn.value not in (0, 1):
        return drawn
    num_scenes = len(num_asked)
    exact = stats.binomtest(num_scenes if drawn.value else 0, num_scenes).proportion_ci(_LEVEL, method="exact")
    return Interval(drawn.value, float(exact.low), float(exact.high))


def share_interval(num_right: _Counts, num_right_unpruned: _Counts) -> Interval | None:
    """Returns the share of the unpruned score with its interval; None if a draw may have no right unpruned answer.

    Args:
        num_right: [scenes], right answers of the pruned model.
        num_right_unpruned: [scenes], right answers of the unpruned model to the same questions.

    Raises:
        ValueError: The shapes differ, or there are fewer than two scenes.
    """
    # Below this many scenes with a right answer, a draw that misses all of them is no longer negligible.
    if np.count_nonzero(num_right_unpruned) < 10:
        return None
    return _ratio_interval(num_right, num_right_unpruned)


def difference_interval(num_right: _Counts, num_right_others: _Counts, num_asked: _Counts) -> Interval:
    """Returns the difference of two accuracies on the same questions, with its interval.

    If every scene has equally many right answers in both, all resamples are 0: the interval then reaches from -p to p,
    where p is the exact bound (Clopper-Pearson) of the share of scenes that differ, of which none was seen.

    Args:
        num_right: [scenes], right answers.
        num_right_others: [scenes], right answers to compare with.
        num_asked: [scenes], questions.

    Raises:
        ValueError: The shapes differ, or there are fewer than two scenes.
    """
    if num_right.shape != num_right_others.shape:
        raise ValueError(f"expected counts of the same scenes, got {num_right.shape} and {num_right_others.shape}")
    drawn = _ratio_interval(num_right - num_right_others, num_asked)
    if (num_right != num_right_others).any():
        return drawn
    ends = stats.binomtest(0, len(num_asked)).proportion_ci(_LEVEL, method="exact")
    return Interval(0.0, -float(ends.high), float(ends.high))


def auroc_interval(scores: _Counts, is_positive: NDArray[np.bool_], scenes: NDArray[np.int64]) -> Interval | None:
    """Returns the area under the ROC curve with its interval, from draws of whole scenes.

    It is the share of pairs of a positive and a negative question in which the positive one has the larger score; equal
    scores count half. None if fewer than ten scenes have a positive question, or fewer than ten a negative one.

    Args:
        scores: [questions].
        is_positive: [questions].
        scenes: [questions], the number of each question's scene, from 0 on.
    """
    positive, negative = scenes[is_positive], scenes[~is_positive]
    if min(len(np.unique(positive)), len(np.unique(negative))) < 10:
        return None
    above, below = scores[is_positive][:, None], scores[~is_positive][None]
    wins = (above > below) + 0.5 * (above == below)
    num_scenes = int(scenes.max()) + 1
    rng = np.random.default_rng(_SEED)
    drawn = rng.multinomial(num_scenes, np.full(num_scenes, 1 / num_scenes), size=_NUM_RESAMPLES).astype(float)
    counts = drawn[:, positive], drawn[:, negative]
    pairs = counts[0].sum(axis=1) * counts[1].sum(axis=1)
    draws = ((counts[0] @ wins) * counts[1]).sum(axis=1)[pairs > 0] / pairs[pairs > 0]
    return Interval.of_draws(wins.mean(), draws)


def _ratio_interval(numerators: _Counts, denominators: _Counts) -> Interval:
    if numerators.shape != denominators.shape or numerators.ndim != 1 or len(numerators) < 2:
        raise ValueError(
            f"expected two counts for each of at least 2 scenes, got {numerators.shape} and {denominators.shape}"
        )
    found = stats.bootstrap(
        (numerators, denominators),
        lambda above, below, axis: above.sum(axis=axis) / below.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=_NUM_RESAMPLES,
        confidence_level=_LEVEL,
        # BCa is undefined if every scene has the same score, as at 100%.
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    value = float(numerators.sum() / denominators.sum())
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))
