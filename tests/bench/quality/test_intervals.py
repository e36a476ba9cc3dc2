from __future__ import annotations

import numpy as np
import pytest

from mmtok_bench.quality.scoring import accuracy_interval, auroc_interval, difference_interval, share_interval


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


def test_a_difference_is_drawn_in_pairs(rng: np.random.Generator) -> None:
    right = (rng.random(900) < 0.7).astype(float)
    gained = (right == 0) & (rng.random(900) < 0.1)
    interval = difference_interval(right + gained, right, np.ones(900))
    # As sure as the few answers that differ, whatever the accuracy.
    share = gained.mean()
    half = 1.96 * np.sqrt(share * (1 - share) / 900)
    assert interval.value == pytest.approx(share)
    assert (interval.low, interval.high) == pytest.approx((share - half, share + half), abs=0.004)
    flipped = difference_interval(right, right + gained, np.ones(900))
    assert (flipped.low, flipped.high) == pytest.approx((-interval.high, -interval.low), abs=0.002)


def test_answers_that_never_differ_are_not_certain_to() -> None:
    right = np.array([1.0, 0.0] * 15)
    interval = difference_interval(right, right, np.ones(30))
    assert interval.value == 0
    assert -interval.low == interval.high == pytest.approx(1 - 0.025 ** (1 / 30))
    with pytest.raises(ValueError, match=r"the same scenes, got \(30,\) and \(1,\)"):
        difference_interval(right, np.ones(1), np.ones(30))


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


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    scores, is_positive = np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])
    # Of four pairs: 3 > 2, 3 > 1, 1 < 2, and 1 = 1, which counts half.
    found = auroc_interval(np.tile(scores, 10), np.tile(is_positive, 10), np.repeat(np.arange(10), 4))
    assert found is not None
    assert (found.value, found.low, found.high) == (0.625, 0.625, 0.625)


def test_auroc_of_scores_that_say_nothing_is_a_half_within_its_interval(rng: np.random.Generator) -> None:
    is_positive = rng.random(600) < 0.3
    blind = auroc_interval(rng.random(600), is_positive, np.arange(600))
    sighted = auroc_interval(rng.random(600) + is_positive, is_positive, np.arange(600))
    assert blind is not None
    assert sighted is not None
    # 2.6 standard errors of the area under equal distributions (Mann-Whitney) to either side, at most.
    half = 2.6 * np.sqrt(601 / (12 * is_positive.sum() * (~is_positive).sum()))
    assert blind.low < 0.5 < blind.high
    assert 0.5 * half < blind.high - blind.low < 2 * half
    assert sighted.value == 1


def test_auroc_of_few_scenes_is_not_told(rng: np.random.Generator) -> None:
    is_positive = np.arange(200) < 9
    assert auroc_interval(rng.random(200), is_positive, np.arange(200)) is None
    assert auroc_interval(rng.random(200), ~is_positive, np.arange(200)) is None
