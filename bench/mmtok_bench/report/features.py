"""The section of real features: exactness of selections, the work of lazy evaluation, and measures of kept tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from mmtok_bench.report.frame import grouped, newest, records
from mmtok_bench.report.tables import Part, Plot, Table, line_style, new_figure, plot_of

__all__ = ["features_part"]

_SHARES = {
    "covered_share": "coverage of words and image",
    "image_share": "coverage of the image alone",
    "salient_share": "most salient quarter of the patches kept",
}

Line = dict[str, Any]


def features_part(rows: pd.DataFrame) -> Part:
    """Returns the section of one machine's rows, the newest of each case."""
    lines = records(newest(rows))
    exactness, work, close_calls, kept = (
        [line for line in lines if line["what"] == what] for what in ("exactness", "work", "close calls", "kept")
    )
    by_encoder = grouped(kept, "encoder")
    tables = [_exactness(exactness)] if exactness else []
    tables += [_work(work)] if work else []
    tables += [_share_table(name, of_encoder) for of_encoder in by_encoder.values() for name in _SHARES]
    sentences = ["Features of images from trained encoders; the words are no question (see the documentation)."]
    for line in close_calls:
        metrics = line["metrics"]
        sentences.append(
            f"{_images(line)}, in double precision: {metrics['num_close']:.0f} of {metrics['num_leads']:.0f} greedy "
            f"picks lead the next best token by less than 1e-6 of their gain; the smallest lead is "
            f"{metrics['smallest_lead']:.1e}, 1% of the leads are below {metrics['lead_p01']:.1e}, and half of them "
            f"below {metrics['lead_p50']:.1e}."
        )
    return Part(
        "Real features",
        sentences=tuple(sentences),
        tables=tuple(tables),
        draw=lambda: (plot for of_encoder in by_encoder.values() for plot in _plots(of_encoder)),
    )


def _images(line: Line) -> str:
    return f"{line['num_runs']} {line['shown']}s of {line['num_tokens']} patches through {line['encoder']}"


def _exactness(lines: Sequence[Line]) -> Table:
    rows = tuple(
        (
            line["encoder"],
            line["backend"],
            str(line["num_picks"]),
            f"{line['metrics']['num_equal']:.0f} of {line['num_runs']}",
            f"{line['metrics']['num_close_calls']:.0f}",
        )
        for line in lines
    )
    columns = ("encoder", "backend", "picks", "images with the reference's picks", "picks that gain less by rounding")
    return Table("Picks against the float32 reference", columns, rows)


def _work(lines: Sequence[Line]) -> Table:
    rows = []
    for line in lines:
        metrics = line["metrics"]
        share = f"{100 * metrics['gains'] / metrics['dense_gains']:.0f}%"
        counts = (f"{metrics[name]:,.0f}" for name in ("gains", "most_gains", "dense_gains"))
        rows.append((line["encoder"], line["budget"], str(line["num_picks"]), *counts, share))
    columns = ("encoder", "budget", "picks", "gains computed, mean", "most", "by the published loop", "share")
    return Table("Gains that lazy evaluation computes", columns, tuple(rows))


def _share_table(name: str, lines: Sequence[Line]) -> Table:
    cells = {(line["method"], line["budget"]): f"{100 * line['metrics'][name]:.1f}" for line in lines}
    methods, budgets = (list(dict.fromkeys(each[place] for each in cells)) for place in (0, 1))
    rows = tuple((method, *(cells.get((method, budget), "") for budget in budgets)) for method in methods)
    return Table(f"{_images(lines[0])}: mean {_SHARES[name]}, %", ("method", *budgets), rows)


def _plots(lines: Sequence[Line]) -> Iterator[Plot]:
    for name, title in _SHARES.items():
        figure = new_figure("patches kept", "share")
        for number, (method, of_method) in enumerate(grouped(lines, "method").items()):
            chosen = sorted(of_method, key=lambda line: line["num_picks"])
            figure.add_scatter(
                name=method,
                x=[line["num_picks"] for line in chosen],
                y=[line["metrics"][name] for line in chosen],
                mode="lines+markers",
                **line_style(number),
            )
        figure.update_xaxes(type="log")
        figure.update_yaxes(tickformat=".0%")
        note = f"{_images(lines[0])}; higher is better"
        title = f"Real features: {title} ({lines[0]['encoder']})"
        yield plot_of(title, note, figure, {"x": "tokens_kept", "y": "accuracy"})
