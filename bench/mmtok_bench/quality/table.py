"""Scores as tables, a kind of question each: methods down, budgets across."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import rich.table

from mmtok_bench.quality.rows import ALL_SEEDS, POCKET, UNPRUNED
from mmtok_bench.report.blocks import Table
from mmtok_bench.results import CaseValue, ResultRow

__all__ = ["by_model", "left_out", "pooled_rows", "printable", "score_tables"]


def pooled_rows(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Returns the pocket rows to show: for each model and kind those over one set of questions.

    All seeds together go before a single one, then the most questions, then the newest.
    """
    shown = _shown_sets(rows)
    return [row for row in _pocket(rows) if _set_of(row) == shown[_place(row)]]


def left_out(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Returns the pocket rows over other questions, but for single seeds of what is shown for all of them."""
    shown = _shown_sets(rows)
    settings = {(_place(row), row.case["method"], row.case["budget"]) for row in pooled_rows(rows)}
    return [
        row
        for row in _pocket(rows)
        if _set_of(row) != shown[_place(row)]
        and (row.case["seed"] == ALL_SEEDS or (_place(row), row.case["method"], row.case["budget"]) not in settings)
    ]


def by_model(rows: Sequence[ResultRow]) -> dict[str, list[ResultRow]]:
    """Returns the pooled pocket rows of each model."""
    models: dict[str, list[ResultRow]] = {}
    for row in pooled_rows(rows):
        models.setdefault(str(row.case["model"]), []).append(row)
    return models


def score_tables(rows: Sequence[ResultRow]) -> list[Table]:
    """Returns for each model a table of accuracies for each kind, and one of POPE's F1 scores by setting."""
    tables = []
    for model, chosen in by_model(rows).items():
        for kind in dict.fromkeys(str(row.case["kind"]) for row in chosen):
            of_kind = [row for row in chosen if row.case["kind"] == kind]
            tables.append(_grid(f"{model}: {_accuracy_title(kind, of_kind)}", of_kind, _accuracy_cell))
        existence = [row for row in chosen if row.case["kind"] == "existence"]
        if existence:
            title = f"{model}: existence, POPE's F1, %: random / popular / adversarial negatives"
            tables.append(_grid(title, existence, _pope_cell))
    return tables


def printable(table: Table) -> rich.table.Table:
    """Returns the table for a terminal."""
    shown = rich.table.Table(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if number < table.num_texts else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def _pocket(rows: Sequence[ResultRow]) -> list[ResultRow]:
    return [row for row in rows if row.case["task"] == POCKET]


def _place(row: ResultRow) -> tuple[CaseValue, CaseValue]:
    return row.case["model"], row.case["kind"]


def _set_of(row: ResultRow) -> tuple[bool, CaseValue]:
    return row.case["seed"] == ALL_SEEDS, row.case["question_set"]


def _shown_sets(rows: Sequence[ResultRow]) -> dict[tuple[CaseValue, CaseValue], tuple[bool, CaseValue]]:
    best: dict[tuple[CaseValue, CaseValue], ResultRow] = {}
    for row in _pocket(rows):
        place = _place(row)
        best[place] = max(best.get(place, row), row, key=_rank)
    return {place: _set_of(row) for place, row in best.items()}


def _rank(row: ResultRow) -> tuple[bool, float, str]:
    return row.case["seed"] == ALL_SEEDS, row.metrics["num_questions"], row.time


def _accuracy_title(kind: str, rows: Sequence[ResultRow]) -> str:
    metrics = rows[0].metrics
    return (
        f"{kind}: accuracy, % (95% interval), {metrics['num_questions']:.0f} questions; chance "
        f"{100 * metrics['chance']:.0f}, always the commonest answer {100 * metrics['majority']:.0f}"
    )


def _grid(title: str, rows: Sequence[ResultRow], cell_of: Callable[[ResultRow], str]) -> Table:
    scores = {(str(row.case["method"]), str(row.case["budget"])): row for row in rows}
    budgets = list(dict.fromkeys(budget for _, budget in scores))
    methods = list(dict.fromkeys(method for method, _ in scores))
    headings = [_heading(budget, [row for (_, other), row in scores.items() if other == budget]) for budget in budgets]
    lines = tuple(
        (method, *(cell_of(scores[method, budget]) if (method, budget) in scores else "" for budget in budgets))
        for method in methods
    )
    return Table(title, ("method", *headings), lines)


def _heading(budget: str, rows: Sequence[ResultRow]) -> str:
    kept = {round(row.metrics["tokens_kept"]) for row in rows if "tokens_kept" in row.metrics}
    # A smaller image may have fewer tokens than the budget allows.
    return f"{budget} ({max(kept)} tokens)" if kept and budget != str(max(kept)) else f"{budget} tokens"


def _accuracy_cell(row: ResultRow) -> str:
    metrics = row.metrics
    shown = f"{100 * metrics['accuracy']:.1f}"
    if "accuracy_low" in metrics:
        shown += f" ({100 * metrics['accuracy_low']:.1f} to {100 * metrics['accuracy_high']:.1f})"
    if row.case["method"] != UNPRUNED and "share" in metrics:
        shown += f", {100 * metrics['share']:.0f}% of unpruned"
        shown += f" ({100 * metrics['share_low']:.0f} to {100 * metrics['share_high']:.0f})"
    return shown


def _pope_cell(row: ResultRow) -> str:
    names = ("random", "popular", "adversarial")
    values = [row.metrics.get(f"pope_{name}_f1") for name in names]
    return " / ".join("none" if value is None else f"{100 * value:.0f}" for value in values)
