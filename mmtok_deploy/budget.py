"""How many vision tokens an image may keep."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction

from mmtok_deploy.shown import shown

__all__ = ["Budget", "tokens_per_tile"]

_ACCEPTED = (
    "a whole number of tokens (64), a percentage up to 100% (10%), a fraction between 0 and 1 (0.1), "
    "or 'all' for no pruning"
)
# Python reads no number of more than 4300 digits, and says so in other words. A float has 327 at most.
_MAX_LETTERS = 400
# A float's exponent has three digits at most; a longer one would be expanded digit by digit.
_NUMBER = r"([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]{1,3})?"


@dataclass(frozen=True, slots=True)
class Budget:
    """The number of vision tokens to keep: a count, a share of the tokens there are, or all of them.

    Exactly one of `tokens` and `ratio` is set, or neither for "all".

    Args:
        tokens: Tokens kept, at least 1.
        ratio: Share kept, above 0 and at most 1. Exact (a fraction, not a float), so that 29% of 100 tokens is 29;
            equal to the authors' `int(ratio * N)` wherever that product is not rounded across an integer.
        minimum: Never keep fewer tokens than this (or than there are), at least 1.

    Raises:
        ValueError: A number of the wrong kind or out of range, or both `tokens` and `ratio`.
    """

    tokens: int | None = None
    ratio: Fraction | None = None
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.tokens is not None and self.ratio is not None:
            raise ValueError("a budget is a count or a ratio, not both")
        if self.tokens is not None and not _is_count(self.tokens):
            raise ValueError(f"a budget keeps a whole number of at least 1 token, got {self.tokens!r}")
        if self.ratio is not None and not (isinstance(self.ratio, Fraction) and 0 < self.ratio <= 1):
            raise ValueError(f"a budget's ratio is a Fraction above 0 and at most 1, got {self.ratio!r}")
        if not _is_count(self.minimum):
            raise ValueError(f"a budget's minimum is a whole number of at least 1 token, got {self.minimum!r}")

    @classmethod
    def parse(cls, value: Budget | str | int | float, *, minimum: int = 1) -> Budget:
        """Returns the budget that a flag, a JSON field or a Python argument names.

        Args:
            value: `64`, `"64"`, `"10%"`, `0.1`, `"0.1"`, `"all"`, or a Budget, which is returned as it is.
            minimum: Floor on the tokens kept of an image.

        Raises:
            ValueError: Anything else (0, negative numbers, 150%, 1.5, "ten", and "auto", which `AutoBudget` is); the
                message lists what is accepted.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"budget {shown(value)} is not understood: expected {_ACCEPTED}")
        is_long = isinstance(value, str) and len(value) > _MAX_LETTERS
        if is_long or (isinstance(value, int) and value > 10**_MAX_LETTERS):
            raise ValueError(f"a budget of more than {_MAX_LETTERS} letters is not understood: expected {_ACCEPTED}")
        text = str(value).strip().lower()
        if text == "all":
            return cls(minimum=minimum)
        if text == "auto":
            raise ValueError(
                f"budget 'auto' is a server's, which chooses a budget for each question; expected {_ACCEPTED}"
            )
        if re.fullmatch(r"[0-9]+", text) and int(text) > 0:
            return cls(tokens=int(text), minimum=minimum)
        if re.fullmatch(f"{_NUMBER}%", text) and 0 < Fraction(text[:-1]) <= 100:
            return cls(ratio=Fraction(text[:-1]) / 100, minimum=minimum)
        if re.fullmatch(_NUMBER, text) and 0 < Fraction(text) < 1:
            return cls(ratio=Fraction(text), minimum=minimum)
        if re.fullmatch(_NUMBER, text) and Fraction(text) == 1:
            # JavaScript writes the number 1.0 as 1, which is one token.
            raise ValueError(
                f'budget {shown(value)} is not understood: it may be every token or one, write "100%" or 1; '
                f"expected {_ACCEPTED}"
            )
        raise ValueError(f"budget {shown(value)} is not understood: expected {_ACCEPTED}")

    @property
    def is_all(self) -> bool:
        """True if nothing is ever pruned."""
        return self.tokens is None and (self.ratio is None or self.ratio == 1)

    def num_kept(self, num_tokens: int) -> int:
        """Returns how many of `num_tokens` tokens are kept: at least `minimum`, at most `num_tokens`."""
        if num_tokens < 0:
            raise ValueError(f"num_tokens is not negative, got {num_tokens}")
        if self.is_all:
            return num_tokens
        wanted = self.tokens if self.ratio is None else int(self.ratio * num_tokens)
        assert wanted is not None
        return min(max(wanted, self.minimum), num_tokens)

    def __str__(self) -> str:
        if self.tokens is not None:
            return str(self.tokens)
        if self.is_all:
            return "all"
        assert self.ratio is not None
        percent = self.ratio * 100
        # Decimal, so that what was parsed (a float has 17 digits at most) is written as it was.
        return f"{Context(prec=28).divide(Decimal(percent.numerator), Decimal(percent.denominator))}%"


def tokens_per_tile(budget: Budget, tile_tokens: int, num_tiles: int, max_tiles: int) -> int:
    """Returns how many tokens each tile of an image of LLaVA-NeXT keeps.

    A count is what an image of the most tiles keeps in all (160 is 32 of each of 5 tiles), as in the paper's "up to
    160"; smaller images keep as many per tile. A ratio applies to each tile.

    Args:
        budget: The request's budget; its minimum applies to the whole image.
        tile_tokens: Tokens of a tile.
        num_tiles: The image's tiles, the base tile included.
        max_tiles: The most tiles that an image of this model has.
    """
    if budget.is_all:
        return tile_tokens
    if budget.tokens is not None:
        kept = max(1, budget.tokens // max_tiles)
    else:
        kept = Budget(ratio=budget.ratio).num_kept(tile_tokens)
    return min(tile_tokens, max(kept, math.ceil(budget.minimum / num_tiles)))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
