"""Coverage of the image alone: the paper's objective without the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mmtok_deploy.backends import get_backend
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["select"]


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns the tokens that best cover the image's features before the projector, by `vv_temp`.

    Source: MMTok, arXiv 2508.18264, section 3.2.
    """
    device = problems[0].vision.device if problems else torch.device("cpu")
    return get_backend("auto", device)(problems, replace(config, coverage="vision"))
