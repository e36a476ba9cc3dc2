"""Calibrates the budget auto with rows of `mmtok quality`, and compares it with other budgets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.pocket.questions import KINDS, PAGE_KINDS, Kind, picture_of, scene_at
from mmtok_bench.quality.plan import ScoredAnswer, read_answers
from mmtok_bench.quality.rows import ALL_SEEDS
from mmtok_bench.quality.scoring import Interval
from mmtok_bench.results import ResultRow
from mmtok_deploy.auto_budget import Asked
from mmtok_deploy.budget import Budget

__all__ = ["ASKED", "image_features", "lines_of_comparison", "shares_of"]

ASKED: Mapping[Kind, Asked] = {
    "position": "where",
    "existence": "whether",
    "count": "count",
    **dict.fromkeys(("reading", *PAGE_KINDS), "read"),
}
"""Kind of pocket questions -> the budget auto's name for what they ask."""

# Share of the right answers without pruning.
_KEEPS = 0.9
_NUM_RESAMPLES = 2000
_PATCH_PX = 8


def shares_of(rows: Sequence[ResultRow]) -> dict[Asked, Fraction]:
    """Returns for what is asked the smallest share of tokens at which MMTok keeps 90% of the right answers.

    That is 90% of every model's answers to each kind of question that asks for it.

    Args:
        rows: Rows of `mmtok quality`; only rows over all seeds whose budget is a share are used.

    Raises:
        ValueError: For a kind, no share keeps 90% of the right answers with every model.
    """
    shares: dict[Asked, Fraction] = {}
    for kind, asked in ASKED.items():
        kept: dict[Fraction, list[float]] = {}
        for row in rows:
            if (row.case["kind"], row.case["method"], row.case["seed"]) == (kind, "mmtok", ALL_SEEDS):
                budget = MixedBudget.parse(str(row.case["budget"]))
                if isinstance(budget.budget, Budget) and budget.budget.ratio and not budget.encodes_less:
                    kept.setdefault(budget.budget.ratio, []).append(row.metrics["share"])
        enough = [share for share, of_models in kept.items() if min(of_models) >= _KEEPS]
        if not enough:
            raise ValueError(
                f"no share keeps {_KEEPS:.0%} of the right answers about {kind}: add rows of these, or of larger shares"
            )
        shares[asked] = max(shares.get(asked, Fraction(0)), min(enough))
    return shares


def lines_of_comparison(path: Path) -> list[str]:
    """Returns a table of budgets, and a table of correlations of image features with right answers, in Markdown.

    Args:
        path: Answers of `mmtok quality` or `mmtok pocket answers` at the budget auto and at others.

    Raises:
        ValueError: There are no answers at auto.
    """
    answers: dict[str, list[ScoredAnswer]] = {}
    for setting, of_setting in read_answers(path).items():
        answers.setdefault(setting.budget, []).extend(of_setting)
    if "auto" not in answers:
        raise ValueError(f"{path} has no answers of the budget auto: mmtok pocket answers --budgets auto,32 {path}")
    lines = [
        f"| budget | tokens | {' | '.join(KINDS)} | mean | auto ahead by, 95% interval |",
        "|---|---:|" + "---:|" * (len(KINDS) + 2),
    ]
    for budget, given in answers.items():
        by_kind = [statistics.fmean(each.is_right for each in given if each.kind == kind) for kind in KINDS]
        tokens = statistics.fmean(each.num_image_tokens or 0 for each in given)
        cells = " | ".join(f"{100 * value:.1f}" for value in (*by_kind, statistics.fmean(by_kind)))
        ahead = (
            ""
            if budget == "auto"
            else "{0.value:.1f} ({0.low:.1f} to {0.high:.1f})".format(_ahead(answers["auto"], given))
        )
        lines.append(f"| {budget} | {tokens:.0f} | {cells} | {ahead} |")
    places = {(each.seed, each.scene) for each in answers["auto"]}
    features = {place: image_features(picture_of(scene_at(*place))) for place in places}
    names = list(next(iter(features.values())))
    lines += ["", f"| budget | kind | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names)]
    for budget, given in answers.items():
        for kind in KINDS if budget not in ("all", "auto") else ():
            found = _correlations([each for each in given if each.kind == kind], features)
            lines.append(f"| {budget} | {kind} | {' | '.join(f'{value:+.2f}' for value in found)} |")
    return lines


def image_features(picture: Image.Image) -> dict[str, float]:
    """Returns features of a picture of 112 x 112 px that are cheap to compute from its grey levels."""
    grey = np.asarray(picture.convert("L")).astype(np.int64)
    steps = np.concatenate([np.abs(np.diff(grey, axis=axis)).ravel() for axis in (0, 1)])
    num_patches = len(grey) // _PATCH_PX
    patches = grey.reshape(num_patches, _PATCH_PX, num_patches, _PATCH_PX).swapaxes(1, 2).reshape(num_patches**2, -1)
    levels = np.bincount(grey.ravel() // 8, minlength=32) / grey.size
    return {
        "edges": float((steps > 32).mean()),
        "busy patches": float((np.ptp(patches, axis=1) > 48).mean()),
        "distinct patches": float(len(np.unique(patches.mean(axis=1) // 8))),
        "entropy": float(-(levels[levels > 0] * np.log2(levels[levels > 0])).sum()),
        "contrast": float(grey.std()),
    }


def _correlations(
    answers: Sequence[ScoredAnswer], features: Mapping[tuple[int, int], Mapping[str, float]]
) -> NDArray[np.float64]:
    right = np.array([each.is_right for each in answers], dtype=float)
    values = np.array([list(features[each.seed, each.scene].values()) for each in answers])
    if right.std() == 0:
        return np.zeros(values.shape[1])
    return np.array([np.corrcoef(column, right)[0, 1] for column in values.T])


def _ahead(auto: Sequence[ScoredAnswer], other: Sequence[ScoredAnswer]) -> Interval:
    """Returns the difference of the means over the kinds in points, and its interval over resampled scenes."""
    scenes = {place: number for number, place in enumerate(dict.fromkeys((each.seed, each.scene) for each in auto))}
    gained, asked = np.zeros((len(scenes), len(KINDS))), np.zeros((len(scenes), len(KINDS)))
    for each, of_other in zip(auto, other, strict=True):
        assert (each.question, each.scene, each.seed) == (of_other.question, of_other.scene, of_other.seed)
        place = scenes[each.seed, each.scene], KINDS.index(each.kind)
        gained[place] += 100 * (each.is_right - of_other.is_right)
        asked[place] += 1
    draws = np.random.default_rng(0).integers(len(scenes), size=(_NUM_RESAMPLES, len(scenes)))
    means = (gained[draws].sum(1) / asked[draws].sum(1)).mean(1)
    return Interval.of_draws((gained.sum(0) / asked.sum(0)).mean(), means)
