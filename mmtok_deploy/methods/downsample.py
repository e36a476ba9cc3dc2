"""Downsampling: the whole image at the resolution that has as many tokens as the budget; nothing is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.methods.picks import selection_of
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["grid_within", "select"]


def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Selection]:
    """Returns every token of images that were made smaller before they were encoded.

    Raises:
        ValueError: An image of another number of tokens than its budget: it was not made smaller.
    """
    for problem in problems:
        if len(problem.vision) != problem.num_picks:
            raise ValueError(
                f"an image downsampled to {problem.num_picks} tokens has as many, this has {len(problem.vision)}"
            )
    return [selection_of(torch.arange(problem.num_picks, device=problem.vision.device)) for problem in problems]


def grid_within(rows: int, columns: int, max_tokens: int) -> tuple[int, int]:
    """Returns the grid of at most `max_tokens` tokens that is nearest in shape to one of `rows` x `columns`.

    Candidates are the grids with the most tokens for each number of rows. The one with the nearest aspect ratio is
    returned; of two equally near, the one with more tokens. A grid that is small enough is returned as it is.

    Args:
        rows: Rows of the image's own grid, at least 1.
        columns: Likewise.
        max_tokens: At least 1.
    """
    if rows * columns <= max_tokens:
        return rows, columns
    aspect = math.log(columns / rows)
    candidates = [(height, min(columns, max_tokens // height)) for height in range(1, min(rows, max_tokens) + 1)]
    return min(candidates, key=lambda grid: (abs(math.log(grid[1] / grid[0]) - aspect), -grid[0] * grid[1]))
