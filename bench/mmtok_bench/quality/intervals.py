"""How sure a score is: bootstrap intervals over scenes, pruned and unpruned drawn together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["Interval", "accuracy_interval", "share_interval"]

_LEVEL = 0.95
_NUM_RESAMPLES = 2000
_SEED = 0

_Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A score with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def accuracy_interval(num_right: _Counts, num_asked: _Counts) -> Interval:
    """Returns the accuracy with its interval; scenes are drawn, as the questions about one are not independent.

    Where all answers are right or all are wrong, every draw is alike and says nothing: the interval is the exact one
    (Clopper-Pearson) of as many trials as there are scenes.

    Args:
        num_right: [scenes], right answers.
        num_asked: [scenes], questions.

    Raises:
        ValueError: Shapes that differ, or fewer than two scenes.
    """
    drawn = _ratio_interval(num_right, num_asked)
    if drawn.value not in (0, 1):
        return drawn
    num_scenes = len(num_asked)
    exact = stats.binomtest(num_scenes if drawn.value else 0, num_scenes).proportion_ci(_LEVEL, method="exact")
    return Interval(drawn.value, float(exact.low), float(exact.high))


def share_interval(num_right: _Counts, num_right_unpruned: _Counts) -> Interval | None:
    """Returns the share of the unpruned score with its interval; None where a draw may have no right unpruned answer.

    Args:
        num_right: [scenes], right answers of the pruned model.
        num_right_unpruned: [scenes], those of the unpruned one to the same questions: both are drawn together.

    Raises:
        ValueError: Shapes that differ, or fewer than two scenes.
    """
    # Below this many scenes with a right answer, a draw that misses all of them is no longer negligible.
    if np.count_nonzero(num_right_unpruned) < 10:
        return None
    return _ratio_interval(num_right, num_right_unpruned)


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
        # BCa is undefined where every scene has the same score, as at 100%.
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    value = float(numerators.sum() / denominators.sum())
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))
