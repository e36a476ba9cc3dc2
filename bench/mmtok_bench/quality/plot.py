"""Scores against tokens kept as a picture, for the docs; the report draws its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mmtok_bench.quality.rows import UNPRUNED
from mmtok_bench.quality.table import pooled_rows
from mmtok_bench.results import ResultRow

__all__ = ["plot_scores"]

_COLOURS = {
    "mmtok": "#0f8f89",
    "mmtok+agent": "#b8323e",
    "text-coverage": "#7a5bd0",
    "vision-coverage": "#3d7fd6",
    "divprune": "#c14b7c",
    "cdpruner": "#e07b39",
    "dart": "#4f6d7a",
    "scope": "#2f4b9c",
    "apet": "#9c5c2f",
    "otprune": "#d4a5c9",
    "visionzip": "#6d9b2f",
    "random": "#8a9099",
    "even": "#b58a1c",
    "downsample": "#c2703d",
}


def plot_scores(rows: Sequence[ResultRow], path: Path) -> Path:
    """Returns `path`, where the plot now is: a panel for each kind, a line for each method, its interval as a band."""
    pooled = [row for row in pooled_rows(rows) if "tokens_kept" in row.metrics]
    kinds = list(dict.fromkeys(str(row.case["kind"]) for row in pooled))
    figure = Figure(figsize=(max(4.0, 3.0 * len(kinds)), 3.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(kinds)), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=False):
        _draw(axes, [row for row in pooled if row.case["kind"] == kind])
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel("tokens kept")
    panels[0].set_ylabel("accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _draw(axes: Axes, rows: Sequence[ResultRow]) -> None:
    for method in dict.fromkeys(str(row.case["method"]) for row in rows if row.case["method"] != UNPRUNED):
        chosen = sorted(
            (row for row in rows if row.case["method"] == method), key=lambda row: row.metrics["tokens_kept"]
        )
        kept = [row.metrics["tokens_kept"] for row in chosen]
        ends = {
            end: [100 * row.metrics.get(f"accuracy{end}", row.metrics["accuracy"]) for row in chosen]
            for end in ("", "_low", "_high")
        }
        (line,) = axes.plot(kept, ends[""], marker="o", markersize=3, color=_COLOURS.get(method), label=method)
        axes.fill_between(kept, ends["_low"], ends["_high"], color=line.get_color(), alpha=0.12, linewidth=0)
    for row in rows:
        if row.case["method"] == UNPRUNED:
            axes.axhline(100 * row.metrics["accuracy"], color="#30343b", linestyle="--", linewidth=1, label="unpruned")
    axes.axhline(
        100 * rows[0].metrics["majority"], color="#30343b", linestyle=":", linewidth=1, label="commonest answer"
    )
    axes.set_xscale("log", base=2)
    ticks = _apart(sorted({round(row.metrics["tokens_kept"]) for row in rows}, reverse=True))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(counts: Sequence[int]) -> list[int]:
    """Returns those of falling counts whose labels do not touch: a smaller image may have a few tokens less."""
    kept: list[int] = []
    for count in counts:
        if not kept or count < 0.8 * kept[-1]:
            kept.append(count)
    return kept
