"""How many tokens a file keeps, which is fixed in it."""

from __future__ import annotations

from mmtok_deploy.budget import Budget
from mmtok_deploy.dim_range import DimRange

__all__ = ["num_kept"]


def num_kept(budget: Budget, num_tokens: DimRange) -> int:
    """Returns K.

    Args:
        budget: A count, or a share of a fixed number.
        num_tokens: N. A count is not compared with it here: SelectionSpec does.

    Raises:
        ValueError: All tokens, or a share of a number that is not fixed.
    """
    if budget.tokens is not None:
        return budget.tokens
    if budget.is_all:
        raise ValueError("a budget of all tokens needs no selection: name a count or a share")
    if not num_tokens.is_fixed:
        raise ValueError(f"a budget of {budget} needs a fixed number of tokens, got {num_tokens}: name a count")
    return budget.num_kept(num_tokens.minimum)
