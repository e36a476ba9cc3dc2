"""Bars: values that are measured from rows, and the bounds that they have to reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmtok_bench.results import CaseValue, ResultRow

__all__ = ["Bar", "Find", "Measure", "Rows", "gain", "load", "measured", "of_row", "ratio", "row_of", "served"]

Rows = Sequence[ResultRow]
Find = Callable[[Rows], ResultRow | None]
"""Returns one of a part's rows; None if there is no such row."""
Measure = Callable[[Rows], float | None]
"""Returns a value from a part's rows; None if a row is missing."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A value that a part has to reach.

    Args:
        text: What is measured.
        bound: "at least" or "at most", a number and a unit: "at least 1.25 x".
        measure: Measures the value.
        is_choice: Whether the bar only says which of two settings is better; it then never fails.
    """

    text: str
    bound: str
    measure: Measure
    is_choice: bool = False

    @property
    def shown_bound(self) -> str:
        """The bound as the table shows it."""
        return f"the better setting: {self.bound}" if self.is_choice else self.bound

    def judge(self, rows: Rows) -> tuple[str, bool | None]:
        """Returns the measured value as text, and whether it reaches the bound (None if it was not measured)."""
        value = self.measure(rows)
        if value is None or math.isnan(value):
            return "not measured", None
        _, side, number, *unit = self.bound.split()
        is_reached = value <= float(number) if side == "most" else value >= float(number)
        return " ".join([f"{value:.3g}", *unit]), is_reached


def served(
    rows: Rows, budget: str, concurrency: int, *, questions: int = 1, arguments: str = "", kind: str = "photograph"
) -> ResultRow | None:
    """Returns the newest row of the largest images; for several questions, of a server with prefix cache."""
    found = [
        row
        for row in rows
        if row.bench == "serve"
        and row.case["budget"] == budget
        and row.case["concurrency"] == concurrency
        and row.case["image_kind"] == kind
        and row.case["prefix_cache"] == ("off" if questions == 1 else "on")
        and row.case.get("questions_per_image", 1) == questions
        and row.case.get("server_arguments", "") == arguments
        and row.case["method"] == ("none" if budget in ("off", "all") else "mmtok")
    ]
    return max(found, key=lambda row: (row.metrics["image_tokens_in"], row.time), default=None)


def measured(value: Callable[..., float | None], *finds: Find) -> Measure:
    """Returns a measure that computes a value from the metrics of the rows that `finds` return."""

    def measure(rows: Rows) -> float | None:
        found = [find(rows) for find in finds]
        return value(*(row.metrics for row in found if row is not None)) if None not in found else None

    return measure


def load(budget: str, concurrency: int, **more: Any) -> Find:
    """Returns what finds the newest row of a server with a budget under a load, as `served` does."""
    return partial(served, budget=budget, concurrency=concurrency, **more)


def ratio(metric: str, *finds: Find) -> Measure:
    """Returns a measure of how many times as good a metric of the first row is as that of the second."""
    is_time = metric.endswith("_ms")
    return measured(lambda ours, theirs: (ours[metric] / theirs[metric]) ** (-1 if is_time else 1), *finds)


def gain(metric: str, budget: str, concurrency: int, **more: Any) -> Measure:
    """Returns a measure of how many times as good a budget is as no budget; with several rounds, their median."""
    find, of_rounds = load(budget, concurrency, **more), f"{metric.removesuffix('_ms')}_gain"
    of_one_round = ratio(metric, find, load("off", concurrency, **more))

    def measure(rows: Rows) -> float | None:
        row = find(rows)
        return of_one_round(rows) if row is None or of_rounds not in row.metrics else row.metrics[of_rounds]

    return measure


def of_row(bench: str, value: Callable[[Mapping[str, float]], float | None], **case: CaseValue) -> Measure:
    """Returns a measure of the newest row of a bench whose case has these values."""
    return measured(value, partial(row_of, bench=bench, case=case))


def row_of(rows: Rows, bench: str, case: Mapping[str, CaseValue]) -> ResultRow | None:
    """Returns the newest row of a bench whose case has these values; None if there is none."""
    return next((row for row in reversed(rows) if row.bench == bench and case.items() <= row.case.items()), None)
