"""Number of tokens of an image, and the size of a smaller image with the tokens that a budget keeps."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

from mmtok_bench.families import FAMILY_TRAITS, FamilyName
from mmtok_bench.serve.presets import Size

__all__ = ["count_image_tokens", "downsampled_px"]

# Width over height may change by a quarter; a stricter bound would miss the token counts of small budgets by more.
_MAX_STRETCH = 1.25
_SHRINK_STEPS = 12


def count_image_tokens(processor: Any, size_px: Size) -> int:
    """Returns the number of tokens of one image, counted by the model's Hugging Face processor."""
    blank = Image.new("RGB", size_px)
    ids = processor(text=[processor.image_token], images=[blank], return_tensors="pt")["input_ids"]
    return int((ids == processor.image_token_id).sum())


def downsampled_px(processor: Any, family: FamilyName, size_px: Size, num_tokens: int) -> Size | None:
    """Returns the size at which an image has about `num_tokens` tokens; None if no smaller size has fewer.

    Qwens and GLMs: the size with the nearest count at about the same aspect ratio. LLaVA-NeXT: the nearest count at the
    same aspect ratio, which is far from small budgets, since an image has at least two tiles. LLaVA-1.5 encodes every
    image as the same square: it is sent at its own size, and the plugin's method `downsample` makes the square smaller.

    Args:
        processor: Processor of the model.
        family: Family of the model.
        size_px: Size of the image.
        num_tokens: The wanted number of tokens.
    """
    if family == "llava-1.5":
        return size_px
    token_px = FAMILY_TRAITS[family].token_px
    if token_px is not None:
        smaller_px = _qwen_px(size_px, num_tokens, token_px)
        # A processor enlarges images below its smallest size: Qwen3-VL's makes at least 64 tokens.
        is_enlarged = smaller_px is not None and count_image_tokens(processor, smaller_px) > math.prod(
            side // token_px for side in smaller_px
        )
        return None if is_enlarged else smaller_px
    width, height = size_px
    num_unshrunk = count_image_tokens(processor, size_px)
    counts = {}
    for step in range(1, _SHRINK_STEPS):
        smaller = round(width * step / _SHRINK_STEPS), round(height * step / _SHRINK_STEPS)
        counts[smaller] = count_image_tokens(processor, smaller)
    fewer = {size: count for size, count in counts.items() if count < num_unshrunk}
    if not fewer:
        return None
    # Among equal counts the largest image, which shows the most.
    return min(fewer, key=lambda size: (abs(fewer[size] - num_tokens), -size[0]))


def _qwen_px(size_px: Size, num_tokens: int, token_px: int) -> Size | None:
    width, height = size_px
    shape = width / height
    grids = [
        (columns, rows)
        for rows in range(1, num_tokens + 1)
        for columns in {max(1, num_tokens // rows), num_tokens // rows + 1}
        if columns * rows * token_px**2 < width * height
    ]

    def stretch(grid: tuple[int, int]) -> float:
        return abs(math.log(grid[0] / grid[1] / shape))

    fitting = [grid for grid in grids if stretch(grid) <= math.log(_MAX_STRETCH)]
    if not (fitting or grids):
        return None
    columns, rows = min(
        fitting or grids,
        key=lambda grid: (abs(grid[0] * grid[1] - num_tokens), stretch(grid)) if fitting else (stretch(grid), 0),
    )
    return columns * token_px, rows * token_px
