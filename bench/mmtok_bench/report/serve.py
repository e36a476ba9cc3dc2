"""The section of a served model: what a budget gains against the unpruned server, and against smaller images."""

from __future__ import annotations

from collections.abc import Sequence

from mmtok_bench.report.blocks import Part, Table, in_words, without_empty_columns
from mmtok_bench.report.gather import Measurement, newest
from mmtok_bench.report.metrics import compare, format_value, metric
from mmtok_bench.report.serve_plots import exceeds_its_whole, plots_of_model
from mmtok_bench.report.serve_rows import (
    SHOWN_KEYS,
    References,
    image_px,
    label_of,
    load_of,
    model_of,
    pixels_of,
    tokens_read,
    variant_of,
)
from mmtok_bench.results import CaseValue, ResultRow
from mmtok_bench.serve.breakeven import break_even

__all__ = ["serve_part"]

_LATENCIES = tuple(f"{phase}_{quantile}_ms" for phase in ("ttft", "itl", "e2e") for quantile in ("p50", "p90", "p99"))
_DETAILS = {
    "Latency": _LATENCIES,
    "Throughput": ("requests_per_s", "input_tokens_per_s", "output_tokens_per_s", "duration_s", "num_failed"),
    "Where the time goes, and memory": (
        "vision_encoder_ms",
        "selection_ms",
        "language_prefill_ms",
        "image_tokens_in",
        "image_tokens_kept",
        "kv_tokens_per_request",
        "peak_memory_bytes",
        "max_requests_at_once",
    ),
}
_EXPECTED = (*_LATENCIES, *_DETAILS["Throughput"][:3], *_DETAILS["Where the time goes, and memory"])
_TEXTS = ("model", "images", "prefix cache", "budget")


def serve_part(measurements: Sequence[Measurement]) -> Part:
    """Returns the section of one machine's rows, the newest of each case."""
    references = References(measurements)
    found = newest(measurements)
    shown = _in_order(found)
    rows = [each.row for each in found]
    models = dict.fromkeys(map(model_of, rows))
    return Part(
        title="Serving",
        headline=_headline(shown, references),
        sentences=tuple(_sentences(shown, references)),
        plots=tuple(
            plot for model in models for plot in plots_of_model(model, [row for row in rows if model_of(row) == model])
        ),
        tables=(_gains(shown, references), *_all_details([each.row for each in shown])),
    )


def _in_order(shown: Sequence[Measurement]) -> list[Measurement]:
    """Returns the rows model by model, then by image, load and tokens read: servers are measured in turns."""
    models = list(dict.fromkeys(model_of(each.row) for each in shown))
    variants = ("unpruned", "mmtok", "downsample")
    return sorted(
        shown,
        key=lambda each: (
            models.index(model_of(each.row)),
            -pixels_of(each.row),
            load_of(each.row),
            variants.index(variant_of(each.row)),
            -(tokens_read(each.row) or 0),
        ),
    )


def _headline(shown: Sequence[Measurement], references: References) -> Table | None:
    """Returns each model's largest image at the least and the most load; as in the plots, photographs, cache off."""
    pruned = [each for each in shown if variant_of(each.row) == "mmtok" and each.row.case.get("budget") != "all"]
    for key, value in (("image_kind", "photograph"), ("prefix_cache", "off")):
        pruned = [each for each in pruned if each.row.case.get(key) == value] or pruned
    if not pruned:
        return None
    loads = [load_of(each.row) for each in pruned]
    pruned = [each for each in pruned if load_of(each.row) in (min(loads), max(loads))]
    largest = {model_of(each.row): 0 for each in pruned}
    for each in pruned:
        largest[model_of(each.row)] = max(largest[model_of(each.row)], pixels_of(each.row))
    pruned = [each for each in pruned if pixels_of(each.row) == largest[model_of(each.row)]]
    pruned.sort(key=lambda each: (list(largest).index(model_of(each.row)), load_of(each.row)))
    # The ratios first: they are what a narrow screen shows without scrolling.
    columns = (
        *("model", "budget", "at once"),
        *(heading for name in ("ttft_p50_ms", "requests_per_s") for heading in _gain_headings(name)[1:]),
        *(metric("ttft_p50_ms").label, metric("requests_per_s").label, "image tokens", "image, px"),
    )
    lines = []
    for each in pruned:
        row = each.row
        ttft_ms, *ttft_ratios = _gain_cells(each, references, "ttft_p50_ms")
        rate, *rate_ratios = _gain_cells(each, references, "requests_per_s")
        texts = (model_of(row), str(row.case.get("budget", "")), str(load_of(row)))
        lines.append((*texts, *ttft_ratios, *rate_ratios, ttft_ms, rate, _tokens(row), image_px(row)))
    return without_empty_columns(Table("A served model", columns, tuple(lines), num_texts=2))


def _gain_headings(name: str) -> tuple[str, str, str]:
    label = metric(name).label
    short = label.partition(",")[0].removesuffix(" p50")
    return label, f"{short} vs unpruned", f"{short} vs downsampled"


