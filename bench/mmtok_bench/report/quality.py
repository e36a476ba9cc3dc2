"""The section of quality: scores against budgets by method, a plot for each kind of question, and public benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mmtok_bench.quality.public_table import public_table
from mmtok_bench.quality.rows import POCKET, UNPRUNED
from mmtok_bench.quality.table import by_model, left_out, pooled_rows, score_tables
from mmtok_bench.report.blocks import Part, Plot, in_words
from mmtok_bench.report.gather import Measurement, newest
from mmtok_bench.report.plots import DOWNSAMPLED, PALETTE, new_figure, plot_of
from mmtok_bench.report.plots import UNPRUNED as GREY
from mmtok_bench.results import ResultRow

__all__ = ["quality_part"]


def quality_part(measurements: Sequence[Measurement]) -> Part:
    """Returns the section of one machine's rows, the newest of each case."""
    rows = [each.row for each in newest(measurements)]
    pocket = pooled_rows(rows)
    public = [row for row in rows if row.case["task"] != POCKET]
    sentences = []
    if pocket:
        sentences.append(
            "Pocket tasks: held-out scenes, exact match; the 95% intervals are bootstrapped over scenes, and a share "
            "of the unpruned score over both runs' answers to the same questions."
        )
    others = left_out(rows)
    if others:
        sentences.append(
            "A table is of one set of questions, that of all seeds together where there is one, else the largest, of "
            f"those the newest; left out are {in_words(_counted(others))}."
        )
    tables = (*score_tables(rows), *([public_table(public)] if public else ()))
    return Part("Quality", sentences=tuple(sentences), plots=tuple(_plots(pocket)), tables=tables)


def _counted(rows: Sequence[ResultRow]) -> list[str]:
    groups = Counter((str(row.case["model"]), row.metrics["num_questions"]) for row in rows)
    return [
        f"{number} row{'s' if number > 1 else ''} of {model} over {num_questions:.0f} questions"
        for (model, num_questions), number in groups.items()
    ]


def _plots(rows: Sequence[ResultRow]) -> list[Plot]:
    plots = []
    for model, of_model in by_model(rows).items():
        for kind in dict.fromkeys(str(row.case["kind"]) for row in of_model):
            chosen = [row for row in of_model if row.case["kind"] == kind and "tokens_kept" in row.metrics]
            if len({row.case["budget"] for row in chosen}) > 1:
                plots.append(_plot(f"{model}, {kind}", chosen))
    return plots


def _plot(name: str, rows: Sequence[ResultRow]) -> Plot:
    figure = new_figure("tokens kept", "accuracy, %")
    methods = list(dict.fromkeys(str(row.case["method"]) for row in rows if row.case["method"] != UNPRUNED))
    for number, method in enumerate(methods):
        chosen = sorted(
            (row for row in rows if row.case["method"] == method), key=lambda row: row.metrics["tokens_kept"]
        )
        colour = DOWNSAMPLED if method == "downsample" else PALETTE[number % len(PALETTE)]
        figure.add_scatter(
            name=method,
            x=[row.metrics["tokens_kept"] for row in chosen],
            y=[row.metrics["accuracy"] for row in chosen],
            error_y=_error_bars(chosen),
            mode="lines+markers",
            line={"color": colour, "dash": "solid" if number < len(PALETTE) else "dot"},
            marker={"color": colour, "size": 7},
        )
    for row in rows:
        if row.case["method"] == UNPRUNED:
            ends = [min(each.metrics["tokens_kept"] for each in rows), row.metrics["tokens_kept"]]
            line = {"color": GREY, "dash": "dash"}
            figure.add_scatter(name=UNPRUNED, x=ends, y=[row.metrics["accuracy"]] * 2, mode="lines", line=line)
    figure.update_xaxes(type="log")
    figure.update_yaxes(tickformat=".0%", title="accuracy")
    note = f"{rows[0].metrics['num_questions']:.0f} questions; bars are 95% intervals; higher is better"
    return plot_of(
        f"Quality: {name}, accuracy against tokens kept", note, figure, {"x": "tokens_kept", "y": "accuracy"}
    )


def _error_bars(rows: Sequence[ResultRow]) -> dict[str, object]:
    middles = [row.metrics["accuracy"] for row in rows]
    highs = [row.metrics.get("accuracy_high", row.metrics["accuracy"]) for row in rows]
    lows = [row.metrics.get("accuracy_low", row.metrics["accuracy"]) for row in rows]
    return {
        "array": [high - middle for high, middle in zip(highs, middles, strict=True)],
        "arrayminus": [middle - low for low, middle in zip(lows, middles, strict=True)],
        "thickness": 1,
    }
