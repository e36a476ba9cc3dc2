"""Evenly spaced tokens: every nth in raster order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.methods.picks import selection_of
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["evenly_spaced", "select"]


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns evenly spaced tokens of those that may be picked, the first and the last of them included."""
    return [selection_of(_select_one(problem)) for problem in problems]


def _select_one(problem: SelectionProblem) -> Tensor:
    num_tokens = len(problem.vision)
    if problem.excluded is None:
        return evenly_spaced(num_tokens, problem.num_picks, problem.vision.device)
    # The number of tokens that may be picked stays on the device: reading it would synchronize.
    may_be_picked = problem.excluded.argsort(stable=True)
    return may_be_picked[evenly_spaced(num_tokens - problem.excluded.sum(), problem.num_picks, problem.vision.device)]


def evenly_spaced(num_tokens: int | Tensor, num_picks: int, device: torch.device) -> Tensor:
    """Returns [num_picks] int64, places from 0 to `num_tokens - 1`, rising; 0 for a single one."""
    # In integers: float32 repeats a token where there are more than 10,000.
    places: Tensor = torch.arange(num_picks, device=device) * (num_tokens - 1) // max(num_picks - 1, 1)
    return places
