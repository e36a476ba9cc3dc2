"""Scores on public benchmarks as a table, with the paper's figures beside them."""

from __future__ import annotations

from collections.abc import Sequence

from mmtok_bench.quality.benchmarks import BENCHMARKS
from mmtok_bench.quality.published import PUBLISHED
from mmtok_bench.quality.rows import UNPRUNED
from mmtok_bench.report.blocks import Table, without_empty_columns
from mmtok_bench.results import ResultRow

__all__ = ["public_table"]

_TITLE = "Public benchmarks, by lmms-eval: scores in %, MME's in points, those of other tasks as lmms-eval gives them"


def public_table(rows: Sequence[ResultRow]) -> Table:
    """Returns a line for each benchmark, method and budget; lines of the paper stand below those they belong to."""
    lines = []
    for task in dict.fromkeys(str(row.case["task"]) for row in rows):
        chosen = [row for row in rows if row.case["task"] == task]
        for row in chosen:
            share = f"{100 * row.metrics['share']:.1f}" if "share" in row.metrics else ""
            who = str(row.case["model"]) or "measured"
            cells = (f"{_score(row):.4g}", share, f"{row.metrics['num_questions']:.0f}")
            lines.append((task, who, str(row.case["method"]), str(row.case["budget"]), *cells))
        budgets = {row.case["budget"] for row in chosen if row.case["method"] in ("mmtok", UNPRUNED)}
        for quoted in PUBLISHED:
            if (quoted.family, quoted.benchmark) == (chosen[0].case["preset"], task) and quoted.budget in budgets:
                score = "" if quoted.score is None else f"{quoted.score:.4g}"
                method = UNPRUNED if quoted.budget == "all" else "mmtok"
                share = "" if quoted.budget == "all" else f"{100 * quoted.share:.1f}"
                lines.append((task, f"{quoted.model}, the paper", method, quoted.budget, score, share, ""))
    columns = ("benchmark", "model", "method", "budget", "score", "% of unpruned", "questions")
    return without_empty_columns(Table(_TITLE, columns, tuple(lines), num_texts=4))


def _score(row: ResultRow) -> float:
    """Returns the row's score, which is lmms-eval's, in the unit that the paper has it in."""
    benchmark = BENCHMARKS.get(str(row.case["task"]))
    return row.metrics["score"] * (benchmark.factor if benchmark else 1)
