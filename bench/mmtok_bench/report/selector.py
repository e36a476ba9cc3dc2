"""The section of the selector: its latency by backend, tokens and picks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from mmtok_bench.report.frame import grouped, newest, records
from mmtok_bench.report.metrics import compare, format_value
from mmtok_bench.report.tables import PALETTE, Part, Plot, Table, new_figure, plot_of
from mmtok_bench.results import LATENCIES

__all__ = ["FLOORS", "PUBLISHED_MS", "selector_part"]

PUBLISHED_MS = {
    (2880, 160): 6.417,
    (2880, 80): 3.733,
    (1728, 96): 3.862,
    (1728, 48): 2.247,
    (576, 32): 1.267,
    (576, 16): 0.774,
}
"""Tokens and picks -> mean ms of 100 runs on an RTX A6000; source: MMTok, arXiv 2508.18264, Table 13."""

FLOORS = {
    "bandwidth_floor_ms": "bandwidth floor: features once, C twice",
    "chain_floor_ms": "chain floor: argmax and maximum, K times",
}
"""Metric -> name of a lower bound of an exact greedy selection's time."""

_BASELINE = "dense"
_P20, _P50, _P80 = LATENCIES
_COLOURS = {
    "dense": "#8a9099",
    "torchscript": "#b9853b",
    "authors": "#8c5a9e",
    "reference": "#5d6470",
    "lazy": "#0b7a75",
    "triton": "#76b900",
}

Line = dict[str, Any]


def selector_part(rows: pd.DataFrame) -> Part:
    """Returns the section of one machine's rows, the newest of each case."""
    baselines = {(line["run"], *_case(line)): line[_P50] for line in records(rows) if line["backend"] == _BASELINE}
    lines = records(newest(rows))
    for line in lines:
        baseline = None if line["backend"] == _BASELINE else baselines.get((line["run"], *_case(line)))
        line["ratio"] = compare(_P50, line[_P50], baseline)
    smallest = [line for line in lines if line["batch"] == min(each["batch"] for each in lines)]
    sentences = ["Times include the similarity. Each backend's picks were checked before it was timed."]
    if not baselines:
        sentences.append("The published loop (dense) was not measured, so there is no ratio to it.")
    return Part(
        title="Selection",
        headline=_headline(smallest),
        sentences=tuple(sentences),
        tables=(_latencies(lines),),
        draw=lambda: _plots(smallest),
    )


def _case(line: Line) -> tuple[Any, ...]:
    return tuple(sorted(line["case"].items()))


def _shape(line: Line) -> tuple[int, int]:
    return line["num_tokens"], line["num_picks"]


def _headline(lines: Sequence[Line]) -> Table:
    """Returns the fastest backend of each case."""
    fastest: dict[tuple[int, int], Line] = {}
    for line in lines:
        fastest[_shape(line)] = min(fastest.get(_shape(line), line), line, key=lambda each: each[_P50])
    rows = tuple(
        (f"{num_tokens} → {num_picks}", line["backend"], format_value(_P50, line[_P50]), line["ratio"])
        for (num_tokens, num_picks), line in sorted(fastest.items(), reverse=True)
    )
    columns = ("tokens → kept", "fastest backend", "p50, ms", "against the published loop")
    return Table("The selection alone", columns, rows, num_texts=2).without_empty_columns()


def _latencies(lines: Sequence[Line]) -> Table:
    rows = []
    for line in lines:
        num_tokens, num_picks = _shape(line)
        quoted = PUBLISHED_MS.get(_shape(line)) if line["batch"] == 1 else None
        times = (*(format_value(_P50, line[name]) for name in (_P50, _P20, _P80)), line["ratio"])
        floors = (format_value(_P50, line["metrics"].get(name)) for name in FLOORS)
        texts = (f"{num_tokens} → {num_picks}", line["backend"], str(line["batch"]))
        rows.append((*texts, *times, format_value(_P50, quoted), *floors))
    columns = ("tokens → kept", "backend", "batch", "p50, ms", "p20", "p80", "against the published loop")
    more = ("the paper's A6000, quoted, ms", "bandwidth floor, ms", "chain floor, ms")
    return Table("Latency of the selection", (*columns, *more), tuple(rows), num_texts=2).without_empty_columns()


def _plots(lines: Sequence[Line]) -> Iterator[Plot]:
    """Yields plots of time against tokens, at the most picks of each, and against picks, at one number of tokens."""
    picks: dict[int, set[int]] = {}
    for num_tokens, num_picks in map(_shape, lines):
        picks.setdefault(num_tokens, set()).add(num_picks)
    conditions = f"batch {lines[0]['batch']}, {{}}; bars from p20 to p80; lower is better"
    if len(picks) > 1:
        most = [line for line in lines if line["num_picks"] == max(picks[line["num_tokens"]])]
        note = conditions.format("the most picks of each number of tokens")
        yield _plot("Selection: time against tokens", "tokens N", note, most, "num_tokens")
    fixed = max(picks, key=lambda num_tokens: (len(picks[num_tokens]), num_tokens))
    if len(picks[fixed]) > 1:
        chosen = [line for line in lines if line["num_tokens"] == fixed]
        note = conditions.format(f"{fixed} tokens")
        yield _plot("Selection: time against picks", "picks K", note, chosen, "num_picks")


def _plot(title: str, x_title: str, note: str, lines: Sequence[Line], by: str) -> Plot:
    figure = new_figure(x_title, "p50, ms")
    lines = sorted(lines, key=lambda line: line[by])
    for idx, (backend, chosen) in enumerate(grouped(lines, "backend").items()):
        colour = _COLOURS.get(backend, PALETTE[idx % len(PALETTE)])
        spread = {
            "array": [line[_P80] - line[_P50] for line in chosen],
            "arrayminus": [line[_P50] - line[_P20] for line in chosen],
            "thickness": 1,
        }
        style = {"line": {"color": colour}, "marker": {"color": colour, "size": 8}}
        xs, ys = ([line[name] for line in chosen] for name in (by, _P50))
        figure.add_scatter(name=backend, x=xs, y=ys, error_y=spread, mode="lines+markers", **style)
    for (name, label), dash in zip(FLOORS.items(), ("dash", "dot"), strict=True):
        floors = {line[by]: line["metrics"][name] for line in lines if name in line["metrics"]}
        if floors:
            grey = {"color": "#5d6470", "dash": dash}
            figure.add_scatter(name=label, x=list(floors), y=list(floors.values()), mode="lines", line=grey)
    times_ms = [line[name] for line in lines for name in LATENCIES]
    digits = (1, 2, 5) if max(times_ms) > 10 * min(times_ms) else (1, 1.5, 2, 3, 4, 6, 8)
    ticks_ms = [digit * 10**power for power in range(-3, 6) for digit in digits]
    figure.update_yaxes(type="log", tickvals=ticks_ms, ticktext=[f"{tick:g}" for tick in ticks_ms])
    return plot_of(title, note, figure, {"x": "tokens", "y": _P50})
