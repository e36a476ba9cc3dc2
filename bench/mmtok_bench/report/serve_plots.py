"""The plots of a served model: TTFT against tokens, throughput against load, where the time goes, memory."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from mmtok_bench.report.blocks import Plot
from mmtok_bench.report.metrics import metric
from mmtok_bench.report.plots import DOWNSAMPLED, PALETTE, UNPRUNED, new_figure, plot_of
from mmtok_bench.report.serve_rows import (
    SHOWN_KEYS,
    have_like_texts,
    image_px,
    label_of,
    load_of,
    pixels_of,
    tokens_read,
    variant_of,
)
from mmtok_bench.results import ResultRow

__all__ = ["exceeds_its_whole", "phases_ms", "plots_of_model"]

_PHASES = ("vision_encoder_ms", "selection_ms", "language_prefill_ms")
_PHASE_COLOURS = {
    "vision encoder": "#3d7fd6",
    "selection": "#c14b7c",
    "language prefill": "#0f8f89",
    "rest of TTFT": "#a3a9b3",
}
_CAPACITIES = ("peak_memory_bytes", "kv_tokens_per_request", "max_requests_at_once")


def plots_of_model(model: str, rows: Sequence[ResultRow]) -> list[Plot]:
    """Returns the plots of one model's rows on one machine; those alone whose metrics were measured.

    Plots show one kind of picture and one state of the prefix cache, and but for the first the largest image: the
    tables have the rest.
    """
    shown = _typical(rows)
    quiet = [row for row in shown if load_of(row) == min(map(load_of, shown))]
    largest = max(map(pixels_of, shown))
    at_largest = [row for row in quiet if pixels_of(row) == largest]
    under_load = [row for row in shown if pixels_of(row) == largest]
    plots = [
        _ttft_against_tokens(model, quiet),
        _throughput_against_load(model, under_load),
        _where_the_time_goes(model, at_largest),
        *(_capacity(model, name, at_largest) for name in _CAPACITIES),
    ]
    return [plot for plot in plots if plot is not None]


def exceeds_its_whole(row: ResultRow) -> bool:
    """Returns whether the parts of the time to the first token, which are means, exceed its median."""
    parts_ms = [row.metrics[name] for name in _PHASES if name in row.metrics]
    return "ttft_p50_ms" in row.metrics and sum(parts_ms) > row.metrics["ttft_p50_ms"]


def phases_ms(row: ResultRow) -> dict[str, float]:
    """Returns what the time to the first token is made of; empty where the parts were not measured or exceed it."""
    parts = {metric(name).label.removesuffix(", ms"): row.metrics[name] for name in _PHASES if name in row.metrics}
    ttft_ms = row.metrics.get("ttft_p50_ms")
    if not parts or ttft_ms is None or exceeds_its_whole(row):
        return {}
    return {**parts, "rest of TTFT": ttft_ms - sum(parts.values())}


def _typical(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Returns photographs without the prefix cache, if there are any; of what else differs, the first row's."""
    for key, value in (("image_kind", "photograph"), ("prefix_cache", "off")):
        rows = [row for row in rows if row.case.get(key) == value] or rows
    for key in rows[0].case:
        if key not in (*SHOWN_KEYS, "text_tokens"):
            rows = [row for row in rows if row.case.get(key) == rows[0].case[key]]
    return [row for row in rows if have_like_texts(row, rows[0])]


def _note(rows: Sequence[ResultRow], *, with_size: bool = True, with_load: bool = True) -> str:
    first = rows[0]
    load = load_of(first)
    kinds = {"photograph": "photographs", "random": "random images"}
    parts = [
        kinds.get(str(first.case.get("image_kind")), "images") + (f" of {image_px(first)}" if with_size else ""),
        f"prefix cache {first.case['prefix_cache']}" if "prefix_cache" in first.case else "",
        f"{load} request{'s' if load > 1 else ''} at a time" if with_load else "",
    ]
    return ", ".join(filter(None, parts))


def _ttft_against_tokens(model: str, rows: Sequence[ResultRow]) -> Plot | None:
    rows = [row for row in rows if "ttft_p50_ms" in row.metrics and tokens_read(row) is not None]
    if not rows:
        return None
    figure = new_figure("image tokens read", "TTFT p50, ms")
    sizes = sorted(
        {image_px(row) for row in rows}, key=lambda px: next(pixels_of(r) for r in rows if image_px(r) == px)
    )
    for idx, px in enumerate(sizes):
        of_size = [row for row in rows if image_px(row) == px]
        suffix = f", {px}" if len(sizes) > 1 else ""
        colour = PALETTE[idx % len(PALETTE)]
        styles = {
            "mmtok": ("MMTok", colour, "solid", "circle"),
            "downsample": ("downsampled", colour if suffix else DOWNSAMPLED, "dot", "square-open"),
            "unpruned": ("unpruned", colour if suffix else UNPRUNED, "solid", "diamond"),
        }
        for variant, (name, line_colour, dash, symbol) in styles.items():
            points = sorted(
                (tokens_read(r) or 0, r.metrics["ttft_p50_ms"]) for r in of_size if variant_of(r) == variant
            )
            _add_line(figure, name + suffix, points, line_colour, dash, symbol)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(rangemode="tozero")
    note = f"{_note(rows, with_size=len(sizes) == 1)}; lower is better"
    formats = {"x": "image_tokens_kept", "y": "ttft_p50_ms"}
    return plot_of(f"{model}: time to first token against image tokens", note, figure, formats)


