"""The patches of a padded image that are padding alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["padding_mask"]


def padding_mask(height_px: int, width_px: int, side_px: int, num_patches: int) -> Tensor:
    """Returns [num_patches * num_patches] bool: the patches of a padded square that hold no pixel of the image.

    Args:
        height_px: Height of the image.
        width_px: Width of the image.
        side_px: Side of the square after resizing.
        num_patches: Patches along the side.

    Source: Ironieser/MMTok mmtok/llava/patch_llava.py, `calculate_padding_patch_indices` without overlap.
    """
    longest_px = max(height_px, width_px)
    rows, columns = (_padded_lines(length, longest_px, side_px, num_patches) for length in (height_px, width_px))
    return (rows[:, None] | columns[None, :]).flatten()


def _padded_lines(length_px: int, longest_px: int, side_px: int, num_patches: int) -> Tensor:
    patch_px = side_px // num_patches
    padding_px = side_px - round(length_px * (side_px / longest_px))
    before_px = padding_px // 2
    line = torch.arange(num_patches)
    return (line < before_px // patch_px) | (line >= num_patches - (padding_px - before_px) // patch_px)
