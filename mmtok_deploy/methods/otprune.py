"""OTPrune: tokens whose distribution is near that of all tokens, by optimal transport between Gaussians."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.methods.determinant import largest_determinant
from mmtok_deploy.methods.picks import selection_of
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]

_GAMMA = 0.01


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns each problem's tokens of the largest log det(I + gamma S S^T), greedily; the question is not read.

    S = V V^T of the tokens V after the projector, each of whose features has length 1 over the tokens that may be
    picked. That is the paper's lower bound to how near the 2-Wasserstein distance of two Gaussians without mean, of the
    picked tokens and of all, comes to its smallest. gamma is 0.01, as in the paper. The objective is the factor by
    which each pick made the determinant larger, at least 1. Ties go to the lowest index.

    Source: OTPrune, arXiv 2602.20205, section 3; the scaling of the features from the authors' code.
    """
    return [_select_one(problem) for problem in problems]


@float32_products()
def _select_one(problem: SelectionProblem) -> Selection:
    tokens = problem.vision.float()
    if problem.excluded is not None:
        tokens = tokens.masked_fill(problem.excluded[:, None], 0)
    tokens = tokens / torch.linalg.vector_norm(tokens, dim=0).clamp(min=1e-8)
    # S S^T = V (V^T V) V^T: nothing is as large as [N, N].
    weighted = tokens @ (tokens.T @ tokens)

    def row_of(token: Tensor) -> Tensor:
        row: Tensor = _GAMMA * (tokens @ weighted.index_select(0, token)[0])
        return row.index_add(0, token, row.new_ones(1))

    return selection_of(*largest_determinant(row_of, 1 + _GAMMA * (weighted * tokens).sum(dim=1), problem))
