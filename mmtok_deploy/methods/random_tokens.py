"""Random tokens: what a budget is worth without any choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.methods.picks import highest, selection_of
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns tokens drawn without replacement, each set as likely as any; a problem's `seed` decides which."""
    return [_select_one(problem) for problem in problems]


def _select_one(problem: SelectionProblem) -> Selection:
    # On the host, so that every device draws the same.
    generator = torch.Generator().manual_seed(problem.seed)
    places = torch.randperm(len(problem.vision), generator=generator)
    return selection_of(highest(places.float().to(problem.vision.device, non_blocking=True), problem))
