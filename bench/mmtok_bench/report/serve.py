"""The section of a served model: gains of a budget over the unpruned server and over smaller images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.report.frame import grouped, newest, records
from mmtok_bench.report.metrics import compare, format_value, metric
from mmtok_bench.report.tables import Part, Table, in_words
from mmtok_bench.results import STAGES

__all__ = [
    "SHOWN_KEYS",
    "VARIANTS",
    "Line",
    "bound_by",
    "break_even",
    "exceeds_its_whole",
    "have_like_texts",
    "phases_ms",
    "serve_lines",
    "serve_part",
]

Line = dict[str, Any]
"""A row, with the keys that `serve_lines` adds."""

SHOWN_KEYS = ("model", "image_kind", "image_px", "prefix_cache", "budget", "method", "concurrency")
"""Keys of a case that have a column of their own; another key gets a column if its value differs between rows."""

VARIANTS = ("unpruned", "mmtok", "other", "downsample")
"""Values of `variant` in the order of tables and plots."""

_VARIED = ("budget", "method", "text_tokens")
# Image processors round a side to whole patches, and texts differ slightly between requests.
_EQUAL_TOKENS = 0.1
_LATENCIES = tuple(f"{phase}_{quantile}_ms" for phase in ("ttft", "itl", "e2e") for quantile in ("p50", "p90", "p99"))
_GAINS = ("ttft_p50_ms", "requests_per_s")
_INTERVALS = {name: f"{name.removesuffix('_ms')}_gain" for name in _GAINS}
_WHERE = "Where the time goes, and memory"
_DETAILS = {
    "Latency": (*_LATENCIES, "ttft_first_p50_ms", "ttft_later_p50_ms"),
    "Throughput": (
        *("requests_per_s", "input_tokens_per_s", "output_tokens_per_s", "duration_s", "num_rounds", "num_failed"),
    ),
    "Gains over the unpruned server: medians of the rounds' ratios, and their 95% intervals": tuple(
        name + end for name in _INTERVALS.values() for end in ("", "_low", "_high")
    ),
    _WHERE: (
        *(*STAGES, "images_encoded_per_request", "image_tokens_in", "image_tokens_kept"),
        *("kv_tokens_per_request", "peak_memory_bytes", "max_requests_at_once"),
    ),
}
_EXPECTED = (*_LATENCIES, *_DETAILS["Throughput"][:3], *_DETAILS[_WHERE])
_TEXTS = ("model", "images", "prefix cache", "budget")


def serve_part(rows: pd.DataFrame) -> Part:
    """Returns the section of one machine's rows, the newest of each case."""
    found = records(newest(pd.DataFrame(serve_lines(rows), dtype=object)))
    shown = _with_flags_apart(_in_order(found))

    def draw() -> Iterable[Any]:
        from mmtok_bench.report.serve_plots import plots_of_model

        for model, lines in grouped(found, "model").items():
            yield from plots_of_model(model, lines)

    return Part(
        title="Serving",
        headline=_headline(shown),
        sentences=tuple(_sentences(shown)),
        tables=(_gains(shown), *_details(shown)),
        draw=draw,
    )


