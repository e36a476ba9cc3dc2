"""The selector's latencies as a picture, with the floors that no exact greedy selection passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmtok_bench.made_up_features import FEATURE_BYTES
from mmtok_bench.results import ResultRow, latencies_ms
from mmtok_bench.selector_report import BACKEND_COLOURS
from mmtok_bench.timing import measure_bandwidth, measure_pick_latency

__all__ = ["plot_latency"]


def plot_latency(rows: Sequence[ResultRow], path: Path, device: torch.device) -> Path:
    """Returns `path`, where the plot of the smallest batch's rows now is: time against tokens, and against picks.

    Floors, from what the machine does now: bandwidth, the features read once and C written and read once, at the speed
    of a large copy; chain, K times an argmax over the gains and a maximum with a column, one after another.
    """
    batch = min(int(row.case["batch"]) for row in rows)
    chosen = [row for row in rows if row.case["batch"] == batch]
    bandwidth = measure_bandwidth(device)
    num_words = int(rows[0].case["num_words"])

    def bandwidth_floor_ms(num_tokens: int, num_picks: int) -> float:
        matrix_bytes = 4 * num_tokens * (num_words + num_tokens)
        return 1e3 * batch * (num_tokens * FEATURE_BYTES + 2 * matrix_bytes) / bandwidth

    def chain_floor_ms(num_tokens: int, num_picks: int) -> float:
        return num_picks * measure_pick_latency(num_tokens, num_words + num_tokens, device)

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_tokens, by_picks = figure.subplots(1, 2, sharey=True)
    most = max(int(row.case["num_tokens"]) for row in chosen)
    largest = {tokens: max(_picks(chosen, tokens)) for tokens in {int(row.case["num_tokens"]) for row in chosen}}
    floors = {
        f"bandwidth floor, {bandwidth / 1e9:.0f} GB/s copied": bandwidth_floor_ms,
        "chain floor: argmax and maximum, K times": chain_floor_ms,
    }
    _draw(
        by_tokens, [row for row in chosen if row.case["num_picks"] == largest[int(row.case["num_tokens"])]], 0, floors
    )
    by_tokens.set_xlabel("tokens N (most picks of each)")
    by_tokens.set_ylabel("ms")
    _draw(by_picks, [row for row in chosen if row.case["num_tokens"] == most], 1, floors)
    by_picks.set_xlabel(f"picks K of {most} tokens")
    handles, labels = by_tokens.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    first = rows[0]
    figure.suptitle(
        f"Selection, batch {batch}: {first.device}, {first.num_threads} threads, {first.time[:10]}", size=10
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _picks(rows: Sequence[ResultRow], num_tokens: int) -> set[int]:
    return {int(row.case["num_picks"]) for row in rows if row.case["num_tokens"] == num_tokens}


def _draw(axes: Axes, rows: Sequence[ResultRow], by: int, floors: Mapping[str, Callable[[int, int], float]]) -> None:
    """Draws a line a backend and a floor against tokens (`by` 0) or picks (1), the spread p20 to p80 as a band."""
    for backend in dict.fromkeys(row.backend for row in rows):
        points = sorted((_shape(row)[by], *latencies_ms(row)) for row in rows if row.backend == backend)
        xs, lows, middles, highs = zip(*points, strict=True)
        colour = BACKEND_COLOURS.get(backend)
        (line,) = axes.plot(xs, middles, marker="o", markersize=4, color=colour, label=backend)
        axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
    shapes = sorted({_shape(row) for row in rows}, key=lambda shape: shape[by])
    for (label, floor), style in zip(floors.items(), ("--", ":"), strict=True):
        values = [floor(*shape) for shape in shapes]
        axes.plot([shape[by] for shape in shapes], values, style, color="#30343b", linewidth=1, label=label)
    axes.set_yscale("log")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _shape(row: ResultRow) -> tuple[int, int]:
    return int(row.case["num_tokens"]), int(row.case["num_picks"])
