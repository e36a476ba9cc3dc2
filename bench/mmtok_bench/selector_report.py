"""The selector's latencies as a table like the paper's Table 13."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mmtok_bench.results import ResultRow, latencies_ms

__all__ = ["BACKEND_COLOURS", "PUBLISHED_MS", "latency_table"]

PUBLISHED_MS = {
    (2880, 160): 6.417,
    (2880, 80): 3.733,
    (1728, 96): 3.862,
    (1728, 48): 2.247,
    (576, 32): 1.267,
    (576, 16): 0.774,
}
"""Tokens and picks -> mean ms of 100 runs on an RTX A6000; source: MMTok, arXiv 2508.18264, Table 13."""

BACKEND_COLOURS = {
    "dense": "#8a9099",
    "torchscript": "#b9853b",
    "reference": "#5d6470",
    "lazy": "#0b7a75",
    "triton": "#76b900",
}
"""The same in every plot."""

_BASELINE = "dense"


def latency_table(rows: Sequence[ResultRow]) -> Table:
    """Returns one line a case: the paper's figure, and each backend's median, spread and speed-up over the loop."""
    backends = list(dict.fromkeys(row.backend for row in rows))
    first = rows[0]
    machine = f"{first.device}, {first.num_threads} threads, PyTorch {first.versions['torch']}, {first.time[:10]}"
    table = Table(title=f"Selection, similarity included, ms: p50 (p20 to p80)\n{machine}", title_justify="left")
    table.add_column("tokens -> kept")
    table.add_column("batch", justify="right")
    table.add_column("A6000,\nquoted", justify="right", style="dim")
    for backend in backends:
        table.add_column(backend, justify="right")
    cases: dict[tuple[int, int, int], dict[str, ResultRow]] = {}
    for row in rows:
        case = int(row.case["num_tokens"]), int(row.case["num_picks"]), int(row.case["batch"])
        cases.setdefault(case, {})[row.backend] = row
    for (num_tokens, num_picks, batch), by_backend in cases.items():
        published = PUBLISHED_MS.get((num_tokens, num_picks)) if batch == 1 else None
        cells = [_cell(by_backend.get(backend), by_backend.get(_BASELINE)) for backend in backends]
        quoted = "" if published is None else f"{published:.2f}"
        table.add_row(f"{num_tokens} -> {num_picks}", f"{batch}", quoted, *cells)
    table.caption = "A6000: the paper's Table 13, one image, another machine. x: times as fast as the published loop."
    return table


def _cell(row: ResultRow | None, baseline: ResultRow | None) -> str:
    if row is None:
        return ""
    p20_ms, p50_ms, p80_ms = latencies_ms(row)
    cell = f"{_ms(p50_ms)} ({_ms(p20_ms)} to {_ms(p80_ms)})"
    if baseline is None or row is baseline:
        return cell
    return f"{cell}\n[bold]{latencies_ms(baseline)[1] / p50_ms:.1f}x[/bold]"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