def serve_lines(rows: pd.DataFrame) -> list[Line]:
    """Returns the rows of served models with labels and with the rows that they are compared with.

    Added keys: `variant`, "unpruned" for a server without the plugin, "downsample" for a smaller image, "other" for
    another method, "mmtok" otherwise; `series`, the method and the encoder scale in words; `label`, method and budget;
    `tokens` of an image that the language model reads, None if not measured; `load`, requests at once; `pixels`;
    `vs_unpruned` and `vs_downsampled`, the newest rows of the same run whose case differs only in budget and method:
    without the plugin, and with the image made smaller to as many tokens. Texts and images count as equal if their
    tokens differ by at most a tenth. None if there is no such row.
    """
    lines = [_named(line) for line in records(rows)]
    workloads = grouped(lines, "workload")
    for line in lines:
        alike = [other for other in workloads[line["workload"]] if have_like_texts(line, other)]
        unpruned = [other for other in alike if other["variant"] == "unpruned"]
        line["vs_unpruned"] = max(unpruned, key=lambda other: other["time"], default=None)
        apart = {
            id(other): abs(other["tokens"] - line["tokens"]) / line["tokens"]
            for other in alike
            if other["variant"] == "downsample" and other["tokens"] is not None and line["tokens"]
        }
        least = min(apart.values(), default=1.0)
        nearest = [other for other in alike if apart.get(id(other)) == least <= _EQUAL_TOKENS]
        line["vs_downsampled"] = max(nearest, key=lambda other: other["time"], default=None)
    return lines


def _named(line: Line) -> Line:
    case, metrics = line["case"], line["metrics"]
    tokens = metrics.get("image_tokens_kept", metrics.get("image_tokens_in"))
    budget = str(case.get("budget", ""))
    mixed = None if budget in ("", "off") else MixedBudget.parse(budget)
    method = case.get("method", "mmtok")
    if method == "downsample":
        variant, label = "downsample", "downsampled" if tokens is None else f"downsampled to {tokens:.0f}"
    elif method in ("none", "mmtok"):
        variant, label = ("unpruned", "unpruned") if budget == "off" else ("mmtok", f"MMTok {budget}")
    else:
        variant, label = "other", f"{method} {budget}"
    series = {"unpruned": "unpruned", "mmtok": "MMTok", "downsample": "downsampled", "other": str(method)}[variant]
    if mixed is not None and mixed.encoder_scale < 1:
        series += f" at scale {mixed.encoder_scale:g}"
    px = str(case.get("image_px", ""))
    width, _, height = px.partition("x")
    pixels = int(width) * int(height) if width.isdecimal() and height.isdecimal() else 0
    same = sorted((name, value) for name, value in case.items() if name not in _VARIED)
    return {
        **line,
        **{
            "variant": variant,
            "series": series,
            "label": label,
            "tokens": tokens,
            "budget": budget,
            "px": px,
            "pixels": pixels,
        },
        **{"model": str(case.get("model", "")), "load": int(case.get("concurrency", 1))},
        "workload": json.dumps([line["run"], same]),
    }


def have_like_texts(line: Line, other: Line) -> bool:
    """Returns whether the requests' texts have equally many tokens, within a tenth."""
    tokens, others = (int(each["case"].get("text_tokens", 0)) for each in (line, other))
    return abs(tokens - others) <= _EQUAL_TOKENS * max(tokens, others)


def exceeds_its_whole(line: Line) -> bool:
    """Returns whether the sum of the parts of the time to first token, which are means, exceeds its median."""
    metrics = line["metrics"]
    return "ttft_p50_ms" in metrics and sum(metrics.get(name, 0) for name in STAGES) > metrics["ttft_p50_ms"]


def phases_ms(line: Line) -> dict[str, float]:
    """Returns the parts of the time to first token; empty if they were not measured or exceed it."""
    metrics = line["metrics"]
    parts = {metric(name).label.removesuffix(", ms"): metrics[name] for name in STAGES if name in metrics}
    if not parts or "ttft_p50_ms" not in metrics or exceeds_its_whole(line):
        return {}
    return {**parts, "rest of TTFT": metrics["ttft_p50_ms"] - sum(parts.values())}


def bound_by(line: Line) -> str:
    """Returns the stage that takes most of the time to first token, and its share; empty if it is not known."""
    parts = phases_ms(line)
    if not parts:
        return ""
    stage = max(parts, key=lambda name: parts[name])
    return f"{stage}, {100 * parts[stage] / sum(parts.values()):.0f}%"


