"""Efficient Video Sampling: what changes from one frame to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import unit_rows
from mmtok_deploy.methods.picks import highest
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns each video's first frame, and the tokens that are least like the one before; the question is not read.

    A token is held against the token of the same place in the frame before: dissimilarity is 1 - cosine, of tokens
    after the projector. Those of the first frame are kept before all others, in raster order. The paper's threshold
    for a share of all tokens is a number of tokens here. Its differences are of pixels; engines that serve it take
    tokens (vLLM, vllm/multimodal/evs.py, `compute_retention_mask`), and so does this. The objective is the
    dissimilarity, 2 for the first frame, which no other has more of. Ties go to the lowest index.

    Source: EVS, arXiv 2510.14624, "Token Selection".

    Raises:
        ValueError: A problem of one frame, or of fewer tokens to keep than a frame has.
    """
    return [_select_one(problem) for problem in problems]


def _select_one(problem: SelectionProblem) -> Selection:
    num_tokens, num_frames = len(problem.vision), problem.num_frames
    if num_frames < 2 or problem.num_picks < num_tokens // num_frames:
        raise ValueError(
            f"evs keeps the first of two or more frames whole, got {num_frames} of {num_tokens // num_frames} tokens "
            f"and {problem.num_picks} to keep"
        )
    scores = _dissimilarities(problem.vision.float(), num_frames)
    order = highest(scores.nan_to_num(nan=0.0), problem)
    objective = scores.index_select(0, order)
    total = scores if problem.excluded is None else scores.masked_fill(problem.excluded, 0)
    return Selection(order, order.sort().values, objective, total.sum())


def _dissimilarities(vision: Tensor, num_frames: int) -> Tensor:
    """Returns [N] float32."""
    frames = unit_rows(vision).unflatten(0, (num_frames, -1))
    changes = 1 - (frames[1:] * frames[:-1]).sum(dim=2)
    # Not a constant: it is not finite where the frame is not.
    first = 2 + 0 * frames[0].sum(dim=1)
    return torch.cat([first, changes.flatten()])
