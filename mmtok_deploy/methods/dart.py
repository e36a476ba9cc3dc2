"""DART: a few pivots, and the tokens that are least similar to them."""

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

_IMAGE_PIVOTS = 4
_TEXT_PIVOTS = 4


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns each problem's pivots, and for each of them its share of tokens of the lowest cosine similarity to it.

    Pivots are the four tokens of the largest L1 norm, which are kept, and the four guidance words of the largest; one
    after another, each keeps what is least like it of the tokens that are left. Without words the image's pivots keep
    all. The paper does this behind the language model's second layer, by its keys; here, as in TensorRT Edge-LLM, it is
    done before the language model, by the tokens after the projector and the words' embeddings. The objective is 1 -
    the cosine similarity of each token to the pivot that kept it, 0 for a pivot. Ties go to the lowest index.

    Source: DART, arXiv 2502.11494, section 4; numbers of pivots and order of their shares from TensorRT Edge-LLM.
    """
    return [_select_one(problem) for problem in problems]


@float32_products()
def _select_one(problem: SelectionProblem) -> Selection:
    tokens, num_picks = unit_rows(problem.vision), problem.num_picks
    open_tokens = bar(tokens.new_zeros(len(tokens)), problem.excluded)
    order = _largest(problem.vision, min(_IMAGE_PIVOTS, num_picks), open_tokens)
    words = problem.text.index_select(0, _largest(problem.text, _TEXT_PIVOTS))
    own = tokens.index_select(0, order)
    pivots = torch.cat([own, unit_rows(words)])
    distances = 1 - own.square().sum(dim=1)
    for place, pivot in enumerate(pivots):
        open_tokens = open_tokens.index_fill(0, order, float("-inf"))
        share = -(-(num_picks - len(order)) // (len(pivots) - place))
        unlike = 1 - tokens @ pivot
        chosen = (unlike + open_tokens).argsort(descending=True, stable=True)[:share]
        order, distances = torch.cat([order, chosen]), torch.cat([distances, unlike.index_select(0, chosen)])
    return selection_of(order, distances)


def _largest(rows: Tensor, count: int, open_rows: Tensor | float = 0.0) -> Tensor:
    """Returns the rows [count] of the largest L1 norm, largest first; fewer where there are fewer."""
    norms: Tensor = rows.float().abs().sum(dim=1) + open_rows
    return norms.argsort(descending=True, stable=True)[:count]