def _in_order(lines: Sequence[Line]) -> list[Line]:
    """Returns the rows sorted by model, image, load and tokens read."""
    models = list(dict.fromkeys(line["model"] for line in lines))
    return sorted(
        lines,
        key=lambda line: (
            *(models.index(line["model"]), -line["pixels"], line["load"]),
            *(VARIANTS.index(line["variant"]), -(line["tokens"] or 0)),
        ),
    )


def _headline(shown: Sequence[Line]) -> Table | None:
    """Returns a table of each model's largest image at the least and the most load: photographs, no prefix cache."""
    pruned = [line for line in shown if line["variant"] == "mmtok" and line["budget"] != "all"]
    for key, value in (("image_kind", "photograph"), ("prefix_cache", "off")):
        pruned = [line for line in pruned if line["case"].get(key) == value] or pruned
    if not pruned:
        return None
    loads = [line["load"] for line in pruned]
    pruned = [line for line in pruned if line["load"] in (min(loads), max(loads))]
    largest = {model: max(line["pixels"] for line in lines) for model, lines in grouped(pruned, "model").items()}
    pruned = [line for line in pruned if line["pixels"] == largest[line["model"]]]
    pruned.sort(key=lambda line: (list(largest).index(line["model"]), line["load"]))
    # The ratios come first: a narrow screen shows them without scrolling.
    columns = (
        *("model", "budget", "at once", *(heading for name in _GAINS for heading in _gain_headings(name)[1:])),
        *(*(metric(name).label for name in _GAINS), "image tokens", "image, px"),
    )
    lines = []
    for line in pruned:
        cells = [_gain_cells(line, name) for name in _GAINS]
        ratios = [ratio for _, *pair in cells for ratio in pair]
        values = [value for value, *_ in cells]
        lines.append((line["model"], line["budget"], str(line["load"]), *ratios, *values, _tokens(line), line["px"]))
    return Table("A served model", columns, tuple(lines), num_texts=2).without_empty_columns()


def _gain_headings(name: str) -> tuple[str, str, str]:
    label = metric(name).label
    short = label.partition(",")[0].removesuffix(" p50")
    return label, f"{short} vs unpruned", f"{short} vs downsampled"


def _gain_cells(line: Line, name: str) -> tuple[str, str, str]:
    """Returns a metric as reference → value, and its comparisons with the unpruned and the downsampled server."""
    value = line["metrics"].get(name)
    unpruned, downsampled = (
        None if reference is None else reference["metrics"].get(name)
        for reference in (line["vs_unpruned"], line["vs_downsampled"])
    )
    shown = format_value(name, value)
    if shown and unpruned is not None:
        shown = f"{format_value(name, unpruned)} → {shown}"
    return shown, compare(name, value, unpruned), compare(name, value, downsampled)


def _interval(line: Line, name: str) -> str:
    """Returns the 95% interval of the rounds' ratios to the unpruned server; empty if there was one round."""
    ends = [line["metrics"].get(f"{_INTERVALS[name]}_{end}") for end in ("low", "high")]
    return "" if None in ends else f"{ends[0]:.2f} to {ends[1]:.2f}x"


def _gains(shown: Sequence[Line]) -> Table:
    extra = _extra_keys(shown)[0]
    lines = []
    for line in shown:
        cells: list[str] = []
        for name in _GAINS:
            value, unpruned, downsampled = _gain_cells(line, name)
            cells += [
                value.rpartition(" ")[2],
                "" if line["variant"] == "unpruned" else unpruned,
                _interval(line, name),
                downsampled if line["variant"] in ("mmtok", "other") else "",
            ]
        lines.append((*_case_cells(line, extra), str(line["load"]), _tokens(line), *cells))
    texts = (*_TEXTS, *map(_spoken, extra))
    headings = []
    for name in _GAINS:
        value, unpruned, downsampled = _gain_headings(name)
        headings += [value, unpruned, f"{unpruned}, 95% of rounds", downsampled]
    columns = (*texts, "at once", "image tokens", *headings)
    return Table("What a budget gains", columns, tuple(lines), num_texts=len(texts)).without_empty_columns()


