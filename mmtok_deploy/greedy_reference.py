"""Greedy maximum coverage, as published: the float32 answer that every faster backend must give."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["greedy_maximum_coverage"]


def greedy_maximum_coverage(matrix: Tensor, num_picks: int, excluded: Tensor | None = None) -> Tensor:
    """Returns the columns as picked.

    With f(S) = sum_i max_{s in S} C[i, s], each pick adds the column s with the largest f(S + s) - f(S). Ties go to
    the lowest index; excluded and picked columns never win.

    Args:
        matrix: [R, N] float32, C; non-negative.
        num_picks: Columns to pick; fewer are picked where fewer may be.
        excluded: [N] bool, columns never to pick.

    Returns:
        [K] int64 on the matrix's device.

    Source: MMTok, arXiv 2508.18264, Algorithm 2; tie order of torch.argmax (first of equals).
    """
    num_columns = matrix.shape[1]
    barred = torch.zeros(num_columns, device=matrix.device)
    if excluded is not None:
        barred.masked_fill_(excluded, float("-inf"))
        num_columns -= int(excluded.sum())
    num_picks = min(num_picks, num_columns)

    covered = matrix.new_zeros(matrix.shape[0])
    order = torch.empty(num_picks, dtype=torch.int64, device=matrix.device)
    for pick in range(num_picks):
        gains = (matrix - covered[:, None]).clamp_min_(0).sum(dim=0).add_(barred)
        best = torch.argmax(gains)
        order[pick] = best
        covered = torch.maximum(covered, matrix[:, best])
        barred[best] = float("-inf")
    return order
