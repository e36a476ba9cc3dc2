"""Scores on public benchmarks as a table, with the paper's figures beside them."""

from __future__ import annotations

from collections.abc import Sequence

from mmtok_deploy.bench.quality.benchmarks import PUBLISHED
from mmtok_deploy.bench.report.blocks import Table, without_empty_columns
from mmtok_deploy.bench.results import ResultRow

__all__ = ["public_table"]


def public_table(rows: Sequence[ResultRow]) -> Table:
    """Returns a line for each benchmark, method and budget; lines of the paper stand below those they belong to."""
    lines = []
    for task in dict.fromkeys(str(row.case["task"]) for row in rows):
        chosen = [row for row in rows if row.case["task"] == task]
        for row in chosen:
            share = f"{100 * row.metrics['share']:.1f}" if "share" in row.metrics else ""
            who = str(row.case["model"]) or "measured"
            cells = (f"{row.metrics['score']:.4g}", share, f"{row.metrics['num_questions']:.0f}")
            lines.append((task, who, str(row.case["method"]), str(row.case["budget"]), *cells))
        measured = {(row.case["method"], row.case["budget"]) for row in chosen}
        for quoted in PUBLISHED:
            budget = "" if quoted.tokens is None else str(quoted.tokens)
            is_beside = quoted.tokens is None or (quoted.method, budget) in measured
            if is_beside and (quoted.family, quoted.benchmark) == (chosen[0].case["preset"], task):
                share = f"about {100 * quoted.share:.0f}" if quoted.is_read_off else f"{100 * quoted.share:.1f}"
                lines.append((task, f"{quoted.model}, the paper", quoted.method, budget, "", share, ""))
    columns = ("benchmark", "model", "method", "budget", "score", "% of unpruned", "questions")
    return without_empty_columns(Table("Public benchmarks, by lmms-eval", columns, tuple(lines), num_texts=4))
