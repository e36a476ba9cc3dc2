"""ApET: a few basis tokens, and the tokens that these approximate worst."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.methods.picks import bar
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]

_BASIS_TOKENS = 10
# Residuals below this share of a token's length are float32 rounding.
_TOLERANCE = 1e-5


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns each problem's basis tokens, and those that these approximate worst; the question is not read.

    Ten basis tokens are found by farthest point sampling (Euclidean distance of the features before the projector);
    every other token's error is its distance to its least-squares approximation by them. Two differences to the
    authors' code: sampling begins at the first token that may be picked, not at a random one, so that a selection is
    the same each time; and merging what is left into the kept tokens makes new tokens and is not a choice of tokens, so
    it is left out, and basis tokens stay in their own places. The paper compresses once more within the language model;
    here all is done before it. The objective is each token's error. Ties go to the lowest index.

    Source: ApET, arXiv 2602.19870, section 3; the number of basis tokens from the authors' code.
    """
    return [_select_one(problem) for problem in problems]


@float32_products()
def _select_one(problem: SelectionProblem) -> Selection:
    keys = problem.keys.float()
    basis, open_tokens = _farthest_points(keys, problem)
    errors = _errors(keys, keys.index_select(0, basis))
    rest = (errors + open_tokens).argsort(descending=True, stable=True)[: problem.num_picks - len(basis)]
    order = torch.cat([basis, rest])
    total = errors if problem.excluded is None else errors.masked_fill(problem.excluded, 0)
    return Selection(order, order.sort().values, errors.index_select(0, order), total.sum())


def _farthest_points(keys: Tensor, problem: SelectionProblem) -> tuple[Tensor, Tensor]:
    """Returns the basis tokens as found, and [N] 0 for each token that may still be picked, -inf for the others."""
    open_tokens = bar(keys.new_zeros(len(keys)), problem.excluded)
    basis = torch.empty(min(_BASIS_TOKENS, problem.num_picks), dtype=torch.int64, device=keys.device)
    nearest = keys.new_full((len(keys),), torch.finfo(keys.dtype).max)
    for place in range(len(basis)):
        farthest = torch.argmax(nearest + open_tokens, keepdim=True)
        basis[place : place + 1] = farthest
        open_tokens = open_tokens.index_fill(0, farthest, float("-inf"))
        nearest = torch.minimum(nearest, (keys - keys.index_select(0, farthest)).square().sum(dim=1))
    return basis, open_tokens


def _errors(keys: Tensor, basis: Tensor) -> Tensor:
    """Returns [N] the distances of the keys [N, d] to the space that the basis [M, d] spans."""
    # Orthonormal rows, projected twice against rounding; zeros for a basis token that the earlier ones span already.
    # Unlike normal equations, this works for tokens that are equal, or zero.
    axes = torch.zeros_like(basis)
    for place, token in enumerate(basis):
        rest = token - (axes @ token) @ axes
        rest = rest - (axes @ rest) @ axes
        length = torch.linalg.vector_norm(rest)
        is_spanned = length <= _TOLERANCE * torch.linalg.vector_norm(token)
        axes[place] = (rest / length).masked_fill(is_spanned, 0)
    errors: Tensor = torch.linalg.vector_norm(keys - (keys @ axes.T) @ axes, dim=1)
    return errors.masked_fill(errors <= _TOLERANCE * torch.linalg.vector_norm(keys, dim=1), 0)
