"""The section of the selector: its latency by backend, tokens and picks."""

from __future__ import annotations

from collections.abc import Sequence

from mmtok_bench.report.blocks import Part, Plot, Table, without_empty_columns
from mmtok_bench.report.gather import Measurement, newest
from mmtok_bench.report.metrics import compare, format_value
from mmtok_bench.report.plots import PALETTE, new_figure, plot_of
from mmtok_bench.results import ResultRow, latencies_ms
from mmtok_bench.selector_report import BACKEND_COLOURS, PUBLISHED_MS

__all__ = ["selector_part"]

_BASELINE = "dense"
_LATENCY = "latency_p50_ms"


def selector_part(measurements: Sequence[Measurement]) -> Part:
    """Returns the section of one machine's rows, the newest of each case."""
    shown = newest(measurements)
    baselines = {_case_of_run(each): each.row for each in measurements if each.row.backend == _BASELINE}
    batches = sorted({int(each.row.case["batch"]) for each in shown})
    smallest = [each for each in shown if each.row.case["batch"] == batches[0]]
    sentences = ["Similarity included, from features to picks; every backend's picks were checked before it was timed."]
    if not baselines:
        sentences.append("Not measured: the published loop (dense). There is no ratio to it.")
    return Part(
        title="Selection",
        headline=_headline(smallest, baselines),
        sentences=tuple(sentences),
        plots=tuple(_plots([each.row for each in smallest], batches[0])),
        tables=(_latencies(shown, baselines),),
    )


_Case = tuple[object, ...]


def _case_of_run(each: Measurement) -> _Case:
    return each.run, frozenset(each.row.case.items())


def _shape(row: ResultRow) -> tuple[int, int]:
    return int(row.case["num_tokens"]), int(row.case["num_picks"])


def _against(each: Measurement, baselines: dict[_Case, ResultRow]) -> str:
    baseline = baselines.get(_case_of_run(each))
    if baseline is None or each.row.backend == _BASELINE:
        return ""
    return compare(_LATENCY, latencies_ms(each.row)[1], latencies_ms(baseline)[1])


def _headline(shown: Sequence[Measurement], baselines: dict[_Case, ResultRow]) -> Table:
    """Returns the fastest backend of each case."""
    fastest: dict[tuple[int, int], Measurement] = {}
    for each in shown:
        best = fastest.get(_shape(each.row))
        if best is None or latencies_ms(each.row)[1] < latencies_ms(best.row)[1]:
            fastest[_shape(each.row)] = each
    lines = [
        (
            f"{num_tokens} → {num_picks}",
            each.row.backend,
            format_value(_LATENCY, latencies_ms(each.row)[1]),
            _against(each, baselines),
        )
        for (num_tokens, num_picks), each in sorted(fastest.items(), reverse=True)
    ]
    columns = ("tokens → kept", "fastest backend", "p50, ms", "against the published loop")
    return without_empty_columns(Table("The selection alone", columns, tuple(lines), num_texts=2))


def _latencies(shown: Sequence[Measurement], baselines: dict[_Case, ResultRow]) -> Table:
    lines = []
    for each in shown:
        row = each.row
        p20_ms, p50_ms, p80_ms = (format_value(_LATENCY, value) for value in latencies_ms(row))
        published = PUBLISHED_MS.get(_shape(row)) if row.case["batch"] == 1 else None
        quoted = format_value(_LATENCY, published)
        tokens, picks = _shape(row)
        times = (p50_ms, p20_ms, p80_ms, _against(each, baselines), quoted)
        lines.append((f"{tokens} → {picks}", row.backend, str(row.case["batch"]), *times))
    columns = ("tokens → kept", "backend", "batch", "p50, ms", "p20", "p80", "against the published loop")
    quoted_heading = "the paper's A6000, quoted, ms"
    table = Table("Latency of the selection", (*columns, quoted_heading), tuple(lines), num_texts=2)
    return without_empty_columns(table)


def _plots(rows: Sequence[ResultRow], batch: int) -> list[Plot]:
    """Returns time against tokens, at the most picks of each, and against picks, at the tokens of most sizes."""
    picks: dict[int, set[int]] = {}
    for num_tokens, num_picks in map(_shape, rows):
        picks.setdefault(num_tokens, set()).add(num_picks)
    plots = []
    if len(picks) > 1:
        most = [row for row in rows if _shape(row)[1] == max(picks[_shape(row)[0]])]
        note = f"batch {batch}, the most picks of each number of tokens; bars from p20 to p80; lower is better"
        plots.append(_plot("Selection: time against tokens", "tokens N", note, most, 0))
    fixed = max(picks, key=lambda num_tokens: (len(picks[num_tokens]), num_tokens))
    if len(picks[fixed]) > 1:
        note = f"batch {batch}, {fixed} tokens; bars from p20 to p80; lower is better"
        chosen = [row for row in rows if _shape(row)[0] == fixed]
        plots.append(_plot("Selection: time against picks", "picks K", note, chosen, 1))
    return plots


def _plot(title: str, x_title: str, note: str, rows: Sequence[ResultRow], by: int) -> Plot:
    figure = new_figure(x_title, "p50, ms")
    for idx, backend in enumerate(dict.fromkeys(row.backend for row in rows)):
        points = sorted((_shape(row)[by], *latencies_ms(row)) for row in rows if row.backend == backend)
        xs, lows, middles, highs = zip(*points, strict=True)
        colour = BACKEND_COLOURS.get(backend, PALETTE[idx % len(PALETTE)])
        spread = {
            "array": [high - middle for high, middle in zip(highs, middles, strict=True)],
            "arrayminus": [middle - low for low, middle in zip(lows, middles, strict=True)],
            "thickness": 1,
        }
        style = {"line": {"color": colour}, "marker": {"color": colour, "size": 8}}
        figure.add_scatter(name=backend, x=xs, y=middles, error_y=spread, mode="lines+markers", **style)
    times_ms = [time_ms for row in rows for time_ms in latencies_ms(row)]
    digits = (1, 2, 5) if max(times_ms) > 10 * min(times_ms) else (1, 1.5, 2, 3, 4, 6, 8)
    ticks_ms = [digit * 10**power for power in range(-3, 6) for digit in digits]
    figure.update_yaxes(type="log", tickvals=ticks_ms, ticktext=[f"{tick:g}" for tick in ticks_ms])
    return plot_of(title, note, figure, {"x": "tokens", "y": _LATENCY})
