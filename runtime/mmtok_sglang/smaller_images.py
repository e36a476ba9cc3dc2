"""Images scaled down before a processor that makes fewer tokens of smaller ones: a Qwen's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from sglang.srt.utils import load_image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mmtok_deploy.budget import Budget
from mmtok_deploy.methods.downsample import grid_within
from mmtok_sglang.refusals import refusal

__all__ = ["ProcessorSizes"]


@dataclass(frozen=True, slots=True)
class ProcessorSizes:
    """How a processor sizes images.

    Args:
        token_px: Side of the square of pixels that a token stands for.
        min_pixels: A smaller image is enlarged to this area.
        max_pixels: A larger one is made smaller.
    """

    token_px: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, processor: Any) -> ProcessorSizes:
        """Returns the sizes of SGLang's processor, which a server may change by --mm-process-config."""
        images, given = processor._processor.image_processor, processor.image_config
        return cls(
            token_px=images.patch_size * images.merge_size,
            min_pixels=given.get("min_pixels", images.size["shortest_edge"]),
            max_pixels=given.get("max_pixels", images.size["longest_edge"]),
        )

    def shrink(self, source: Any, budget: Budget, min_tokens_in: int) -> Any:
        """Returns the image at the size of at most as many tokens as the budget keeps, scaled once, bicubic.

        Args:
            source: What SGLang can load.
            budget: How many of the image's tokens at its own size it keeps.
            min_tokens_in: An image of fewer tokens is returned as it is.

        Raises:
            ValueError: The processor would enlarge an image so small, or it cannot be read.
        """
        try:
            image, _ = load_image(source, False)
            # As SGLang converts images before the processor, and before scaling: Pillow scales RGBA by its alpha, which
            # makes the colour of transparent pixels black.
            image = image if image.mode == "RGB" else image.convert("RGB")
        except (OSError, RuntimeError, SyntaxError, ValueError) as error:
            raise refusal("image", f"an image cannot be read: {error}") from error
        height, width = smart_resize(image.height, image.width, self.token_px, self.min_pixels, self.max_pixels)
        rows, columns = height // self.token_px, width // self.token_px
        num_kept = budget.num_kept(rows * columns)
        if rows * columns < min_tokens_in or num_kept == rows * columns:
            return source
        smaller = grid_within(rows, columns, num_kept)
        if smaller[0] * smaller[1] * self.token_px**2 < self.min_pixels:
            raise refusal(
                "downsample",
                f"mmtok_method downsample: {num_kept} tokens of an image are below the {self.min_pixels} pixels that "
                f"the processor enlarges it to: ask for an mmtok_budget of {-(-self.min_pixels // self.token_px**2)} "
                "tokens or more",
            )
        return image.resize((smaller[1] * self.token_px, smaller[0] * self.token_px), Image.Resampling.BICUBIC)