def _details(shown: Sequence[Line]) -> list[Table]:
    known = [name for names in _DETAILS.values() for name in names]
    found = list(dict.fromkeys(name for line in shown for name in line["metrics"]))
    extra = _extra_keys(shown)[0]
    texts = (*_TEXTS, *map(_spoken, extra))
    tables = []
    for title, names in {**_DETAILS, "Other figures": [name for name in found if name not in known]}.items():
        if set(names) & set(found):
            bound = ("bound by",) if title == _WHERE else ()
            columns = (*texts, *bound, "at once", *(metric(name).label for name in names))
            lines = tuple(
                (
                    *(*_case_cells(line, extra), *(bound_by(line) for _ in bound), str(line["load"])),
                    *(format_value(name, line["metrics"].get(name)) for name in names),
                )
                for line in shown
            )
            table = Table(title, columns, lines, num_texts=len(texts) + len(bound), is_detail=True)
            tables.append(table.without_empty_columns())
    return tables


def _case_cells(line: Line, extra: Sequence[str]) -> tuple[str, ...]:
    case = line["case"]
    images = f"{case.get('image_kind', '')} {line['px']}".strip()
    others = (str(case.get(key, "")) for key in extra)
    return line["model"], images, str(case.get("prefix_cache", "")), line["label"], *others


def _with_flags_apart(lines: Sequence[Line]) -> list[Line]:
    """Returns the rows with the flags that all servers share in a key of their own: a column shows the others."""
    flags = [re.split(r"\s+(?=--)", str(line["case"].get("server_arguments", ""))) for line in lines]
    shared = [flag for flag in flags[0] if all(flag in others for others in flags)]
    if not shared or all(each == shared for each in flags):
        return list(lines)
    return [
        {
            **line,
            "case": {
                **line["case"],
                "server_arguments": " ".join(flag for flag in own if flag not in shared),
                "server_arguments_of_all": " ".join(shared),
            },
        }
        for line, own in zip(lines, flags, strict=True)
    ]


def _extra_keys(lines: Sequence[Line]) -> tuple[list[str], dict[str, Any]]:
    """Returns keys without a column: those whose values differ between rows, and the values of the other keys."""
    cases = [line["case"] for line in lines]
    keys = dict.fromkeys(key for case in cases for key in case if key not in SHOWN_KEYS)
    varied = [key for key in keys if len({case.get(key) for case in cases}) > 1]
    return varied, {key: cases[0][key] for key in keys if key not in varied}


def _spoken(key: str) -> str:
    return key.replace("_", " ")


def _tokens(line: Line) -> str:
    kept = line["tokens"]
    before = line["metrics"].get("image_tokens_in", kept)
    shown = format_value("image_tokens_kept", kept)
    return shown if before == kept else f"{format_value('image_tokens_in', before)} → {shown}"


def _sentences(shown: Sequence[Line]) -> list[str]:
    sentences = [sentence for lines in grouped(shown, "run").values() for sentence in break_even(lines)]
    constant = _extra_keys(shown)[1]
    if constant:
        sentences.append(f"In every row: {in_words([f'{_spoken(key)} {value}' for key, value in constant.items()])}.")
    if any(line["case"].get("weights") == "dummy" for line in shown):
        sentences.append("Dummy weights are random: times are those of trained weights, but answers are meaningless.")
    failed = [f"{line['label']} at {line['load']} at once" for line in shown if line["metrics"].get("num_failed")]
    if failed:
        sentences.append(f"Requests failed in {in_words(failed)}: the figures are of the answered requests.")
    quiet = min(line["load"] for line in shown)
    odd = [f"{line['label']} of {line['px']}" for line in shown if line["load"] == quiet and exceeds_its_whole(line)]
    if odd:
        cases = in_words(list(dict.fromkeys(odd)))
        sentences.append(f"The TTFT is not split into parts, since their means exceed its median: {cases}.")
    pruned = [line for line in shown if line["variant"] == "mmtok"]
    if pruned and not any(line["vs_unpruned"] for line in pruned):
        sentences.append("Not measured in the same run: the unpruned server. So there is no ratio to it.")
    if pruned and not any(line["vs_downsampled"] for line in pruned):
        sentences.append("Not measured in the same run: images downsampled to equal tokens. So there is no such ratio.")
    absent = [metric(name).label for name in _EXPECTED if not any(name in line["metrics"] for line in shown)]
    if absent:
        sentences.append(f"Not measured: {in_words([label.removesuffix(', ms') for label in absent])}.")
    return sentences


