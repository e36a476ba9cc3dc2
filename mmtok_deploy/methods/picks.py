"""What the methods without a coverage matrix have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["bar", "highest", "selection_of"]


def bar(scores: Tensor, excluded: Tensor | None) -> Tensor:
    """Returns the [N] scores with those of excluded tokens at -inf."""
    return scores if excluded is None else scores.masked_fill(excluded, float("-inf"))


def highest(scores: Tensor, problem: SelectionProblem) -> Tensor:
    """Returns the [K] tokens with the highest scores [N], best first; ties go to the lowest index."""
    return bar(scores, problem.excluded).argsort(descending=True, stable=True)[: problem.num_picks]


def selection_of(order: Tensor, objective: Tensor | None = None) -> Selection:
    """Returns the selection of the tokens in `order` [K].

    Args:
        order: Token indices as picked.
        objective: [K] the method's objective after each pick; zeros if it has none.
    """
    if objective is None:
        objective = torch.zeros(len(order), device=order.device)
    return Selection(order, order.sort().values, objective.float(), objective.float().sum())
