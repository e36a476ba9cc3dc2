"""Encoder of LLaVA-NeXT: that of LLaVA-1.5 for each tile of an image."""

from __future__ import annotations

from typing import Any

from mmtok_deploy.dim_range import DimRange
from mmtok_export.checkpoint_config import EncoderError
from mmtok_export.encoders.base import ImageSize
from mmtok_export.encoders.llava_1_5 import Llava15Encoder

__all__ = ["LlavaNextEncoder"]


class LlavaNextEncoder(Llava15Encoder):
    """Encodes the B tiles of one image, the base tile and its crops; `pixels` is [B, 3, height, width].

    A pruned image has no newline tokens, and its padding is not removed, so this encoder does neither.

    Source: transformers 5.19 models/llava_next/modeling_llava_next.py, `LlavaNextModel.get_image_features`.
    """

    family = "llava-next"

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        self.tiles = self.native_batch(config)
        if batch.minimum not in self.tiles or batch.maximum not in self.tiles:
            raise EncoderError(
                f"an image of this model has {self.tiles.minimum} to {self.tiles.maximum} tiles, got {batch} as "
                "--batch-size, the number of tiles"
            )

    @classmethod
    def native_batch(cls, config: Any) -> DimRange:
        """Returns the range of an image's number of tiles: the base tile, and crops for a resolution of config.json."""
        side = config.vision_config.image_size
        counts = [1 + -(-height // side) * -(-width // side) for height, width in config.image_grid_pinpoints]
        return DimRange(min(counts), max(counts), max(counts))
