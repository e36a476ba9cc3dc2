"""Images scaled down before a processor that makes fewer tokens of smaller ones: a Qwen's, a GLM's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from sglang.srt.utils import load_image
from transformers.models.glm4v.image_processing_glm4v import smart_resize as resize_frames
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mmtok_deploy.budget import Budget
from mmtok_deploy.methods.downsample import grid_within
from mmtok_sglang.metrics import collectors, never_raises
from mmtok_sglang.refusals import refusal
from mmtok_sglang.stages import image_stage

__all__ = ["ProcessorSizes"]


@dataclass(frozen=True, slots=True)
class ProcessorSizes:
    """How a processor sizes images.

    Args:
        token_px: Side of the square of pixels that a token stands for.
        min_pixels: A smaller image is enlarged to this area.
        max_pixels: A larger one is made smaller.
        num_frames: Equal frames that the processor makes of an image and sizes it by, as a GLM's does; 1 for others.
    """

    token_px: int
    min_pixels: int
    max_pixels: int
    num_frames: int = 1

    @classmethod
    def of(cls, processor: Any, num_frames: int = 1) -> ProcessorSizes:
        """Returns the sizes of SGLang's processor, which a server may change by --mm-process-config."""
        images, given = processor._processor.image_processor, processor.image_config
        # As the processor reads them (transformers 5.19 image_processing_qwen2_vl.py, `_standardize_kwargs`).
        size = given.get("size", images.size)
        return cls(
            token_px=images.patch_size * images.merge_size,
            min_pixels=given.get("min_pixels", size["shortest_edge"]) // num_frames,
            max_pixels=given.get("max_pixels", size["longest_edge"]) // num_frames,
            num_frames=num_frames,
        )

    def scale(self, source: Any, scale: float, min_tokens_in: int) -> Any:
        """Returns the image with each side at a share of what the processor would make it, scaled once, bicubic.

        The processor's smallest image is where scaling stops.

        Args:
            source: What SGLang can load.
            scale: The share, above 0 and at most 1.
            min_tokens_in: An image of fewer tokens at its own size is returned as it is.

        Raises:
            ValueError: It cannot be read, or is longer than the processor takes.
        """

        def smaller(rows: int, columns: int) -> tuple[int, int]:
            height, width = rows * self.token_px, columns * self.token_px
            stopped = max(scale, math.sqrt(self.min_pixels / (height * width)))
            return self._grid(height * stopped, width * stopped)

        return self._resized(source, smaller, min_tokens_in)

    def shrink(self, source: Any, budget: Budget, min_tokens_in: int) -> Any:
        """Returns the image at the size of at most as many tokens as the budget keeps, scaled once, bicubic.

        Args:
            source: What SGLang can load.
            budget: How many of the image's tokens at its own size it keeps.
            min_tokens_in: An image of fewer tokens is returned as it is.

        Raises:
            ValueError: The processor would enlarge an image so small, or it cannot be read.
        """

        def smaller(rows: int, columns: int) -> tuple[int, int]:
            num_kept = budget.num_kept(rows * columns)
            grid = grid_within(rows, columns, num_kept)
            if grid != (rows, columns) and grid[0] * grid[1] * self.token_px**2 < self.min_pixels:
                raise refusal(
                    "downsample",
                    f"mmtok_method downsample: {num_kept} tokens of an image are below the {self.min_pixels} pixels "
                    f"that the processor enlarges it to: ask for an mmtok_budget of "
                    f"{-(-self.min_pixels // self.token_px**2)} tokens or more",
                )
            return grid

        return self._resized(source, smaller, min_tokens_in)

    def _resized(self, source: Any, smaller: Callable[[int, int], tuple[int, int]], min_tokens_in: int) -> Any:
        """Returns the image at the size of another grid of tokens; as it came if that is its own.

        Args:
            source: What SGLang can load.
            smaller: Returns that grid, given the image's own rows and columns.
            min_tokens_in: An image of fewer tokens is returned as it came.
        """
        with image_stage("decode"):
            image = _loaded(source)
            rows, columns = self._grid(image.height, image.width)
            grid = (rows, columns) if rows * columns < min_tokens_in else smaller(rows, columns)
            if grid == (rows, columns):
                return source
            # The processor takes none that is longer.
            self._grid(grid[0] * self.token_px, grid[1] * self.token_px)
            size = (grid[1] * self.token_px, grid[0] * self.token_px)
            resized = image.resize(size, Image.Resampling.BICUBIC)
        _count_smaller()
        return resized

    def _grid(self, height: float, width: float) -> tuple[int, int]:
        """Returns the rows and columns of tokens that the processor makes of an image."""
        try:
            if self.num_frames == 1:
                sides = smart_resize(height, width, self.token_px, self.min_pixels, self.max_pixels)
            else:
                limits = self.num_frames * self.min_pixels, self.num_frames * self.max_pixels
                sides = resize_frames(self.num_frames, height, width, self.num_frames, self.token_px, *limits)
        except ValueError as error:
            raise refusal(
                "aspect_ratio", f"an image is too long for the processor: {error}: send it cut in parts"
            ) from None
        return int(sides[0] // self.token_px), int(sides[1] // self.token_px)


@never_raises
def _count_smaller() -> None:
    collectors()["smaller_images"].inc()


def _loaded(source: Any) -> Image.Image:
    try:
        image: Image.Image = load_image(source, False)[0]
        # As SGLang converts images before the processor, and before scaling: Pillow scales RGBA by its alpha, which
        # makes the colour of transparent pixels black.
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:
        raise refusal("image", f"an image cannot be read: {error}") from error
