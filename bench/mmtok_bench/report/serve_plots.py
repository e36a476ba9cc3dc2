"""The plots of a served model: TTFT against tokens, throughput against load, where the time goes, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mmtok_bench.report.frame import grouped
from mmtok_bench.report.metrics import metric
from mmtok_bench.report.serve import SHOWN_KEYS, VARIANTS, Line, bound_by, have_like_texts, phases_ms
from mmtok_bench.report.tables import DOWNSAMPLED, PALETTE, UNPRUNED, Plot, new_figure, plot_of

__all__ = ["plots_of_model"]

_PHASE_COLOURS = {
    "image decoding": "#c98a1b",
    "image preprocessing": "#e0b04f",
    "image hash": "#7b5fc0",
    "transport": "#a893da",
    "vision encoder": "#3d7fd6",
    "selection": "#c14b7c",
    "language prefill": "#0f8f89",
    "rest of TTFT": "#a3a9b3",
}
_CAPACITIES = ("peak_memory_bytes", "kv_tokens_per_request", "max_requests_at_once")
# Dash, symbol.
_STYLES = {
    "mmtok": ("solid", "circle"),
    "other": ("dash", "circle-open"),
    "downsample": ("dot", "square-open"),
    "unpruned": ("solid", "diamond"),
}


def plots_of_model(model: str, lines: Sequence[Line]) -> Iterator[Plot]:
    """Yields the plots of one model's rows on one machine whose metrics were measured.

    Plots show one kind of image and one state of the prefix cache; all but the first show only the largest image. The
    tables have the rest.
    """
    shown = _typical(lines)
    largest = max(line["pixels"] for line in shown)
    quiet = [line for line in shown if line["load"] == min(each["load"] for each in shown)]
    at_largest = sorted(
        (line for line in quiet if line["pixels"] == largest),
        key=lambda line: (VARIANTS.index(line["variant"]), -(line["tokens"] or 0)),
    )
    plots = [
        _ttft_against_tokens(model, quiet),
        _throughput_against_load(model, [line for line in shown if line["pixels"] == largest]),
        _where_the_time_goes(model, at_largest),
        *(_capacity(model, name, at_largest) for name in _CAPACITIES),
    ]
    yield from (plot for plot in plots if plot is not None)


def _typical(lines: Sequence[Line]) -> list[Line]:
    """Returns rows of photographs without prefix cache, if there are any, whose other keys equal the first row's."""
    for key, value in (("image_kind", "photograph"), ("prefix_cache", "off")):
        lines = [line for line in lines if line["case"].get(key) == value] or lines
    for key, value in lines[0]["case"].items():
        if key not in (*SHOWN_KEYS, "text_tokens"):
            lines = [line for line in lines if line["case"].get(key) == value]
    return [line for line in lines if have_like_texts(line, lines[0])]


def _note(lines: Sequence[Line], *, with_size: bool = True, with_load: bool = True) -> str:
    case, load = lines[0]["case"], lines[0]["load"]
    kinds = {"photograph": "photographs", "document": "pages of text", "random": "random images"}
    parts = [
        kinds.get(str(case.get("image_kind")), "images") + (f" of {lines[0]['px']}" if with_size else ""),
        f"prefix cache {case['prefix_cache']}" if "prefix_cache" in case else "",
        f"{load} request{'s' if load > 1 else ''} at a time" if with_load else "",
    ]
    return ", ".join(filter(None, parts))


