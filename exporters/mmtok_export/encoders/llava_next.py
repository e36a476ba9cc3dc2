"""LLaVA-NeXT's encoder: that of LLaVA-1.5, of the tiles that an image is cut into."""

from __future__ import annotations

from typing import Any

from mmtok_deploy.dim_range import DimRange
from mmtok_export.encoders.base import EncoderError, ImageSize
from mmtok_export.encoders.llava_1_5 import Llava15Encoder

__all__ = ["LlavaNextEncoder"]


class LlavaNextEncoder(Llava15Encoder):
    """`pixels` is [B, 3, height, width]: the B tiles of one image, the base tile and its crops.

    What the language model reads of a pruned image has no newline tokens, and no padding is taken off: both are left
    out here.

    Source: transformers 5.19 models/llava_next/modeling_llava_next.py, `LlavaNextModel.get_image_features`.
    """

    family = "llava-next"

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        self.tiles = self.native_batch(config)
        if batch.minimum not in self.tiles or batch.maximum not in self.tiles:
            raise EncoderError(
                f"an image of this model is {self.tiles.minimum} to {self.tiles.maximum} tiles, and B is their number, "
                f"got {batch}: name no other"
            )

    @classmethod
    def native_batch(cls, config: Any) -> DimRange:
        """Returns how many tiles an image has: the base tile and the crops of each resolution in config.json."""
        side = config.vision_config.image_size
        counts = [1 + -(-height // side) * -(-width // side) for height, width in config.image_grid_pinpoints]
        return DimRange(min(counts), max(counts), max(counts))
