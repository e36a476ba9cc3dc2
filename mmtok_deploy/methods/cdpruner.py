"""CDPruner: tokens that are relevant to the question and unlike one another, by a determinantal point process."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import unit_rows
from mmtok_deploy.methods.determinant import largest_determinant
from mmtok_deploy.methods.picks import selection_of
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]

# Added as in the authors' code, so that the least relevant token has a relevance above 0.
_LEAST = 1e-6


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns each problem's tokens of the largest determinant of diag(r) L diag(r), greedily.

    L are the cosine similarities of the tokens after the projector, r their relevance, scaled to 0 to 1 over the tokens
    that may be picked. Relevance is the paper's for models without a paired text encoder: the cosine similarity of a
    token to the mean of the guidance words' embeddings in the language model, and more is more relevant. (For CLIP and
    its text encoder the authors' code reverses the sign; OpenVINO's implementation reverses it, too.) Without words all
    tokens are equally relevant, and diversity alone decides. The objective is the factor by which each pick made the
    determinant larger. Ties go to the lowest index.

    Source: CDPruner, arXiv 2506.10967, sections 3.2 to 3.4.
    """
    return [_select_one(problem) for problem in problems]


@float32_products()
def _select_one(problem: SelectionProblem) -> Selection:
    tokens = unit_rows(problem.vision)
    # A token is as like itself as any other is, a zero row is like nothing: rounding must not choose among equals.
    diagonal = tokens.square().sum(dim=1).round()
    if len(problem.text):
        relevance = _relevance(tokens, problem)
        tokens, diagonal = relevance[:, None] * tokens, relevance.square() * diagonal
    return selection_of(
        *largest_determinant(lambda token: tokens @ tokens.index_select(0, token)[0], diagonal, problem)
    )


def _relevance(tokens: Tensor, problem: SelectionProblem) -> Tensor:
    """Returns [N] relevance: about 0 for the least relevant token that may be picked, 1 for the most, or 1 for all."""
    words = unit_rows(problem.text.float().mean(dim=0))
    similarity = tokens @ words
    lowest = highest = similarity
    if problem.excluded is not None:
        lowest = similarity.masked_fill(problem.excluded, float("inf"))
        highest = similarity.masked_fill(problem.excluded, float("-inf"))
    low, high = lowest.amin(), highest.amax()
    relevance: Tensor = (similarity - low + _LEAST) / (high - low + _LEAST)
    return relevance