def _gain_cells(each: Measurement, references: References, name: str) -> tuple[str, str, str]:
    """Returns a metric as reference -> value, and how it stands against the unpruned and the downsampled server."""
    value = each.row.metrics.get(name)
    unpruned, downsampled = (
        None if row is None else row.metrics.get(name)
        for row in (references.unpruned(each), references.downsampled(each))
    )
    shown = format_value(name, value)
    if shown and unpruned is not None:
        shown = f"{format_value(name, unpruned)} → {shown}"
    return shown, compare(name, value, unpruned), compare(name, value, downsampled)


def _gains(shown: Sequence[Measurement], references: References) -> Table:
    names = ("ttft_p50_ms", "requests_per_s")
    headings = [heading for name in names for heading in _gain_headings(name)]
    extra = _extra_keys([each.row for each in shown])[0]
    lines = []
    for each in shown:
        row = each.row
        cells: list[str] = []
        for name in names:
            value, *ratios = _gain_cells(each, references, name)
            is_pruned = variant_of(row) == "mmtok"
            cells += [value.rpartition(" ")[2], ratios[0], ratios[1] if is_pruned else ""]
            if variant_of(row) == "unpruned":
                cells[-2] = ""
        lines.append((*_case_cells(row, extra), str(load_of(row)), _tokens(row), *cells))
    texts = (*_TEXTS, *map(_spoken, extra))
    columns = (*texts, "at once", "image tokens", *headings)
    return without_empty_columns(Table("What a budget gains", columns, tuple(lines), num_texts=len(texts)))


def _all_details(rows: Sequence[ResultRow]) -> list[Table]:
    known = [name for names in _DETAILS.values() for name in names]
    others = [name for name in dict.fromkeys(name for row in rows for name in row.metrics) if name not in known]
    groups = {**_DETAILS, "Other figures": tuple(others)}
    return [
        _details(rows, title, names)
        for title, names in groups.items()
        if any(n in r.metrics for n in names for r in rows)
    ]


def _details(rows: Sequence[ResultRow], title: str, names: Sequence[str]) -> Table:
    extra = _extra_keys(rows)[0]
    lines = tuple(
        (*_case_cells(row, extra), str(load_of(row)), *(format_value(name, row.metrics.get(name)) for name in names))
        for row in rows
    )
    texts = (*_TEXTS, *map(_spoken, extra))
    columns = (*texts, "at once", *(metric(name).label for name in names))
    return without_empty_columns(Table(title, columns, lines, num_texts=len(texts), is_detail=True))


def _case_cells(row: ResultRow, extra: Sequence[str]) -> tuple[str, ...]:
    images = f"{row.case.get('image_kind', '')} {image_px(row)}".strip()
    others = (str(row.case.get(key, "")) for key in extra)
    return model_of(row), images, str(row.case.get("prefix_cache", "")), label_of(row), *others


def _extra_keys(rows: Sequence[ResultRow]) -> tuple[list[str], dict[str, CaseValue]]:
    """Returns the case's other keys: those that differ between rows, and the others with their value."""
    keys = dict.fromkeys(key for row in rows for key in row.case if key not in SHOWN_KEYS)
    varied = [key for key in keys if len({row.case.get(key) for row in rows}) > 1]
    return varied, {key: rows[0].case[key] for key in keys if key not in varied}


def _spoken(key: str) -> str:
    return key.replace("_", " ")


def _tokens(row: ResultRow) -> str:
    kept = tokens_read(row)
    before = row.metrics.get("image_tokens_in", kept)
    if kept is None:
        return ""
    shown = format_value("image_tokens_kept", kept)
    return shown if before == kept else f"{format_value('image_tokens_in', before)} → {shown}"


def _sentences(shown: Sequence[Measurement], references: References) -> list[str]:
    rows = [each.row for each in shown]
    sentences = []
    for run in dict.fromkeys(each.run for each in shown):
        sentences += break_even(each.row for each in shown if each.run == run)
    constant = _extra_keys(rows)[1]
    if constant:
        parts = [f"{_spoken(key)} {value}" for key, value in constant.items()]
        sentences.append(f"In every row: {in_words(parts)}.")
    if any(row.case.get("weights") == "dummy" for row in rows):
        sentences.append("Weights called dummy are random: they take the time of trained ones, and answer nothing.")
    failed = [row for row in rows if row.metrics.get("num_failed")]
    if failed:
        cases = in_words([f"{label_of(row)} at {load_of(row)} at once" for row in failed])
        sentences.append(f"Requests failed in {cases}: those figures are of the others.")
    odd = [row for row in rows if load_of(row) == min(map(load_of, rows)) and exceeds_its_whole(row)]
    if odd:
        cases = in_words(list(dict.fromkeys(f"{label_of(row)} of {image_px(row)}" for row in odd)))
        sentences.append(f"Not split into parts, whose means exceed the median TTFT: {cases}.")
    pruned = [each for each in shown if variant_of(each.row) == "mmtok"]
    if pruned and not any(references.unpruned(each) for each in pruned):
        sentences.append("Not measured in the same run: the unpruned server. There is no ratio to it.")
    if pruned and not any(references.downsampled(each) for each in pruned):
        sentences.append("Not measured in the same run: images downsampled to equal tokens. There is no ratio to them.")
    absent = [metric(name).label for name in _EXPECTED if not any(name in row.metrics for row in rows)]
    if absent:
        sentences.append(f"Not measured: {in_words([label.removesuffix(', ms') for label in absent])}.")
    return sentences
