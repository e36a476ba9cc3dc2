"""Number of tokens that an exported file keeps."""

from __future__ import annotations

from fractions import Fraction

from mmtok_deploy.budget import Budget
from mmtok_deploy.dim_range import DimRange

__all__ = ["num_kept", "share_of"]


def num_kept(budget: Budget, num_tokens: DimRange) -> int:
    """Returns K, the largest number of kept tokens; for a share, that of the largest image.

    Args:
        budget: A count or a share.
        num_tokens: N. A count is not compared with it here, but in SelectionSpec.

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
