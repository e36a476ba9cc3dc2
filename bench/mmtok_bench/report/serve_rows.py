"""Rows of a served model: which are the references of a row, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from mmtok_bench.report.gather import Measurement, Run
from mmtok_bench.results import CaseValue, ResultRow

__all__ = [
    "SHOWN_KEYS",
    "References",
    "Variant",
    "have_like_texts",
    "image_px",
    "label_of",
    "load_of",
    "model_of",
    "pixels_of",
    "tokens_read",
    "variant_of",
]

Variant = Literal["unpruned", "mmtok", "downsample"]

SHOWN_KEYS = ("model", "image_kind", "image_px", "prefix_cache", "budget", "method", "concurrency")
"""What of a case has a column of its own; of the other keys, those that differ between rows get one."""

_VARIED = ("budget", "method", "text_tokens")
_EQUAL_TOKENS = 0.1
"""Images are of equal tokens within this share, for image processors round a side to whole patches; texts likewise,
for their tokens are counted on the requests sent.
"""


class References:
    """What a row is held against: rows of the same run whose cases differ in budget and method alone.

    Texts are the same within a tenth of their tokens.
    """

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self._siblings: dict[tuple[Run, frozenset[tuple[str, CaseValue]]], list[ResultRow]] = {}
        for each in measurements:
            self._siblings.setdefault(_key(each), []).append(each.row)

    def unpruned(self, measurement: Measurement) -> ResultRow | None:
        """Returns the newest row of the server without the plugin."""
        return _last([row for row in self._siblings_of(measurement) if variant_of(row) == "unpruned"])

    def downsampled(self, measurement: Measurement) -> ResultRow | None:
        """Returns the row of the image made smaller until it has as many tokens as this row keeps, within a tenth."""
        tokens = tokens_read(measurement.row)
        if tokens is None:
            return None
        close = []
        for row in self._siblings_of(measurement):
            others = tokens_read(row)
            if variant_of(row) == "downsample" and others is not None:
                difference = abs(others - tokens) / tokens
                if difference <= _EQUAL_TOKENS:
                    close.append((difference, row))
        least = min((difference for difference, _ in close), default=0.0)
        return _last([row for difference, row in close if difference == least])

    def _siblings_of(self, measurement: Measurement) -> list[ResultRow]:
        return [row for row in self._siblings.get(_key(measurement), []) if have_like_texts(row, measurement.row)]


def have_like_texts(row: ResultRow, other: ResultRow) -> bool:
    """Returns whether the requests' texts are of equal tokens, within a tenth."""
    tokens, others = (int(each.case.get("text_tokens", 0)) for each in (row, other))
    return abs(tokens - others) <= _EQUAL_TOKENS * max(tokens, others)


def variant_of(row: ResultRow) -> Variant:
    """Returns which of three a row is: a server without the plugin, the same with smaller images, or MMTok's."""
    if row.case.get("method") == "downsample":
        return "downsample"
    return "unpruned" if row.case.get("budget") == "off" else "mmtok"


def label_of(row: ResultRow) -> str:
    """Returns what a reader calls the row's budget and method."""
    budget = row.case.get("budget", "")
    match variant_of(row):
        case "unpruned":
            return "unpruned"
        case "downsample":
            tokens = tokens_read(row)
            return "downsampled" if tokens is None else f"downsampled to {tokens:.0f}"
    return f"MMTok {budget}"


def tokens_read(row: ResultRow) -> float | None:
    """Returns how many tokens of an image the language model reads; None if it was not measured."""
    return row.metrics.get("image_tokens_kept", row.metrics.get("image_tokens_in"))


def model_of(row: ResultRow) -> str:
    """Returns what the model is called."""
    return str(row.case.get("model", ""))


def image_px(row: ResultRow) -> str:
    """Returns the image's size as text, such as "1008x672"."""
    return str(row.case.get("image_px", ""))


def pixels_of(row: ResultRow) -> int:
    """Returns the pixels of the row's image, for putting sizes in order; 0 where its size is not written as W x H."""
    width, _, height = image_px(row).partition("x")
    return int(width) * int(height) if width.isdecimal() and height.isdecimal() else 0


def load_of(row: ResultRow) -> int:
    """Returns how many requests were under way at once."""
    return int(row.case.get("concurrency", 1))


def _key(measurement: Measurement) -> tuple[Run, frozenset[tuple[str, CaseValue]]]:
    case = measurement.row.case
    return measurement.run, frozenset((name, value) for name, value in case.items() if name not in _VARIED)


def _last(rows: Sequence[ResultRow]) -> ResultRow | None:
    return max(rows, key=lambda row: row.time, default=None)
