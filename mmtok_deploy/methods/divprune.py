"""DivPrune: tokens that are far from one another, by greedy maximisation of the smallest cosine distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import unit_rows
from mmtok_deploy.methods.picks import bar, selection_of
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]

# Rows of the first pick's distance matrix at a time: 64 MB at 16,384 tokens.
_BLOCK_ROWS = 1024


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns each problem's max-min diverse tokens; the question is not read.

    The first is the token whose nearest other token is farthest away, each next one the token whose nearest picked
    token is farthest. Distances are 1 - cosine similarity of the tokens after the projector, in float32; ties go to
    the lowest index. The objective is the distance by which each token was picked.

    Source: DivPrune, arXiv 2503.02175, section 3 and Algorithm 1.
    """
    return [_select_one(problem) for problem in problems]


@float32_products()
def _select_one(problem: SelectionProblem) -> Selection:
    tokens = unit_rows(problem.vision)
    order = torch.empty(problem.num_picks, dtype=torch.int64, device=tokens.device)
    distances = torch.empty(problem.num_picks, device=tokens.device)
    nearest = _nearest_other(tokens, problem.excluded)
    open_tokens = bar(torch.zeros_like(nearest), problem.excluded)
    for pick in range(problem.num_picks):
        # With keepdim: indexing by a tensor of no dimension would synchronize with the device.
        best = torch.argmax(nearest + open_tokens, keepdim=True)
        order[pick : pick + 1], distances[pick : pick + 1] = best, nearest.index_select(0, best)
        open_tokens.index_fill_(0, best, float("-inf"))
        to_best = 1 - tokens @ tokens.index_select(0, best)[0]
        nearest = to_best if pick == 0 else torch.minimum(nearest, to_best)
    return selection_of(order, distances)


def _nearest_other(tokens: Tensor, excluded: Tensor | None) -> Tensor:
    """Returns [N] each token's distance to the nearest other one that may be picked; 2, the largest, without one."""
    nearest = []
    for first in range(0, len(tokens), _BLOCK_ROWS):
        distances = 1 - tokens[first : first + _BLOCK_ROWS] @ tokens.T
        distances.diagonal(first).fill_(2)
        nearest.append((distances if excluded is None else distances.masked_fill(excluded, 2)).amin(dim=1))
    return torch.cat(nearest) if nearest else tokens.new_empty(0)
