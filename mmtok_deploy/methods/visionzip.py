"""VisionZip's dominant tokens: those that the vision tower's class token attends to most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.methods.picks import highest, selection_of
from mmtok_deploy.precision import float32_products
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["class_token_attention", "select"]


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns each problem's tokens of the highest attention; the question is not read.

    The paper's second half, merging what is left into contextual tokens, makes new tokens and is not a choice of
    tokens: it is left out. The objective is the attention of the picked tokens together. Ties go to the lowest index.

    Raises:
        ValueError: A problem without attention.

    Source: VisionZip, arXiv 2412.04467, section 3.2, dominant token selection.
    """
    return [_select_one(problem) for problem in problems]


def _select_one(problem: SelectionProblem) -> Selection:
    if problem.attention is None:
        raise ValueError("visionzip needs the attention that the vision tower pays to each token")
    order = highest(problem.attention, problem)
    return selection_of(order, problem.attention[order].cumsum(dim=0))


@float32_products()
def class_token_attention(queries: Tensor, keys: Tensor, num_heads: int) -> Tensor:
    """Returns [B, N] float32: attention of the class token, the first of N + 1, to each other token, summed over heads.

    Args:
        queries: [B, N + 1, d] of one layer, heads side by side, as the layer's query projection gives them.
        keys: [B, N + 1, d] of the same layer.
        num_heads: Heads in d.
    """
    num_images, num_tokens, width = keys.shape
    query = queries[:, 0].float().view(num_images, num_heads, 1, width // num_heads)
    per_head = keys.float().view(num_images, num_tokens, num_heads, width // num_heads).permute(0, 2, 3, 1)
    weights = torch.softmax(query @ per_head / (width // num_heads) ** 0.5, dim=-1)
    attention: Tensor = weights[:, :, 0, 1:].sum(dim=1)
    return attention
