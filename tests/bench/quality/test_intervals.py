from __future__ import annotations

import numpy as np
import pytest

from mmtok_bench.quality.scoring import accuracy_interval, share_interval


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_interval_is_as_wide_as_the_normal_one(rng: np.random.Generator) -> None:
    # One question a scene: the interval is that of a binomial share.
    right = (rng.random(900) < 0.7).astype(float)
    interval = accuracy_interval(right, np.ones(900))
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 900)
    assert interval.value == right.mean()
    assert interval.low == pytest.approx(right.mean() - half, abs=0.005)
    assert interval.high == pytest.approx(right.mean() + half, abs=0.005)


def test_questions_on_one_scene_are_not_independent(rng: np.random.Generator) -> None:
    right = (rng.random(100) < 0.5).astype(float)
    one, five = accuracy_interval(right, np.ones(100)), accuracy_interval(5 * right, np.full(100, 5.0))
    assert (five.low, five.high) == (one.low, one.high)


def test_share_is_drawn_in_pairs(rng: np.random.Generator) -> None:
    # Where pruning changes no answer, no draw changes the share, however unsure the accuracy is.
    right = (rng.random(60) < 0.5).astype(float)
    same = share_interval(right, right)
    assert same is not None
    assert (same.value, same.low, same.high) == (1, 1, 1)
    fewer = right * (rng.random(60) < 0.8)
    share = share_interval(fewer, right)
    assert share is not None
    assert share.low < share.value == fewer.sum() / right.sum() < share.high < 1


def test_share_of_nearly_nothing_is_left_out() -> None:
    right = np.zeros(50)
    right[:9] = 1
    assert share_interval(right, right) is None


def test_all_right_or_all_wrong_is_not_certain() -> None:
    # Two questions a scene: they are no more trials than the scenes are.
    asked = np.full(30, 2.0)
    interval = accuracy_interval(asked, asked)
    assert (interval.value, interval.high) == (1, 1)
    assert interval.low == pytest.approx(0.025 ** (1 / 30))
    interval = accuracy_interval(np.zeros(30), asked)
    assert (interval.value, interval.low) == (0, 0)
    assert interval.high == pytest.approx(1 - 0.025 ** (1 / 30))


def test_counts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"at least 2 scenes, got \(1,\)"):
        accuracy_interval(np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        accuracy_interval(np.ones(3), np.ones(2))
