"""The section of quality: scores by method and budget, for each kind of question; and public benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.quality.published import BENCHMARKS, PUBLISHED
from mmtok_bench.report.frame import grouped, newest, records
from mmtok_bench.report.frontier import frontier_plot, time_frontier_plots
from mmtok_bench.report.tables import DOWNSAMPLED, Part, Plot, Table, in_words, line_style, new_figure, plot_of
from mmtok_bench.report.tables import UNPRUNED as GREY

__all__ = ["OVER_TOKENS", "quality_part"]

OVER_TOKENS = ", accuracy against tokens kept"
"""Suffix of the titles of plots against tokens kept."""

_POCKET, _UNPRUNED, _ALL_SEEDS = "pocket", "unpruned", "all"
_PUBLIC_TITLE = (
    "Public benchmarks, by lmms-eval: scores in %, MME's in points, those of other tasks as lmms-eval gives them"
)

Line = dict[str, Any]


def quality_part(rows: pd.DataFrame, served: pd.DataFrame | None = None) -> Part:
    """Returns the section of one machine's rows, the newest of each case.

    For each model and kind, rows of one set of questions are shown: preferably that of all seeds together, then the
    one with the most questions, then the newest.

    Args:
        rows: Rows of `mmtok quality`.
        served: Rows of `mmtok bench serve` on this machine, against whose times accuracy is also drawn.
    """
    lines = records(newest(rows))
    pocket = [line for line in lines if line["task"] == _POCKET]
    public = [line for line in lines if line["task"] != _POCKET]
    best: dict[Any, Line] = {}
    for line in pocket:
        best[_place(line)] = max(best.get(_place(line), line), line, key=_rank)
    shown = [line for line in pocket if _questions(line) == _questions(best[_place(line)])]
    sentences = []
    if shown:
        sentences.append(
            "Pocket tasks: held-out scenes, exact match. The 95% intervals are bootstrapped over scenes; those of "
            "shares of the unpruned score use both runs' answers to the same questions."
        )
    left_out = _left_out(pocket, shown)
    if left_out:
        sentences.append(
            "Each table has one set of questions: that of all seeds together if there is one, else the largest, and "
            f"among these the newest; left out are {in_words(left_out)}."
        )
    tables = (*_score_tables(shown), *([_public_table(public)] if public else ()))
    return Part("Quality", sentences=tuple(sentences), tables=tables, draw=lambda: _plots(shown, served))


def _place(line: Line) -> tuple[str, str]:
    return line["model"], line["kind"]


def _questions(line: Line) -> tuple[bool, str]:
    return line["seed"] == _ALL_SEEDS, line["question_set"]


def _rank(line: Line) -> tuple[bool, float, str]:
    return line["seed"] == _ALL_SEEDS, line["num_questions"], line["time"]


def _left_out(pocket: Sequence[Line], shown: Sequence[Line]) -> list[str]:
    """Returns how many rows of other sets of questions are left out; single seeds of shown rows do not count."""
    settings = {(_place(line), line["method"], line["budget"]) for line in shown}
    kept = {id(line) for line in shown}
    groups = Counter(
        (line["model"], line["num_questions"])
        for line in pocket
        if id(line) not in kept
        and (line["seed"] == _ALL_SEEDS or (_place(line), line["method"], line["budget"]) not in settings)
    )
    return [
        f"{number} row{'s' if number > 1 else ''} of {model} over {num_questions:.0f} questions"
        for (model, num_questions), number in groups.items()
    ]


def _score_tables(shown: Sequence[Line]) -> Iterator[Table]:
    """Yields, for each model, a table of accuracies for each kind, and one of POPE's F1 scores by setting."""
    for model, of_model in grouped(shown, "model").items():
        of_kinds = grouped(of_model, "kind")
        for kind, of_kind in of_kinds.items():
            metrics = of_kind[0]["metrics"]
            title = (
                f"{model}: {kind}: accuracy, % (95% interval), {metrics['num_questions']:.0f} questions; chance "
                f"{100 * metrics['chance']:.0f}, always the commonest answer {100 * metrics['majority']:.0f}"
            )
            yield _grid(title, of_kind, _accuracy_cell)
        if "existence" in of_kinds:
            title = f"{model}: existence, POPE's F1, %: random / popular / adversarial negatives"
            yield _grid(title, of_kinds["existence"], _pope_cell)
        covered = [line for line in of_model if "coverage" in line["metrics"]]
        if covered:
            yield _coverage_table(model, covered)


