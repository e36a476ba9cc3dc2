"""The selection as published, in plain PyTorch: the float32 answer that every faster backend must give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_curve, coverage_matrix
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["greedy_maximum_coverage", "select"]


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns the selection of each problem, one after another."""
    return [_select_one(problem, config) for problem in problems]


def _select_one(problem: SelectionProblem, config: SelectionConfig) -> Selection:
    matrix = coverage_matrix(problem.vision, problem.keys, problem.text, config)
    order = greedy_maximum_coverage(matrix, problem.num_picks, problem.excluded)
    total = matrix.amax(dim=1).sum() if len(problem.vision) else matrix.new_zeros(())
    return Selection(order, order.sort().values, coverage_curve(matrix, order), total)


def greedy_maximum_coverage(matrix: Tensor, num_picks: int, excluded: Tensor | None = None) -> Tensor:
    """Returns the columns as picked.

    With f(S) = sum_i max_{s in S} C[i, s], each pick adds the column s with the largest f(S + s) - f(S). Ties of
    these gains, as they are rounded, go to the lowest index; excluded and picked columns never win.

    Args:
        matrix: [R, N] float32, C; non-negative.
        num_picks: Columns to pick; at most as many as are not excluded.
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
