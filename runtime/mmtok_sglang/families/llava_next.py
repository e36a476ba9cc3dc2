"""LLaVA-NeXT on SGLang's Transformers backend: a base tile and crops, each selected by itself or all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from mmtok_deploy.budget import Budget, tokens_per_tile
from mmtok_deploy.methods import MethodName
from mmtok_sglang.families.base import Family
from mmtok_sglang.families.llava import Llava
from mmtok_sglang.feature_cache import Features
from mmtok_sglang.model import EncodedImage
from mmtok_sglang.server import current
from mmtok_sglang.settings import Settings
from mmtok_sglang.transformers_backend import TransformersModel, TransformersProcessor, separate_images

__all__ = ["LlavaNext"]


class LlavaNextForConditionalGeneration(TransformersModel):
    """The model: SGLang has none of its own."""

    def features_of(self, items: Sequence[Any]) -> list[Features]:
        """Returns what the Transformers backend does; where tiles share a budget, those of an image as one tile."""
        features = super().features_of(items)
        return [each.in_one_piece() for each in features] if current().settings.share_tiles else features

    def join(self, image: EncodedImage, kept: Sequence[Tensor]) -> Tensor:
        """Returns the kept tokens [K, D]: the base tile's first, then the crops' in raster order of their grid."""
        vision, sizes = image.features.vision, self.config.vision_config
        grid = get_anyres_image_grid_shape(
            image.item.image_sizes[0], self.config.image_grid_pinpoints, sizes.image_size
        )
        flat = torch.cat([tokens + tile * vision.shape[1] for tile, tokens in enumerate(kept)])
        return vision.flatten(0, 1)[_raster_order(flat, grid, sizes.image_size // sizes.patch_size)]


class LlavaNextProcessor(TransformersProcessor):
    """The processor."""

    models: ClassVar[list[type]] = [LlavaNextForConditionalGeneration]


class LlavaNext(Llava):
    """The same number of tokens of every tile; no newline tokens and no unpadding between what is kept.

    The base tile's tokens come first, then the crops' in raster order of the grid they form, and positions run on.

    Args:
        shares_tiles: Whether one selection is from all tiles of an image, which share its budget.
    """

    model_class = LlavaNextForConditionalGeneration
    processor_class = LlavaNextProcessor
    obstacle_to_sharing = None

    def __init__(self, *, shares_tiles: bool = False) -> None:
        super().__init__()
        self._shares_tiles = shares_tiles

    def configured(self, settings: Settings) -> Family:
        """Returns the family whose tiles share a budget, if the server's do."""
        return LlavaNext(shares_tiles=True) if settings.share_tiles else self

    def separate_images(self, output: Any, processor: Any) -> None:
        """Splits the images by what the Hugging Face processor counts for their sizes."""
        (bundle,) = output.mm_items
        sizes = bundle.model_specific_data["image_sizes"].tolist()
        counts = processor._processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        separate_images(output, counts)

    def num_kept(self, item: Any, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns tiles x tokens a tile, or the budget of all tiles, or `num_tokens` where that is no fewer."""
        tile_tokens = self.tile_tokens(config)
        num_tiles = _num_tiles(item.image_sizes[0].tolist(), config)
        if self._shares_tiles:
            kept = budget.num_kept(num_tiles * tile_tokens)
            return num_tokens if kept == num_tiles * tile_tokens else min(num_tokens, kept)
        max_tiles = max(_num_tiles(pinpoint, config) for pinpoint in config.image_grid_pinpoints)
        kept = tokens_per_tile(budget, tile_tokens, num_tiles, max_tiles)
        return num_tokens if kept == tile_tokens else min(num_tokens, num_tiles * kept)

    def max_num_kept(self, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns what a tile of the smallest image keeps: a minimum is shared by the fewest tiles."""
        if self._shares_tiles:
            return super().max_num_kept(num_tokens, budget, config)
        tiles = [_num_tiles(pinpoint, config) for pinpoint in config.image_grid_pinpoints]
        return tokens_per_tile(budget, num_tokens, min(tiles), max(tiles))

    def selection_size(self, item: Any, num_tokens: int, num_kept: int, config: Any) -> tuple[int, int]:
        """Returns N and K of a tile, or of all."""
        num_tiles = _num_tiles(item.image_sizes[0].tolist(), config)
        tile_tokens = self.tile_tokens(config)
        return (num_tiles * tile_tokens, num_kept) if self._shares_tiles else (tile_tokens, num_kept // num_tiles)

    def num_selected_from(self, config: Any) -> int | None:
        """Returns the number of patches of a tile; None for all tiles, of which images have different numbers."""
        return None if self._shares_tiles else super().num_selected_from(config)

    def obstacle_to(self, method: MethodName, config: Any) -> str | None:
        """Returns why the model cannot run a method: what joins the tiles' tokens counts on tiles of one size."""
        if method == "downsample":
            return "its image is cut into tiles of one size, however small it is"
        return super().obstacle_to(method, config)


def _num_tiles(size: list[int], config: Any) -> int:
    return int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))


def _raster_order(kept: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Returns kept tokens in the order in which they are read: the base tile's, then those of the crops' joined grid.

    Args:
        kept: [K] int64, tokens of the base tile and the crops, counted tile by tile.
        grid: Rows and columns of crops.
        side: Tokens along a tile's side.

    Source: Ironieser/MMTok mmtok/llava/llava_arch_mmtok.py, `restore_image_features_sorted`.
    """
    crop, token = kept // side**2 - 1, kept % side**2
    row = crop // grid[1] * side + token // side
    column = crop % grid[1] * side + token % side
    in_grid = row * grid[1] * side + column
    return kept[torch.where(crop < 0, kept, side**2 + in_grid).argsort()]
