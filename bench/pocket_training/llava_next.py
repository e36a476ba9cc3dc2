"""The pocket LLaVA-NeXT: the pocket LLaVA-1.5 with an encoder that sees a scene in five tiles of 56 px."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from mmtok_bench.pocket.scenes import SCENE_PX
from pocket_training.llava import PocketLlava, config_parts, processor_parts, sides_of
from pocket_training.model import GRID, PATCH_PX

__all__ = ["CROPS", "TILE_GRID", "TILE_PX", "PocketLlavaNext", "in_reading_order"]

CROPS = 2
"""Crops of a scene in a row and in a column."""
TILE_PX = SCENE_PX // CROPS
"""Side in pixels of a tile: the whole scene at half of its size, or a crop of it."""
TILE_GRID = TILE_PX // PATCH_PX
"""Patches in a row and in a column of a tile."""

_POSITIONS = "model.vision_tower.embeddings.position_embedding.weight"


class PocketLlavaNext(PocketLlava):
    """`LlavaNextForConditionalGeneration` with the pocket LLaVA-1.5's parts; its encoder has 49 positions."""

    def features(self, pixels: Tensor) -> Tensor:
        """Returns [B, 245, 128], the patches of the base tile and the crops, for tiles [B, 5, 3, 56, 56], 0 to 255."""
        by_tile = super().features(pixels.flatten(0, 1))
        return by_tile.reshape(len(pixels), -1, by_tile.shape[-1])

    def image_tokens(self, features: Tensor) -> Tensor:
        """Returns [B, 259, 192]: the base tile's tokens, then the crops' joined rows, each with a newline."""
        base, *crops = super().image_tokens(features).unflatten(1, (-1, TILE_GRID, TILE_GRID)).unbind(1)
        rows = [torch.cat(crops[row : row + CROPS], dim=2) for row in range(0, CROPS**2, CROPS)]
        return in_reading_order(base.flatten(1, 2), torch.cat(rows, dim=1).flatten(1, 2), self._newline)

    @property
    def _newline(self) -> Tensor:
        newline: Tensor = self.model.model.image_newline
        return newline

    def _trained_weights(self, checkpoint: Path) -> dict[str, Tensor]:
        """Returns the weights of the pocket LLaVA-1.5, with the mean of four neighbours' positions for one."""
        trained = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        weights: dict[str, Tensor] = trained.state_dict()
        positions = weights[_POSITIONS]
        in_grid = positions[1:].T.unflatten(1, (GRID, GRID))
        weights[_POSITIONS] = torch.cat([positions[:1], functional.avg_pool2d(in_grid, CROPS).flatten(1).T])
        weights["model.image_newline"] = self._newline
        return weights

    def _make_processor(self) -> Any:
        """Returns the LlavaNextProcessor: images of any size to five tiles."""
        image_processor = transformers.LlavaNextImageProcessor(
            image_grid_pinpoints=[[SCENE_PX, SCENE_PX]], **sides_of(TILE_PX)
        )
        return transformers.LlavaNextProcessor(image_processor=image_processor, **processor_parts())

    def _make_model(self, tokenizer: Any) -> Any:
        return transformers.LlavaNextForConditionalGeneration(
            transformers.LlavaNextConfig(
                image_grid_pinpoints=[[SCENE_PX, SCENE_PX]], **config_parts(tokenizer, image_px=TILE_PX)
            )
        )


def in_reading_order(base: Tensor, joined: Tensor, newline: Tensor) -> Tensor:
    """Returns [..., 259, D], what the language model reads of an image.

    Args:
        base: [..., 49, D], of the base tile's tokens.
        joined: [..., 196, D], of the crops' tokens, in raster order of the grid that they form.
        newline: [D], what follows each row of that grid.
    """
    rows = joined.unflatten(-2, (GRID, GRID))
    newlines = newline.to(rows.dtype).expand(*rows.shape[:-2], 1, -1)
    return torch.cat([base, torch.cat([rows, newlines], dim=-2).flatten(-3, -2)], dim=-2)
