"""Coverage of the text alone: the paper's Algorithm 1, without the image's own half of the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mmtok_deploy.backends import get_backend
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns the tokens that best cover the guidance words, by `tv_temp`; each problem needs at least one word.

    Source: MMTok, arXiv 2508.18264, section 3.1 and Algorithm 1.
    """
    device = problems[0].vision.device if problems else torch.device("cpu")
    return get_backend("auto", device)(problems, replace(config, coverage="text"))
