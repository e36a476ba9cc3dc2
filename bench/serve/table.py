"""The rows of a served model as a table, with the ratios that a reader looks for."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mmtok_deploy.bench.results import ResultRow

__all__ = ["serve_tables"]

_GROUP = ("model", "weights", "prefix_cache")
_WORKLOAD = ("image_kind", "image_px", "concurrency")
_COLUMNS = (
    "image",
    "at once",
    "server",
    "tokens",
    "TTFT p50\n(p90), ms",
    "x off",
    "x smaller\nimage",
    "ITL p50\nms",
    "requests/s",
    "x off",
    "encoder,\nselection,\nprefill, ms",
    "fit at\nonce",
)


def serve_tables(rows: Sequence[ResultRow]) -> list[Table]:
    """Returns a table for each model and prefix cache, one line a row, in the order measured by workload."""
    groups: dict[tuple[object, ...], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(tuple(row.case[name] for name in _GROUP), []).append(row)
    return [_table(group) for group in groups.values()]


def _table(rows: Sequence[ResultRow]) -> Table:
    first = rows[0]
    title = "{model} ({weights} weights), prefix cache {prefix_cache}".format(**first.case)
    versions = ", ".join(f"{name} {first.versions[name]}" for name in ("sglang", "torch") if name in first.versions)
    machine = f"{first.device}, {versions}, {first.time[:10]}, {first.case['output_tokens']} output tokens"
    table = Table(title=f"{title}\n{machine}", title_justify="left")
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number in (0, 2) else "right")
    workloads: dict[tuple[object, ...], list[ResultRow]] = {}
    for row in rows:
        workloads.setdefault(tuple(row.case[name] for name in _WORKLOAD), []).append(row)
    for (kind, size_px, concurrency), group in workloads.items():
        by_server = {(row.case["method"], row.case["budget"]): row for row in group}
        off = by_server.get(("none", "off"))
        for number, ((method, budget), row) in enumerate(by_server.items()):
            smaller = by_server.get(("downsample", budget)) if method == "mmtok" else None
            heading = (f"{size_px} {kind}", f"{concurrency}") if number == 0 else ("", "")
            table.add_row(*heading, *_cells(row, off, smaller), end_section=number == len(by_server) - 1)
    table.caption = (
        "x: times as good as the server without the plugin (off), or as the image sent so small that it has about as "
        "many tokens."
    )
    return table


def _cells(row: ResultRow, off: ResultRow | None, smaller: ResultRow | None) -> list[str]:
    metrics = row.metrics
    label = {"mmtok": f"{row.case['budget']}", "downsample": f"smaller image ({row.case['budget']})"}
    stages = ("vision_encoder_ms", "selection_ms", "language_prefill_ms")
    return [
        label.get(str(row.case["method"]), f"{row.case['budget']}"),
        f"{metrics['image_tokens_in']:.0f} -> {metrics['image_tokens_kept']:.0f}",
        f"{metrics['ttft_p50_ms']:.0f} ({metrics['ttft_p90_ms']:.0f})",
        _ratio(off, row, "ttft_p50_ms"),
        _ratio(smaller, row, "ttft_p50_ms"),
        f"{metrics['itl_p50_ms']:.1f}" if "itl_p50_ms" in metrics else "",
        f"{metrics['requests_per_s']:.2f}",
        _ratio(row, off, "requests_per_s"),
        " ".join(f"{metrics[name]:.0f}" if name in metrics else "-" for name in stages),
        f"{metrics['max_requests_at_once']:.0f}",
    ]


def _ratio(above: ResultRow | None, below: ResultRow | None, name: str) -> str:
    if above is None or below is None or above is below:
        return ""
    return f"{above.metrics[name] / below.metrics[name]:.2f}"