def _throughput_against_load(model: str, rows: Sequence[ResultRow]) -> Plot | None:
    rows = [row for row in rows if "requests_per_s" in row.metrics]
    loads = sorted(set(map(load_of, rows)))
    if len(loads) < 2:
        return None
    figure = new_figure("requests at a time", "requests/s")
    budgets = list(dict.fromkeys(str(row.case.get("budget")) for row in rows if variant_of(row) != "unpruned"))
    for label in dict.fromkeys(map(label_of, rows)):
        of_label = [row for row in rows if label_of(row) == label]
        variant = variant_of(of_label[0])
        budget = str(of_label[0].case.get("budget"))
        colour = UNPRUNED if variant == "unpruned" else PALETTE[budgets.index(budget) % len(PALETTE)]
        points = sorted((load_of(row), row.metrics["requests_per_s"]) for row in of_label)
        dash, symbol = {"mmtok": ("solid", "circle"), "downsample": ("dot", "square-open")}.get(
            variant, ("solid", "diamond")
        )
        _add_line(figure, label, points, colour, dash, symbol)
    figure.update_xaxes(type="log", tickvals=loads, ticktext=list(map(str, loads)))
    figure.update_yaxes(rangemode="tozero")
    note = f"{_note(rows, with_load=False)}; higher is better"
    return plot_of(
        f"{model}: throughput against concurrency", note, figure, {"x": "concurrency", "y": "requests_per_s"}
    )


def _where_the_time_goes(model: str, rows: Sequence[ResultRow]) -> Plot | None:
    parts = {label_of(row): phases_ms(row) for row in _by_tokens(rows)}
    parts = {label: each for label, each in parts.items() if each}
    if not parts:
        return None
    figure = new_figure("TTFT p50, ms", "")
    for phase, colour in _PHASE_COLOURS.items():
        bars = {label: each[phase] for label, each in parts.items() if phase in each}
        if bars:
            figure.add_bar(
                name=phase,
                x=list(bars.values()),
                y=list(bars),
                orientation="h",
                marker={"color": colour, "line_width": 0},
            )
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=list(parts))
    return plot_of(f"{model}: where the time goes", f"{_note(rows)}; shorter is better", figure, {"x": "ttft_p50_ms"})


def _capacity(model: str, name: str, rows: Sequence[ResultRow]) -> Plot | None:
    bars = {label_of(row): row.metrics[name] for row in _by_tokens(rows) if name in row.metrics}
    if len(bars) < 2:
        return None
    label = metric(name).label
    scale = 2**30 if name.endswith("_bytes") else 1
    figure = new_figure(label, "")
    colours = [UNPRUNED if each == "unpruned" else DOWNSAMPLED if "down" in each else PALETTE[0] for each in bars]
    values = [value / scale for value in bars.values()]
    figure.add_bar(name=label, x=values, y=list(bars), orientation="h", marker={"color": colours}, showlegend=False)
    figure.update_layout(bargap=0.35)
    figure.update_yaxes(autorange="reversed")
    better = "higher" if metric(name).kind == "capacity" else "lower"
    formats = {"x": "latency_ms" if scale > 1 else name}
    return plot_of(f"{model}: {label.removesuffix(', GiB')}", f"{_note(rows)}; {better} is better", figure, formats)


def _by_tokens(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Returns unpruned rows first, then from many tokens to few, MMTok before downsampling."""
    order = ("unpruned", "mmtok", "downsample")
    return sorted(rows, key=lambda row: (order.index(variant_of(row)), -(tokens_read(row) or 0)))


def _add_line(
    figure: go.Figure, name: str, points: Sequence[tuple[float, float]], colour: str, dash: str, symbol: str
) -> None:
    if points:
        xs, ys = zip(*points, strict=True)
        mode = "lines+markers" if len(points) > 1 else "markers"
        marker = {"symbol": symbol, "size": 9, "color": colour}
        figure.add_scatter(name=name, x=xs, y=ys, mode=mode, line={"color": colour, "dash": dash}, marker=marker)
