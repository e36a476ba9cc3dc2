"""Plots of budgets and what is encoded together: accuracy against image tokens, or against time to first token."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.report.frame import grouped
from mmtok_bench.report.tables import PALETTE, UNPRUNED, Plot, new_figure, plot_of

__all__ = ["Mix", "frontier_plot", "on_the_frontier", "time_frontier_plots"]

_METHODS = ("unpruned", "mmtok")


@dataclass(frozen=True, slots=True)
class Mix:
    """One budget, of one part of an image.

    Args:
        mixed: The budget, and what is encoded.
        cost: Image tokens encoded plus image tokens kept, or a time in milliseconds.
        accuracy: The mean over the kinds of questions.
    """

    mixed: MixedBudget
    cost: float
    accuracy: float


def on_the_frontier(mixes: Sequence[Mix]) -> list[Mix]:
    """Returns the Pareto frontier of cost and accuracy, by cost."""
    found: list[Mix] = []
    for mix in sorted(mixes, key=lambda each: (each.cost, -each.accuracy)):
        if not found or mix.accuracy > found[-1].accuracy:
            found.append(mix)
    return found


def frontier_plot(model: str, lines: Sequence[dict[str, Any]]) -> Plot | None:
    """Returns the plot of a model's rows; None if all images were encoded whole.

    Args:
        model: Name of the model.
        lines: Its pocket rows of every kind.
    """
    title = f"Quality: {model}, budgets and what is encoded"
    return _plot(
        title, list(_mixes(lines)), lines, "image tokens, encoded + kept", "A Qwen encodes 4 patches for a token"
    )


def time_frontier_plots(lines: Sequence[dict[str, Any]], served: Sequence[dict[str, Any]]) -> Iterator[Plot]:
    """Yields plots of accuracy against the time to the first token that a served model takes with the same settings.

    A model's rows are drawn with the times of each served model and size of image that has as many tokens, one request
    at a time, without a prefix cache.

    Args:
        lines: Pocket rows of every kind.
        served: Rows of `mmtok bench serve` on the same machine.
    """
    alone = [
        line
        for line in served
        if (line["concurrency"], line["prefix_cache"], line["case"].get("questions_per_image", 1)) == (1, "off", 1)
        and line["method"] in ("none", "mmtok")
    ]
    for model, of_model in grouped(lines, "model").items():
        mixes = list(_mixes(of_model))
        whole = next((mix for mix in mixes if str(mix.mixed) == "all"), None)
        if whole is None:
            continue
        for name, of_name in grouped(alone, "model").items():
            for size, of_size in grouped(of_name, "image_px").items():
                # The unpruned model encodes and keeps every token.
                times = {
                    line["budget"]: line["metrics"]["ttft_p50_ms"]
                    for line in of_size
                    if 2 * line["metrics"]["image_tokens_in"] == whole.cost
                }
                timed = [replace(mix, cost=times[str(mix.mixed)]) for mix in mixes if str(mix.mixed) in times]
                title = f"Quality and time: {model}, with the times of {name}, images of {size}"
                plot = _plot(title, timed, of_model, "time to first token, ms", "median of one request at a time")
                if plot is not None:
                    yield plot


def _plot(title: str, mixes: Sequence[Mix], lines: Sequence[dict[str, Any]], x_title: str, about: str) -> Plot | None:
    parts = sorted({mix.mixed.of_all for mix in mixes}, key=lambda part: (-part.encoder_scale, part.skip_repeats))
    if len(parts) < 2:
        return None
    figure = new_figure(x_title, "accuracy, mean of all kinds")
    best = on_the_frontier(mixes)
    figure.add_scatter(
        name="frontier",
        x=[mix.cost for mix in best],
        y=[mix.accuracy for mix in best],
        mode="lines+markers",
        line={"color": UNPRUNED, "dash": "dash"},
        marker={"color": UNPRUNED, "symbol": "circle-open", "size": 16},
    )
    for number, part in enumerate(parts):
        chosen = sorted((mix for mix in mixes if mix.mixed.of_all == part), key=lambda mix: mix.cost)
        figure.add_scatter(
            name=_what_is_encoded(part),
            x=[mix.cost for mix in chosen],
            y=[mix.accuracy for mix in chosen],
            text=[str(mix.mixed.budget) for mix in chosen],
            textposition="bottom right",
            mode="lines+markers+text",
            line={"color": PALETTE[number % len(PALETTE)]},
            marker={"size": 7},
        )
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(tickformat=".0%")
    kinds = ", ".join(dict.fromkeys(line["kind"] for line in lines))
    note = f"method mmtok; kinds: {kinds}; higher and further left is better. {about}"
    formats = {"x": "tokens_kept", "y": "accuracy"}
    return plot_of(title, note, figure, formats)


def _what_is_encoded(part: MixedBudget) -> str:
    repeats = f"repeats within {part.skip_repeats} left out" if part.skip_repeats >= 0 else ""
    scale = f"encoder scale {part.encoder_scale:g}" if part.encoder_scale < 1 or not repeats else ""
    return ", ".join(filter(None, (scale, repeats)))


def _mixes(lines: Sequence[dict[str, Any]]) -> Iterator[Mix]:
    """Yields the budgets that have rows of all kinds of questions, beside a row that keeps all that is encoded."""
    kinds = {line["kind"] for line in lines}
    metrics: dict[str, list[dict[str, float]]] = {}
    for line in lines:
        if line["method"] in _METHODS and "tokens_kept" in line["metrics"]:
            metrics.setdefault(line["budget"], []).append(line["metrics"])
    for budget, of_kinds in metrics.items():
        mixed = MixedBudget.parse(budget)
        encoded = metrics.get(str(mixed.of_all))
        if encoded is None or len(of_kinds) < len(kinds):
            continue
        yield Mix(
            mixed,
            encoded[0]["tokens_kept"] + statistics.fmean(each["tokens_kept"] for each in of_kinds),
            statistics.fmean(each["accuracy"] for each in of_kinds),
        )
