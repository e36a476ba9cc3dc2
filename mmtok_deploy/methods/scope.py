"""SCOPE: tokens that cover the image, each gain weighted by the token's saliency."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import unit_rows
from mmtok_deploy.methods.picks import bar, selection_of
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]

# Rows whose gains are added up at a time: 64 MB at 16,384 tokens.
_BLOCK_ROWS = 1024


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns each problem's tokens of the largest coverage gain times saliency, greedily; the question is not read.

    A token is covered as well as its most similar picked one is similar to it (cosine, at least 0), by the features
    before the projector. Saliency is the attention of the vision tower's class token to a token,
    `SelectionProblem.attention` (the paper's alpha is 1); for models without a class token, coverage alone decides.
    Excluded tokens need no cover. The objective is the coverage after each pick. Ties go to the lowest index. A matrix
    of [N, N] is held in memory.

    Source: SCOPE, arXiv 2510.24214, section 3.
    """
    return [_select_one(problem) for problem in problems]


@float32_products()
def _select_one(problem: SelectionProblem) -> Selection:
    keys = unit_rows(problem.keys)
    similarity = keys @ keys.T
    if problem.excluded is not None:
        similarity.masked_fill_(problem.excluded[:, None], 0)
    order = torch.empty(problem.num_picks, dtype=torch.int64, device=keys.device)
    coverage = keys.new_empty(problem.num_picks)
    covered = keys.new_zeros(len(keys))
    open_tokens = bar(torch.zeros_like(covered), problem.excluded)
    for pick in range(problem.num_picks):
        gains = torch.zeros_like(covered)
        for rows, reached in zip(similarity.split(_BLOCK_ROWS), covered.split(_BLOCK_ROWS), strict=True):
            gains += (rows - reached[:, None]).clamp_min_(0).sum(dim=0)
        if problem.attention is not None:
            gains *= problem.attention
        best = torch.argmax(gains + open_tokens, keepdim=True)
        order[pick : pick + 1] = best
        open_tokens = open_tokens.index_fill(0, best, float("-inf"))
        covered = torch.maximum(covered, similarity.index_select(1, best)[:, 0])
        coverage[pick] = covered.sum()
    return selection_of(order, coverage)
