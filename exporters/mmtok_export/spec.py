"""What a selection graph computes: its sizes, dtypes, constants and form. Nothing slow is imported for it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mmtok_deploy.budget import Budget
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.dim_range import DimRange

__all__ = ["DTYPES", "FORMS", "FeatureDtype", "Form", "SelectionSpec", "num_kept", "share_of"]

Form = Literal["loop", "unrolled", "lazy"]
"""How the graph makes picks: all gains for each, in a Loop or without one; or only gains that may be the largest."""
FORMS: tuple[Form, ...] = ("lazy", "loop", "unrolled")

FeatureDtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[FeatureDtype, ...] = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class SelectionSpec:
    """Sizes, dtypes and constants of a selection graph.

    Args:
        budget: K, the number of kept tokens; the largest number if the graph takes a budget or keeps a share. An image
            of fewer tokens keeps all of them.
        num_tokens: N, vision tokens.
        num_words: M, rows of text, including padding.
        batch: B, images.
        vision_width: D, the width of vision tokens and text.
        keys_width: d, the width of the features before the projector.
        dtype: The dtype of vision and text.
        keys_dtype: The dtype of keys: float32 for means over several features, whatever the model's dtype.
        config: Temperatures, weight, coverage.
        form: How the picks are made.
        takes_budget: Whether the graph has an input `budget`, the number of tokens to keep of each image.
        share: The share of the image's tokens to keep, instead of a number.

    Raises:
        ValueError: The budget is above the largest number of tokens, a size is below 1, or the form makes a fixed
            number of picks and the number is known only at run time.
    """

    budget: int
    num_tokens: DimRange
    num_words: DimRange
    batch: DimRange
    vision_width: int
    keys_width: int
    dtype: FeatureDtype
    keys_dtype: FeatureDtype
    config: SelectionConfig
    form: Form
    takes_budget: bool = False
    share: Fraction | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "vision_width", "keys_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.budget > self.num_tokens.maximum:
            raise ValueError(
                f"a graph that keeps {self.budget} tokens needs images of at least as many, got {self.num_tokens}: "
                "lower the budget or raise the largest number of tokens"
            )
        for dtype in (self.dtype, self.keys_dtype):
            if dtype not in DTYPES:
                raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
        if self.form not in FORMS:
            raise ValueError(f"form is one of {', '.join(FORMS)}, got {self.form!r}")
        if self.form == "unrolled" and self.is_told_at_run_time:
            raise ValueError("the unrolled form writes out a fixed number of picks: choose --form lazy or loop")

    @property
    def is_told_at_run_time(self) -> bool:
        """Whether the number of kept tokens is known only when the graph runs."""
        return self.takes_budget or self.share is not None


def num_kept(budget: Budget, num_tokens: DimRange) -> int:
    """Returns K, the largest number of kept tokens; for a share, that of the largest image.

    Args:
        budget: A count or a share.
        num_tokens: N. A count is not compared with it here, but in `SelectionSpec`.

    Raises:
        ValueError: The budget is all tokens.
    """
    if budget.tokens is not None:
        return budget.tokens
    if budget.is_all:
        raise ValueError("a budget of all tokens needs no selection: name a count or a share")
    return budget.num_kept(num_tokens.maximum)


def share_of(budget: Budget, num_tokens: DimRange, *, is_input: bool) -> Fraction | None:
    """Returns the share of N that the graph must compute; None if K is a number or an input."""
    return None if num_tokens.is_fixed or is_input else budget.ratio
