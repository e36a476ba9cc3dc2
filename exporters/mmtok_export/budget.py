"""How many tokens a file keeps."""

from __future__ import annotations

from fractions import Fraction

from mmtok_deploy.budget import Budget
from mmtok_deploy.dim_range import DimRange

__all__ = ["num_kept", "share_of"]


def num_kept(budget: Budget, num_tokens: DimRange) -> int:
    """Returns K, the most tokens that are kept: of a share those of the largest image.

    Args:
        budget: A count or a share.
        num_tokens: N. A count is not compared with it here: SelectionSpec does.

    Raises:
        ValueError: All tokens.
    """
    if budget.tokens is not None:
        return budget.tokens
    if budget.is_all:
        raise ValueError("a budget of all tokens needs no selection: name a count or a share")
    return budget.num_kept(num_tokens.maximum)


def share_of(budget: Budget, num_tokens: DimRange, *, is_input: bool) -> Fraction | None:
    """Returns the share that a graph itself has to take of N, None where K is a number or an input."""
    return None if num_tokens.is_fixed or is_input else budget.ratio
