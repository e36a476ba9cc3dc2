"""How large one dimension of an exported graph may be."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["DimRange"]


@dataclass(frozen=True, slots=True)
class DimRange:
    """The sizes that one dimension of a graph may have; equal bounds are a fixed size.

    Args:
        minimum: Smallest size, at least 1.
        optimum: The size that an engine is tuned for.
        maximum: Largest size.

    Raises:
        ValueError: Bounds out of order, or below 1.
    """

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise ValueError(
                f"a range is MIN:MAX or MIN:OPTIMUM:MAX with 1 <= MIN <= OPTIMUM <= MAX, got "
                f"{self.minimum}:{self.optimum}:{self.maximum}"
            )

    @classmethod
    def fixed(cls, size: int) -> DimRange:
        """Returns the range of one size."""
        return cls(size, size, size)

    @classmethod
    def parse(cls, text: str) -> DimRange:
        """Returns the range that `576`, `64:4096` (tuned for 4096) or `64:1024:4096` names.

        Raises:
            ValueError: Anything else, or bounds out of order.
        """
        if not re.fullmatch(r"[0-9]+(:[0-9]+){0,2}", text):
            raise ValueError(f"a dimension is a size (576), MIN:MAX or MIN:OPTIMUM:MAX, got {text!r}")
        sizes = [int(size) for size in text.split(":")]
        return cls(sizes[0], sizes[-2] if len(sizes) == 3 else sizes[-1], sizes[-1])

    @property
    def is_fixed(self) -> bool:
        """True if the dimension has one size."""
        return self.minimum == self.maximum

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum

    def __str__(self) -> str:
        if self.is_fixed:
            return str(self.minimum)
        middle = "" if self.optimum == self.maximum else f"{self.optimum}:"
        return f"{self.minimum}:{middle}{self.maximum}"