def _coverage_table(model: str, lines: Sequence[Line]) -> Table:
    """Returns the table of coverage, with a row for each method and budget and a column for each kind of question."""
    cells = {(line["method"], line["budget"], line["kind"]): _coverage_cell(line["metrics"]) for line in lines}
    kinds = list(dict.fromkeys(kind for *_, kind in cells))
    settings = list(dict.fromkeys((method, budget) for method, budget, _ in cells))
    title = (
        f"{model}: coverage, % (bound for any tokens); answers that pruning made wrong, and how well a low coverage "
        "predicts them: area under the ROC curve (95% interval), where 0.5 is chance"
    )
    rows = tuple((*setting, *(cells.get((*setting, kind), "") for kind in kinds)) for setting in settings)
    return Table(title, ("method", "budget", *kinds), rows, num_texts=2)


def _grid(title: str, lines: Sequence[Line], cell_of: Callable[[Line], str]) -> Table:
    """Returns a table with a row for each method and a column for each budget."""
    scores = {(line["method"], line["budget"]): line for line in lines}
    methods, budgets = (list(dict.fromkeys(each[idx] for each in scores)) for idx in (0, 1))
    headings = []
    for budget in budgets:
        kept = {round(line["metrics"].get("tokens_kept", 0)) for line in lines if line["budget"] == budget} - {0}
        # A smaller image may have fewer tokens than the budget allows.
        is_told = kept and budget != str(max(kept))
        headings.append(f"{budget} ({max(kept)} tokens)" if is_told else f"{budget} tokens")
    rows = tuple(
        (method, *(cell_of(scores[method, budget]) if (method, budget) in scores else "" for budget in budgets))
        for method in methods
    )
    return Table(title, ("method", *headings), rows)


def _accuracy_cell(line: Line) -> str:
    metrics = line["metrics"]
    shown = f"{100 * metrics['accuracy']:.1f}"
    if "accuracy_low" in metrics:
        shown += f" ({100 * metrics['accuracy_low']:.1f} to {100 * metrics['accuracy_high']:.1f})"
    if line["budget"] != "all" and "share" in metrics:
        shown += f", {100 * metrics['share']:.0f}% of unpruned"
        shown += f" ({100 * metrics['share_low']:.0f} to {100 * metrics['share_high']:.0f})"
    if "gain" in metrics:
        shown += f", {100 * metrics['gain']:+.1f} against input keys"
        shown += f" ({100 * metrics['gain_low']:+.1f} to {100 * metrics['gain_high']:+.1f})"
    return shown


def _coverage_cell(metrics: Mapping[str, float]) -> str:
    shown = f"{100 * metrics['coverage']:.1f} ({100 * metrics['coverage_bound']:.1f})"
    if "num_lost" in metrics:
        shown += f", {metrics['num_lost']:.0f} lost"
    if "lost_auroc" in metrics:
        shown += f": {metrics['lost_auroc']:.2f}"
        shown += f" ({metrics['lost_auroc_low']:.2f} to {metrics['lost_auroc_high']:.2f})"
    return shown


def _pope_cell(line: Line) -> str:
    values = [line["metrics"].get(f"pope_{name}_f1") for name in ("random", "popular", "adversarial")]
    return " / ".join("none" if value is None else f"{100 * value:.0f}" for value in values)


