"""The rows of a served model as a table, with the ratios that a reader looks for."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mmtok_bench.results import ResultRow

__all__ = ["TABLE_WIDTH", "serve_tables"]

TABLE_WIDTH = 120
"""Characters that a table needs to be read well."""

_GROUP = ("model", "weights", "prefix_cache", "image_kind", "image_px", "concurrency")
_COLUMNS = (
    "server",
    "image\ntokens",
    "TTFT ms\np50",
    "\np90",
    "\nx off",
    "x smaller\nimage",
    "ITL ms\np50",
    "requests\na second",
    "\nx off",
    "encoder\nms",
    "select\nms",
    "prefill\nms",
    "fit at\nonce",
)
_STAGES = ("vision_encoder_ms", "selection_ms", "language_prefill_ms")


def serve_tables(rows: Sequence[ResultRow]) -> list[Table]:
    """Returns a table for each model, prefix cache and workload, one line a server or smaller image.

    "x off" is how many times as good a figure is as that of the server without the plugin, "x smaller image" as that
    of the image shrunk to about as many tokens.
    """
    groups: dict[tuple[object, ...], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(tuple(row.case[name] for name in _GROUP), []).append(row)
    return [_table(group) for group in groups.values()]


def _table(rows: Sequence[ResultRow]) -> Table:
    first = rows[0]
    title = (
        "{model} ({weights} weights), prefix cache {prefix_cache}: {image_kind} {image_px}, {concurrency} at once, "
        "{output_tokens} tokens out"
    ).format(**first.case)
    versions = ", ".join(f"{name} {first.versions[name]}" for name in ("sglang", "torch") if name in first.versions)
    table = Table(
        title=f"{title}\n{first.device}, {versions}, {first.time[:10]}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    by_server = {(str(row.case["method"]), str(row.case["budget"])): row for row in rows}
    off = by_server.get(("none", "off"))
    # Measured forwards and backwards, shown in one order: unpruned, pruned, smaller images.
    methods = ("none", "mmtok", "downsample")
    for method, budget in sorted(
        by_server, key=lambda key: (methods.index(key[0]), key[1] != "off", -_kept(by_server[key]))
    ):
        row = by_server[method, budget]
        smaller = by_server.get(("downsample", budget)) if method == "mmtok" else None
        table.add_row(f"smaller, as {budget}" if method == "downsample" else budget, *_cells(row, off, smaller))
    return table


def _kept(row: ResultRow) -> float:
    return row.metrics["image_tokens_kept"]


def _cells(row: ResultRow, off: ResultRow | None, smaller: ResultRow | None) -> list[str]:
    metrics = row.metrics
    return [
        f"{_kept(row):.0f}",
        f"{metrics['ttft_p50_ms']:.0f}",
        f"{metrics['ttft_p90_ms']:.0f}",
        _ratio(off, row, "ttft_p50_ms"),
        _ratio(smaller, row, "ttft_p50_ms"),
        f"{metrics['itl_p50_ms']:.1f}" if "itl_p50_ms" in metrics else "",
        f"{metrics['requests_per_s']:.2f}",
        _ratio(row, off, "requests_per_s"),
        *(f"{metrics[name]:.0f}" if name in metrics else "" for name in _STAGES),
        f"{metrics['max_requests_at_once']:.0f}",
    ]


def _ratio(above: ResultRow | None, below: ResultRow | None, name: str) -> str:
    if above is None or below is None or above is below:
        return ""
    return f"{above.metrics[name] / below.metrics[name]:.2f}"
