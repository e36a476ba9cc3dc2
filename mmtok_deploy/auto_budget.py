"""A budget that is chosen for each image by what its question asks, and by how much of the image is blank."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from mmtok_deploy.budget import Budget

__all__ = ["SHARES", "Asked", "AutoBudget", "parse_budget", "parse_share", "what_is_asked"]

Asked = Literal["where", "whether", "count", "read", "other"]

SHARES: dict[Asked, Fraction] = {
    "where": Fraction(5, 100),
    "whether": Fraction(11, 100),
    "count": Fraction(25, 100),
    "read": Fraction(50, 100),
    # No task measures what it may need: as much as the neediest of the others.
    "other": Fraction(50, 100),
}
"""Share of an image's tokens that is kept, by what the question asks.

The smallest of 5, 11, 25 and 50% at which all pocket models keep 90% of their right answers to such questions, pages of
text among them: `mmtok pocket shares docs/measured/quality-{cpu,qwen-cpu,pages-cpu}.jsonl`.
"""

# A longer text is more than one question.
_MAX_LETTERS = 1000
_COUNTS = re.compile(r"\bhow (?:many|much)\b|\bcount(?:s|ed|ing)?\b|\bnumber of\b", re.IGNORECASE)
_READS = re.compile(
    r"\b(?:reads?|reading|texts?|writ(?:e|es|ing|ten)|says?|spell(?:s|ed|ing)?|transcri(?:be|bed|ption)|ocr|"
    r"letters?|digits?|numbers?|characters?|titles?|captions?|labels?|labell?ed|signs?|names?|dates?|prices?)\b",
    re.IGNORECASE,
)
_WHERE = re.compile(r"\W*where\b", re.IGNORECASE)
_WHETHER = re.compile(r"\W*(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would)\b", re.IGNORECASE)
_OPEN = re.compile(r"\b(?:what|which|who|whose|whom|why|how|when|where)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AutoBudget:
    """The budget "auto": each image keeps the share of `SHARES` that its question asks for, within bounds.

    An image of fewer distinct squares (`repeated_tokens.share_of_distinct`) keeps their share: what else it keeps would
    be repetitions.

    Args:
        minimum: Never keep fewer tokens than this (or than there are), at least 1.
        auto_min: The smallest share, above 0 and at most 1; None for no bound.
        auto_max: The largest share, at least `auto_min` and at most 1; None for no bound.

    Raises:
        ValueError: A bound that is no such share, or a minimum that is no such number.
    """

    minimum: int = 1
    auto_min: Fraction | None = None
    auto_max: Fraction | None = None

    def __post_init__(self) -> None:
        least, most = (Budget(ratio=share, minimum=self.minimum) for share in (self.auto_min, self.auto_max))
        if self.auto_min is not None and self.auto_max is not None and self.auto_min > self.auto_max:
            raise ValueError(f"auto_min is at most auto_max, got {least} and {most}")

    @property
    def is_all(self) -> bool:
        """True if nothing is ever pruned."""
        return self.auto_min == 1

    @property
    def largest(self) -> Budget:
        """The largest budget that is chosen."""
        return self._bounded(max(SHARES.values()))

    def of(self, asked: Asked, distinct: Fraction = Fraction(1)) -> Budget:
        """Returns the budget of an image.

        Args:
            asked: What is asked about it.
            distinct: The share of its squares that repeat no neighbour.
        """
        return self._bounded(min(SHARES[asked], distinct))

    def _bounded(self, share: Fraction) -> Budget:
        if self.auto_min is not None:
            share = max(share, self.auto_min)
        if self.auto_max is not None:
            share = min(share, self.auto_max)
        return Budget(ratio=share, minimum=self.minimum)

    def __str__(self) -> str:
        return "auto"


def parse_budget(value: Budget | str | int | float, auto: AutoBudget, *, minimum: int = 1) -> Budget | AutoBudget:
    """Returns the budget that a server's flag or a request's field names.

    Args:
        value: "auto", or what `Budget.parse` reads.
        auto: The bounds of "auto".
        minimum: Floor on the tokens kept of an image.

    Raises:
        ValueError: Anything else; the message lists what is accepted.
    """
    if isinstance(value, str) and value.strip().lower() == "auto":
        return replace(auto, minimum=minimum)
    try:
        return Budget.parse(value, minimum=minimum)
    except ValueError as error:
        raise ValueError(f"{error}; or 'auto', chosen for each image") from None


def parse_share(value: str | int | float) -> Fraction:
    """Returns a share of an image's tokens: "10%", "0.1", or "all" for 1.

    Raises:
        ValueError: Anything else, a count of tokens included.
    """
    try:
        budget = Budget.parse(value)
    except ValueError:
        budget = Budget(tokens=1)
    if budget.tokens is not None:
        raise ValueError(f"is a share of an image's tokens (10%, 0.1 or all), got {value!r:.100}")
    return Fraction(1) if budget.ratio is None else budget.ratio


def what_is_asked(question: str) -> Asked:
    """Returns what the text about an image asks for, by its English words.

    "count" and "read" by words anywhere in it. "where" and "whether" only where nothing else is asked: the text is one
    question that begins so, without another word that asks (what, which, how). Everything else is "other": another
    language, a long text, no text.

    Args:
        question: The text that guides the selection.
    """
    if len(question) > _MAX_LETTERS:
        return "other"
    if _COUNTS.search(question):
        return "count"
    if _READS.search(question):
        return "read"
    is_one = question.count("?") <= 1
    if is_one and (start := _WHERE.match(question)) and not _OPEN.search(question, start.end()):
        return "where"
    if is_one and _WHETHER.match(question) and not _OPEN.search(question):
        return "whether"
    return "other"
