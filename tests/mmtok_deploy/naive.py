"""The selection once more: plain loops in double precision, straight from its definition."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from mmtok_deploy.config import SelectionConfig

__all__ = ["NaiveAnswer", "naive_greedy", "naive_matrix", "naive_value"]

Matrix = list[list[float]]


class NaiveAnswer(NamedTuple):
    """The columns as picked, and the smallest lead of a winner over its runner-up, relative to f of all columns.

    Winners without gain are ties by intent (every remaining column is covered) and do not count into the lead.
    """

    order: list[int]
    lead: float


def naive_matrix(vision: Tensor, keys: Tensor, text: Tensor, config: SelectionConfig) -> Matrix:
    """Returns C, row by row."""
    x, c, t = _unit_rows(vision), _unit_rows(keys), _unit_rows(text)
    text_rows = [[p / len(t) for p in _softmax([_dot(word, v) / config.tv_temp for v in x])] for word in t]
    image_rows = [[q / len(c) for q in _softmax([_dot(key, v) / config.vv_temp for v in c])] for key in c]
    if config.coverage == "text":
        return text_rows
    if config.coverage == "vision" or not text_rows:
        return image_rows
    return text_rows + [[config.alpha * q for q in row] for row in image_rows]


def naive_value(matrix: Matrix, columns: Sequence[int]) -> float:
    """Returns f(S), the sum over the rows of the largest entry in S."""
    return sum(max((row[column] for column in columns), default=0.0) for row in matrix)


def naive_greedy(matrix: Matrix, num_picks: int, excluded: Collection[int] = ()) -> NaiveAnswer:
    """Returns the greedy answer: at each step every column that may be picked is tried."""
    num_columns = len(matrix[0])
    total = naive_value(matrix, range(num_columns))
    order: list[int] = []
    lead = math.inf
    while len(order) < num_picks:
        pickable = [column for column in range(num_columns) if column not in order and column not in excluded]
        if not pickable:
            break
        covered = naive_value(matrix, order)
        gains = {column: naive_value(matrix, [*order, column]) - covered for column in pickable}
        best = max(pickable, key=lambda column: (gains[column], -column))
        if gains[best] > 0 and len(pickable) > 1:
            runner_up = max(gain for column, gain in gains.items() if column != best)
            lead = min(lead, (gains[best] - runner_up) / total)
        order.append(best)
    return NaiveAnswer(order, lead)


def _unit_rows(rows: Tensor) -> Matrix:
    return [[v / max(math.sqrt(_dot(row, row)), 1e-8) for v in row] for row in rows.double().tolist()]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(u * v for u, v in zip(a, b, strict=True))


def _softmax(logits: Sequence[float]) -> list[float]:
    exponentials = [math.exp(logit - max(logits)) for logit in logits]
    return [e / sum(exponentials) for e in exponentials]
