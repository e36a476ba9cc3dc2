"""Makes rows of scores from answers: a row for each kind of question, over one seed or over all seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from mmtok_bench.pocket.questions import Kind, Negative, Question
from mmtok_bench.quality.plan import ScoredAnswer
from mmtok_bench.quality.scoring import (
    accuracy_interval,
    auroc_interval,
    chance,
    difference_interval,
    majority,
    share_interval,
    yes_no,
)
from mmtok_bench.results import CaseValue, ResultRow, make_row

__all__ = ["ALL_SEEDS", "BENCH", "POCKET", "rows_of"]

BENCH = "quality"
POCKET = "pocket"
ALL_SEEDS = "all"


def rows_of(
    answers: Sequence[ScoredAnswer],
    unpruned: Sequence[ScoredAnswer],
    by_input: Sequence[ScoredAnswer] = (),
    *,
    model: str,
    seed: int | str,
    question_set: str,
    device: torch.device,
    backend: str = "sglang",
) -> list[ResultRow]:
    """Returns a row for each kind, in the order of `Kind`, of one method and budget.

    Args:
        answers: Answers with one method and budget, to the questions of one seed or of all seeds.
        unpruned: Answers to the same questions at budget "all"; if empty, rows have no share.
        by_input: Answers of the same method with keys from the projector's input, if `answers` are with keys from its
            output; without them, rows have no `gain`.
        model: The model's name in rows.
        seed: A seed's number, or `ALL_SEEDS`.
        question_set: `fingerprint` of the questions.
        device: Where the server runs.
        backend: Name of the program that served the model.
    """
    rows = []
    for kind in get_args(Kind):
        chosen = [answer for answer in answers if answer.kind == kind]
        if not chosen:
            continue
        case: dict[str, CaseValue] = {
            "task": POCKET,
            "model": model,
            "kind": kind,
            "method": chosen[0].method,
            "budget": chosen[0].budget,
            "seed": str(seed),
            "question_set": question_set,
        }
        metrics = _metrics(kind, chosen, [answer for answer in unpruned if answer.kind == kind])
        metrics |= _gain(chosen, [answer for answer in by_input if answer.kind == kind])
        rows.append(make_row(BENCH, case, backend, metrics, num_runs=len(chosen), device=device))
    return rows


def _metrics(kind: str, answers: Sequence[ScoredAnswer], unpruned: Sequence[ScoredAnswer]) -> dict[str, float]:
    scenes = {place: number for number, place in enumerate(dict.fromkeys(map(_scene, answers)))}
    right, asked = _counts(answers, scenes)
    metrics: dict[str, float] = {"num_questions": len(answers), "accuracy": right.sum() / asked.sum()}
    if len(scenes) > 1:
        metrics |= accuracy_interval(right, asked).metrics("accuracy")
        right_unpruned, asked_unpruned = _counts(unpruned, scenes)
        share = share_interval(right, right_unpruned) if np.array_equal(asked, asked_unpruned) else None
        if share is not None:
            metrics |= share.metrics("share")
    metrics |= {"chance": chance(kind), "majority": majority([_question(answer) for answer in answers])}
    if kind == "existence":
        metrics |= _pope(answers)
    metrics |= _covered(answers, unpruned)
    kept = [answer.num_image_tokens for answer in answers if answer.num_image_tokens is not None]
    if kept:
        metrics["tokens_kept"] = statistics.fmean(kept)
    metrics["prompt_tokens"] = statistics.fmean(answer.num_prompt_tokens for answer in answers)
    metrics["latency_p50_ms"] = statistics.median(answer.latency_ms for answer in answers)
    metrics["duration_s"] = sum({answer.of: answer.cell_s for answer in answers}.values())
    return {name: float(value) for name, value in metrics.items()}


def _covered(answers: Sequence[ScoredAnswer], unpruned: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Returns the mean coverage and its bound, and how well a low coverage predicts answers that pruning made wrong.

    `num_lost` counts the wrong answers to questions that the unpruned model answers correctly. `lost_auroc` is the
    share of pairs of a lost and a right answer in which the lost one has the smaller coverage.
    """
    told = [answer for answer in answers if answer.coverage is not None]
    if not told:
        return {}
    shares, bounds = (np.array([getattr(each, name) for each in told]) for name in ("coverage", "coverage_bound"))
    metrics = {"coverage": shares.mean(), "coverage_bound": bounds.mean()}
    right = {(*_scene(answer), answer.question) for answer in unpruned if answer.is_right}
    is_judged = np.array([(*_scene(answer), answer.question) in right for answer in told])
    if not is_judged.any():
        return metrics
    is_lost = np.array([not answer.is_right for answer in told])[is_judged]
    numbers = {place: number for number, place in enumerate(dict.fromkeys(map(_scene, told)))}
    scenes = np.array([numbers[_scene(answer)] for answer in told])[is_judged]
    metrics["num_lost"] = is_lost.sum()
    auroc = auroc_interval(-shares[is_judged], is_lost, scenes)
    return metrics if auroc is None else metrics | auroc.metrics("lost_auroc")


def _gain(answers: Sequence[ScoredAnswer], others: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Returns by how much the accuracy is above that of other answers to the same questions, with its interval."""
    scenes = {place: number for number, place in enumerate(dict.fromkeys(map(_scene, answers)))}
    right, asked = _counts(answers, scenes)
    right_of_others, asked_of_others = _counts(others, scenes)
    if len(scenes) < 2 or not np.array_equal(asked, asked_of_others):
        return {}
    return difference_interval(right, right_of_others, asked).metrics("gain")


def _scene(answer: ScoredAnswer) -> tuple[int, int]:
    return answer.seed, answer.scene


def _counts(
    answers: Sequence[ScoredAnswer], scenes: Mapping[tuple[int, int], int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns right answers and questions of each scene."""
    right, asked = np.zeros(len(scenes)), np.zeros(len(scenes))
    for answer in answers:
        place = scenes.get(_scene(answer))
        if place is not None:
            right[place] += answer.is_right
            asked[place] += 1
    return right, asked


def _pope(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Returns POPE's figures of each setting that was asked for, such as pope_random_f1."""
    metrics: dict[str, float] = {}
    chosen = {f"pope_{name}": [each for each in answers if each.setting == name] for name in get_args(Negative)}
    for prefix, of_setting in (chosen | {"pope": answers}).items():
        if of_setting:
            figures = asdict(yes_no([_question(each) for each in of_setting], [each.said for each in of_setting]))
            metrics |= {f"{prefix}_{name}": value for name, value in figures.items() if value is not None}
    return metrics


def _question(answer: ScoredAnswer) -> Question:
    return Question(answer.kind, answer.question, answer.expected)