def _public_table(lines: Sequence[Line]) -> Table:
    """Returns a table with a line for each benchmark, method and budget; the paper's lines follow the measured ones."""
    rows = []
    for task, chosen in grouped(lines, "task").items():
        # Converts lmms-eval's score to the unit of the paper.
        factor = BENCHMARKS[task].factor if task in BENCHMARKS else 1
        for line in chosen:
            metrics = line["metrics"]
            share = f"{100 * metrics['share']:.1f}" if "share" in metrics else ""
            cells = (f"{factor * metrics['score']:.4g}", share, f"{metrics['num_questions']:.0f}")
            rows.append((task, line["model"] or "measured", line["method"], line["budget"], *cells))
        budgets = {line["budget"] for line in chosen if line["method"] in ("mmtok", _UNPRUNED)}
        for quoted in PUBLISHED:
            if (quoted.family, quoted.benchmark) == (chosen[0]["preset"], task) and quoted.budget in budgets:
                score = "" if quoted.score is None else f"{quoted.score:.4g}"
                is_all = quoted.budget == "all"
                method, share = (_UNPRUNED, "") if is_all else ("mmtok", f"{100 * quoted.share:.1f}")
                rows.append((task, f"{quoted.model}, the paper", method, quoted.budget, score, share, ""))
    columns = ("benchmark", "model", "method", "budget", "score", "% of unpruned", "questions")
    return Table(_PUBLIC_TITLE, columns, tuple(rows), num_texts=4).without_empty_columns()


def _plots(shown: Sequence[Line], served: pd.DataFrame | None) -> Iterator[Plot]:
    if served is not None:
        yield from time_frontier_plots(shown, records(newest(served)))
    for model, of_model in grouped(shown, "model").items():
        frontier = frontier_plot(model, of_model)
        if frontier is not None:
            yield frontier
        # Only budgets of whole images: the plot above has the others.
        whole = [line for line in of_model if not MixedBudget.parse(line["budget"]).encodes_less]
        for kind, chosen in grouped([line for line in whole if "tokens_kept" in line["metrics"]], "kind").items():
            if len({line["budget"] for line in chosen}) > 1:
                yield _plot(f"{model}, {kind}", chosen)


def _plot(name: str, lines: Sequence[Line]) -> Plot:
    figure = new_figure("tokens kept", "accuracy")
    pruned = grouped([line for line in lines if line["method"] != _UNPRUNED], "method")
    for number, (method, chosen) in enumerate(pruned.items()):
        metrics = [line["metrics"] for line in sorted(chosen, key=lambda line: line["tokens_kept"])]
        middles = [each["accuracy"] for each in metrics]
        figure.add_scatter(
            name=method,
            x=[each["tokens_kept"] for each in metrics],
            y=middles,
            error_y={
                "array": [each.get("accuracy_high", each["accuracy"]) - each["accuracy"] for each in metrics],
                "arrayminus": [each["accuracy"] - each.get("accuracy_low", each["accuracy"]) for each in metrics],
                "thickness": 1,
            },
            mode="lines+markers",
            **line_style(number, DOWNSAMPLED if method == "downsample" else None),
        )
    for line in lines:
        if line["method"] == _UNPRUNED:
            ends = [min(each["tokens_kept"] for each in lines), line["tokens_kept"]]
            style = {"color": GREY, "dash": "dash"}
            figure.add_scatter(name=_UNPRUNED, x=ends, y=[line["accuracy"]] * 2, mode="lines", line=style)
    figure.update_xaxes(type="log")
    figure.update_yaxes(tickformat=".0%")
    note = f"{lines[0]['num_questions']:.0f} questions; bars are 95% intervals; higher is better"
    formats = {"x": "tokens_kept", "y": "accuracy"}
    return plot_of(f"Quality: {name}{OVER_TOKENS}", note, figure, formats)
