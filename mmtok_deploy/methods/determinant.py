"""Greedy selection by a kernel's determinant, for the methods that maximise one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmtok_deploy.methods.picks import bar
from mmtok_deploy.problem import SelectionProblem

__all__ = ["largest_determinant"]

# Remainders below this share of a token's diagonal entry are float32 rounding.
_TOLERANCE = 1e-5


def largest_determinant(
    row_of: Callable[[Tensor], Tensor], diagonal: Tensor, problem: SelectionProblem
) -> tuple[Tensor, Tensor]:
    """Returns [K] tokens as picked, and [K] the factors by which each made the determinant larger.

    With L the kernel, each pick is the token i with the largest det(L[S + i, S + i]) / det(L[S, S]), by an incremental
    Cholesky factorisation, which holds [K, N]. Ties go to the lowest index; once no token adds anything, all tie.

    Args:
        row_of: Gives [N], the kernel's row of the token whose index it is given as [1] int64.
        diagonal: [N] float32, the kernel's diagonal.
        problem: Gives the number of picks and the excluded tokens.

    Source: Chen et al., Fast Greedy MAP Inference for Determinantal Point Process, arXiv 1709.05135, Algorithm 1.
    """
    order = torch.empty(problem.num_picks, dtype=torch.int64, device=diagonal.device)
    gains = diagonal.new_empty(problem.num_picks)
    factors = diagonal.new_zeros(problem.num_picks, len(diagonal))
    left, open_tokens = diagonal, bar(torch.zeros_like(diagonal), problem.excluded)
    for pick in range(problem.num_picks):
        best = torch.argmax(left + open_tokens, keepdim=True)
        pivot = left.index_select(0, best)
        order[pick : pick + 1], gains[pick : pick + 1] = best, pivot
        open_tokens = open_tokens.index_fill(0, best, float("-inf"))
        known = factors[:pick].index_select(1, best)[:, 0] @ factors[:pick]
        factors[pick] = (row_of(best) - known) * torch.where(pivot > 0, pivot.rsqrt(), 0)
        left = left - factors[pick].square()
        left = left.masked_fill(left <= _TOLERANCE * diagonal, 0)
    return order, gains