def break_even(lines: Iterable[Line]) -> list[str]:
    """Returns a sentence for each model, prefix cache and budget: where pruning pays, and otherwise which flag to set.

    Pruning pays if neither the median time to first token nor the requests per second are worse, and one of them is
    better. The flag's number is the smallest measured image from which on pruning pays at every load; the true limit
    is between it and the next smaller measured image. Rows without these metrics, or without an unpruned row, are left
    out.
    """
    needed = {*_GAINS, "image_tokens_in"}
    groups: dict[str, list[tuple[int, int, float, float]]] = {}
    for line in lines:
        base, case = line["vs_unpruned"], line["case"]
        is_told = base is not None and line["metrics"].keys() >= needed and base["metrics"].keys() >= set(_GAINS)
        if case.get("method") == "mmtok" and is_told:
            name = f"{line['model']}, prefix cache {case.get('prefix_cache', '')}, budget {line['budget']}"
            if case.get("questions_per_image", 1) != 1:
                name += f", {case['questions_per_image']} questions per image"
            ttft = base["metrics"]["ttft_p50_ms"] / line["metrics"]["ttft_p50_ms"]
            throughput = line["metrics"]["requests_per_s"] / base["metrics"]["requests_per_s"]
            groups.setdefault(name, []).append(
                (int(line["metrics"]["image_tokens_in"]), line["load"], ttft, throughput)
            )
    return [f"{name}: {_break_even_sentence(gains)}" for name, gains in groups.items()]


def _break_even_sentence(gains: Sequence[tuple[int, int, float, float]]) -> str:
    """Returns where a budget pays; `gains` are image tokens, requests at once and the two ratios of each row."""
    losses = [gain for gain in gains if min(gain[2:]) < 1 or max(gain[2:]) <= 1]
    tokens, loads = {gain[0] for gain in gains}, {gain[1] for gain in gains}
    measured = f"{_range(tokens)} image tokens, concurrency {_range(loads)}"
    if not losses:
        return f"it paid everywhere measured ({measured})."
    worst_tokens, worst_load, ttft, throughput = min(losses, key=lambda gain: min(gain[2:]))
    example = (
        f"the worst is {worst_tokens} image tokens at concurrency {worst_load}: time to first token "
        f"{ttft:.2f}x as good, requests per second {throughput:.2f}x"
    )
    if len(losses) == len(gains):
        return f"it paid nowhere measured ({measured}); {example}. Serve this without a budget."
    largest_loss = max(gain[0] for gain in losses)
    larger = [each for each in tokens if each > largest_loss]
    if larger:
        return (
            f"below {min(larger)} image tokens it does not pay at every load measured; {example}. "
            f"Set --mmtok-min-tokens-in {min(larger)}."
        )
    lost_at = ", ".join(map(str, sorted({gain[1] for gain in losses})))
    return (
        f"it does not pay at concurrency {lost_at} with the largest images measured "
        f"({largest_loss} tokens), so no --mmtok-min-tokens-in helps there; {example}."
    )


def _range(numbers: set[int]) -> str:
    return f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"
