"""LLaVA-NeXT on SGLang's Transformers backend: a base tile and crops, each selected by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from mmtok_deploy.budget import Budget, tokens_per_tile
from mmtok_deploy.methods import MethodName
from mmtok_sglang.families.llava import Llava
from mmtok_sglang.model import EncodedImage
from mmtok_sglang.transformers_backend import TransformersModel, TransformersProcessor, separate_images

__all__ = ["LlavaNext"]


class LlavaNextForConditionalGeneration(TransformersModel):
    """The model: SGLang has none of its own."""

    def join(self, image: EncodedImage, kept: Sequence[Tensor]) -> Tensor:
        """Returns the kept tokens [K, D]: the base tile's first, then the crops' in raster order of their grid."""
        vision = image.features.vision
        grid = get_anyres_image_grid_shape(
            image.item.image_sizes[0], self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        crops = _raster_order(torch.stack(list(kept[1:])), grid, math.isqrt(vision.shape[1]))
        return torch.cat([vision[0][kept[0]], vision[1:].flatten(0, 1)[crops]])


class LlavaNextProcessor(TransformersProcessor):
    """The processor."""

    models: ClassVar[list[type]] = [LlavaNextForConditionalGeneration]


class LlavaNext(Llava):
    """The same number of tokens of every tile; no newline tokens and no unpadding between what is kept.

    The base tile's tokens come first, then the crops' in raster order of the grid they form, and positions run on.
    """

    model_class = LlavaNextForConditionalGeneration
    processor_class = LlavaNextProcessor

    def separate_images(self, output: Any, processor: Any) -> None:
        """Splits the images by what the Hugging Face processor counts for their sizes."""
        (bundle,) = output.mm_items
        sizes = bundle.model_specific_data["image_sizes"].tolist()
        counts = processor._processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        separate_images(output, counts)

    def num_kept(self, item: Any, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns tiles x tokens a tile, or `num_tokens` where that is no fewer."""
        tile_tokens = self.num_selected_from(config)
        num_tiles = _num_tiles(item.image_sizes[0].tolist(), config)
        max_tiles = max(_num_tiles(pinpoint, config) for pinpoint in config.image_grid_pinpoints)
        kept = tokens_per_tile(budget, tile_tokens, num_tiles, max_tiles)
        return num_tokens if kept == tile_tokens else min(num_tokens, num_tiles * kept)

    def max_num_kept(self, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns what a tile of the smallest image keeps: a minimum is shared by the fewest tiles."""
        tiles = [_num_tiles(pinpoint, config) for pinpoint in config.image_grid_pinpoints]
        return tokens_per_tile(budget, num_tokens, min(tiles), max(tiles))

    def selection_size(self, item: Any, num_tokens: int, num_kept: int, config: Any) -> tuple[int, int]:
        """Returns N and K of a tile."""
        return self.num_selected_from(config), num_kept // _num_tiles(item.image_sizes[0].tolist(), config)

    def obstacle_to(self, method: MethodName, config: Any) -> str | None:
        """Returns why the model cannot run a method: what joins the tiles' tokens counts on tiles of one size."""
        if method == "downsample":
            return "its image is cut into tiles of one size, however small it is"
        return super().obstacle_to(method, config)


def _num_tiles(size: list[int], config: Any) -> int:
    return int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))


def _raster_order(kept: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Returns the kept tokens of all crops, as flat indices tile by tile, in raster order of the joined grid.

    Args:
        kept: [crops, K] kept tokens of each crop.
        grid: Rows and columns of crops.
        side: Tokens along a crop's side.

    Source: Ironieser/MMTok mmtok/llava/llava_arch_mmtok.py, `restore_image_features_sorted`.
    """
    crop = torch.arange(len(kept), device=kept.device)[:, None]
    row = crop // grid[1] * side + kept // side
    column = crop % grid[1] * side + kept % side
    place = (row * grid[1] * side + column).flatten()
    return (crop * side * side + kept).flatten()[place.argsort()]
