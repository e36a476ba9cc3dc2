"""Names of metrics, formats of their values, and comparison of two values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["Metric", "compare", "format_value", "metric", "sort_key", "tone"]

Kind = Literal["time", "rate", "bytes", "count", "capacity", "share", "ratio"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's label, with the unit in which `format_value` writes it, and its kind of quantity."""

    label: str
    kind: Kind | None


_METRICS = {
    "requests_per_s": Metric("requests/s", "rate"),
    "input_tokens_per_s": Metric("input tokens/s", "rate"),
    "output_tokens_per_s": Metric("output tokens/s", "rate"),
    "image_decode_ms": Metric("image decoding, ms", "time"),
    "image_preprocess_ms": Metric("image preprocessing, ms", "time"),
    "image_hash_ms": Metric("image hash, ms", "time"),
    "image_transport_ms": Metric("transport, ms", "time"),
    "vision_encoder_ms": Metric("vision encoder, ms", "time"),
    "selection_ms": Metric("selection, ms", "time"),
    "language_prefill_ms": Metric("language prefill, ms", "time"),
    "image_tokens_in": Metric("image tokens in", None),
    "image_tokens_kept": Metric("image tokens kept", None),
    "kv_tokens_per_request": Metric("KV tokens per request", "count"),
    "peak_memory_bytes": Metric("peak memory, GiB", "bytes"),
    "max_requests_at_once": Metric("requests that fit at once", "capacity"),
    "images_encoded_per_request": Metric("images encoded per request", "count"),
    "ttft_p50_gain": Metric("TTFT p50 gain, x", "ratio"),
    "requests_per_s_gain": Metric("requests/s gain, x", "ratio"),
    "num_rounds": Metric("rounds", None),
    "num_failed": Metric("failed requests", "count"),
    "duration_s": Metric("duration, s", None),
    "accuracy": Metric("accuracy, %", "share"),
    "share": Metric("of the unpruned score, %", "share"),
    "chance": Metric("chance, %", "share"),
    "majority": Metric("commonest answer, %", "share"),
    "tokens_kept": Metric("tokens kept", None),
    "num_questions": Metric("questions", None),
}
_PHASES = {"ttft": "TTFT", "itl": "inter-token", "e2e": "end to end", "latency": "latency"}
_WORDS = {
    "time": ("faster", "slower"),
    "bytes": ("smaller", "larger"),
    "count": ("smaller", "larger"),
    "rate": ("higher", "lower"),
    "capacity": ("higher", "lower"),
    "ratio": ("higher", "lower"),
}
"""Kind -> the words for the better and for the worse of two values; no word is both."""
_MORE_IS_BETTER = ("rate", "capacity", "ratio")
_NEWS = 1.05
_GIB = 2**30


def metric(name: str) -> Metric:
    """Returns a metric's label and kind, also of the ends of its interval; an unknown metric's label is its name."""
    if name in _METRICS:
        return _METRICS[name]
    base, _, end = name.rpartition("_")
    if base in _METRICS and end in ("low", "high"):
        label, _, unit = _METRICS[base].label.rpartition(", ")
        return Metric(f"{label}, {end} end, {unit}", _METRICS[base].kind)
    phase, _, rest = name.partition("_")
    if phase in _PHASES and rest.endswith("_ms"):
        return Metric(f"{_PHASES[phase]} {rest.removesuffix('_ms')}, ms", "time")
    return Metric(name.replace("_", " "), "time" if name.endswith("_ms") else None)


def format_value(name: str, value: float | None) -> str:
    """Returns the value in the unit of the metric's label, with about three digits; empty for None."""
    if value is None:
        return ""
    kind = metric(name).kind
    if kind == "bytes":
        return _digits(value / _GIB)
    if kind == "share":
        return f"{100 * value:.1f}"
    if kind in ("time", "rate"):
        return _digits(value)
    if kind == "ratio":
        return f"{value:.2f}"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def compare(name: str, value: float | None, reference: float | None) -> str:
    """Returns a comparison of a value with a reference, such as "2.60x faster"; empty if they cannot be compared.

    The ratio is never below 1; the word gives the direction. Shares are compared in percentage points.
    """
    kind = metric(name).kind
    if value is None or reference is None or kind is None:
        return ""
    if kind == "share":
        return f"{100 * (value - reference):+.1f} points"
    if value <= 0 or reference <= 0:
        return ""
    ratio = value / reference if kind in _MORE_IS_BETTER else reference / value
    better, worse = _WORDS[kind]
    shown = f"{max(ratio, 1 / ratio):.2f}"
    return "the same" if shown == "1.00" else f"{shown}x {better if ratio > 1 else worse}"


def tone(comparison: str) -> Literal["gain", "loss", ""]:
    """Returns whether a result of `compare` is a gain or a loss; a ratio below 1.05 is neither: it may be noise."""
    first, _, last = comparison.rpartition(" ")
    if first.endswith("x") and float(first.removesuffix("x").replace(",", "")) < _NEWS:
        return ""
    if last == "points":
        return "loss" if comparison.startswith("-") else "gain"
    if any(last == better for better, _ in _WORDS.values()):
        return "gain"
    return "loss" if any(last == worse for _, worse in _WORDS.values()) else ""


def sort_key(cell: str) -> float | None:
    """Returns the number to sort a cell by: the last of "864 → 86", the gain of a ratio, None without a number."""
    last = cell.rpartition("→")[2].strip()
    if last == "the same":
        return 1.0
    found = re.match(r"[+-]?[\d,]*\.?\d+", last)
    if found is None:
        return None
    number = float(found[0].replace(",", ""))
    is_ratio = last[found.end() :].startswith("x ")
    return 1 / number if is_ratio and any(last.endswith(f" {worse}") for _, worse in _WORDS.values()) else number


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