def _ttft_against_tokens(model: str, lines: Sequence[Line]) -> Plot | None:
    lines = [line for line in lines if "ttft_p50_ms" in line["metrics"] and line["tokens"] is not None]
    if not lines:
        return None
    figure = new_figure("image tokens read", "TTFT p50, ms")
    sizes = dict(sorted({line["px"]: line["pixels"] for line in lines}.items(), key=lambda item: item[1]))
    for idx, px in enumerate(sizes):
        suffix = f", {px}" if len(sizes) > 1 else ""
        colour = PALETTE[idx % len(PALETTE)]
        alone = {"downsample": DOWNSAMPLED, "unpruned": UNPRUNED}
        of_size = [line for variant in _STYLES for line in lines if (line["px"], line["variant"]) == (px, variant)]
        for number, (series, chosen) in enumerate(grouped(of_size, "series").items()):
            variant = chosen[0]["variant"]
            points = sorted((line["tokens"], line["metrics"]["ttft_p50_ms"]) for line in chosen)
            own = colour if suffix else alone.get(variant, PALETTE[number % len(PALETTE)])
            _add_line(figure, series + suffix, points, own, *_STYLES[variant])
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(rangemode="tozero")
    note = f"{_note(lines, with_size=len(sizes) == 1)}; lower is better"
    formats = {"x": "image_tokens_kept", "y": "ttft_p50_ms"}
    return plot_of(f"{model}: time to first token against image tokens", note, figure, formats)


def _throughput_against_load(model: str, lines: Sequence[Line]) -> Plot | None:
    lines = [line for line in lines if "requests_per_s" in line["metrics"]]
    loads = sorted({line["load"] for line in lines})
    if len(loads) < 2:
        return None
    figure = new_figure("requests at a time", "requests/s")
    budgets = list(dict.fromkeys(line["budget"] for line in lines if line["variant"] != "unpruned"))
    for label, chosen in grouped(lines, "label").items():
        variant, budget = chosen[0]["variant"], chosen[0]["budget"]
        colour = UNPRUNED if variant == "unpruned" else PALETTE[budgets.index(budget) % len(PALETTE)]
        points = sorted((line["load"], line["metrics"]["requests_per_s"]) for line in chosen)
        _add_line(figure, label, points, colour, *_STYLES[variant])
    figure.update_xaxes(type="log", tickvals=loads, ticktext=list(map(str, loads)))
    figure.update_yaxes(rangemode="tozero")
    note = f"{_note(lines, with_load=False)}; higher is better"
    formats = {"x": "concurrency", "y": "requests_per_s"}
    return plot_of(f"{model}: throughput against concurrency", note, figure, formats)


def _where_the_time_goes(model: str, lines: Sequence[Line]) -> Plot | None:
    parts = {line["label"]: found for line in lines if (found := phases_ms(line))}
    if not parts:
        return None
    figure = new_figure("TTFT p50, ms", "")
    for phase, colour in _PHASE_COLOURS.items():
        bars = {label: each[phase] for label, each in parts.items() if phase in each}
        if bars:
            marker = {"color": colour, "line_width": 0}
            figure.add_bar(name=phase, x=list(bars.values()), y=list(bars), orientation="h", marker=marker)
    # Below the bars, whose names have two lines each, is the legend.
    height = max(figure.layout.height, 240 + 44 * len(parts))
    legend = {"traceorder": "normal", "y": figure.layout.legend.y * figure.layout.height / height}
    figure.update_layout(barmode="stack", bargap=0.35, height=height, legend=legend)
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=list(parts))
    named = [f"{line['label']}<br><i>{bound_by(line)}</i>" for line in lines if line["label"] in parts]
    figure.update_yaxes(tickvals=list(parts), ticktext=list(dict.fromkeys(named)))
    note = f"{_note(lines)}; shorter is better. Under each name: the stage that takes most of the time, which bounds it"
    return plot_of(f"{model}: where the time goes", note, figure, {"x": "ttft_p50_ms"})


def _capacity(model: str, name: str, lines: Sequence[Line]) -> Plot | None:
    bars = {line["label"]: line["metrics"][name] for line in lines if name in line["metrics"]}
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
    return plot_of(f"{model}: {label.removesuffix(', GiB')}", f"{_note(lines)}; {better} is better", figure, formats)


def _add_line(
    figure: Any, name: str, points: Sequence[tuple[float, float]], colour: str, dash: str, symbol: str
) -> None:
    if points:
        xs, ys = zip(*points, strict=True)
        mode = "lines+markers" if len(points) > 1 else "markers"
        marker = {"symbol": symbol, "size": 9, "color": colour}
        figure.add_scatter(name=name, x=xs, y=ys, mode=mode, line={"color": colour, "dash": dash}, marker=marker)
