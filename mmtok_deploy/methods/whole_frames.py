"""Whole frames: fewer frames of a video, each as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.methods.evenly_spaced import evenly_spaced
from mmtok_deploy.methods.picks import selection_of
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns evenly spaced whole frames, as many as the budget holds, and evenly spaced tokens of one more.

    What the budget has left over, less than a frame, is spent in the frame after the last whole one that is kept: of
    a budget of m frames and r tokens, m + 1 frames are evenly spaced from the first to the last, and the last has r.

    Raises:
        ValueError: A problem of one frame, or of tokens that may not be picked.
    """
    return [selection_of(_select_one(problem)) for problem in problems]


def _select_one(problem: SelectionProblem) -> Tensor:
    if problem.num_frames < 2 or problem.excluded is not None:
        raise ValueError(f"frames needs two or more frames of which all may be kept, got {problem.num_frames}")
    device, size = problem.vision.device, len(problem.vision) // problem.num_frames
    num_whole, num_left = divmod(problem.num_picks, size)
    places = evenly_spaced(problem.num_frames, num_whole + (num_left > 0), device)
    whole = (places[:num_whole, None] * size + torch.arange(size, device=device)).flatten()
    return torch.cat([whole, places[num_whole:] * size + evenly_spaced(size, num_left, device)]) if num_left else whole
