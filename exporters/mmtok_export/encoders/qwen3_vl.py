"""Encoders of Qwen3-VL, dense and mixture of experts: attention to the whole image, and DeepStack's mergers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from mmtok_deploy.dim_range import DimRange
from mmtok_export.encoders.base import ImageSize, as_matrix
from mmtok_export.encoders.qwen import InterpolatingEncoder

__all__ = ["Qwen3VLEncoder", "Qwen3VLMoeEncoder"]


class Qwen3VLEncoder(InterpolatingEncoder):
    """Encodes images into tokens of 32 x 32 px, and DeepStack's features for the language model's first layers.

    The keys are the last block's output, averaged over each merged group of patches, before the merger.

    Source: transformers 5.19 models/qwen3_vl/modeling_qwen3_vl.py, `Qwen3VLVisionModel`.
    """

    family = "qwen3-vl"
    vision_model: ClassVar[type[nn.Module]] = Qwen3VLVisionModel
    pixel_scale: ClassVar = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        self.visual: Any = self.vision_model(self.config)
        self.level_blocks = list(getattr(self.visual, "deepstack_visual_indexes", []))
        self.num_levels = len(self.level_blocks)

    def prepare(self) -> None:
        """Converts the patch embedding to a matrix; for images of one size, makes the constants of the grid."""
        visual = self.visual
        kernel = visual.patch_embed.proj
        self.dtype = kernel.weight.dtype
        self.patch_weight, self.patch_bias = as_matrix(kernel.weight), kernel.bias
        self.position_table = visual.pos_embed.weight
        self.prepare_grid()
        del visual.patch_embed, visual.rotary_pos_emb, visual.pos_embed

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns vision [B, N, D], keys [B, N, d] and, with DeepStack, levels [B, N, L * D]."""
        pixels, embedded, angles = self.read(pixels, grid_thw)
        hidden = F.linear(pixels.to(self.dtype), self.patch_weight, self.patch_bias)
        hidden = hidden.view(self.batch_size, -1, self.keys_width) + embedded
        levels: list[Tensor] = []
        for idx, block in enumerate(self.visual.blocks):
            hidden = hidden + self.attend(block.attn, block.norm1(hidden), angles)
            hidden = hidden + block.mlp(block.norm2(hidden))
            if idx in self.level_blocks:
                levels.append(self._merged(self.visual.deepstack_merger_list[len(levels)], hidden))
        features = self._merged(self.visual.merger, hidden), self.keys_of(hidden)
        return (*features, torch.cat(levels, dim=2)) if levels else features

    def interpolate(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Returns position embeddings [S, C] float32, bilinear, with aligned corners.

        Source: transformers 5.19 vision_utils.py, `get_vision_interpolation_indices_and_weights` with "bilinear" and
            `align_corners`.
        """
        table = self.position_table
        side = math.isqrt(len(table))
        places = positions.float() * (side - 1) / (lengths - 1).clamp(min=1)
        before = places.floor()
        below, right = (places - before).split(1, dim=1)
        row, column = before.long().unbind(1)
        next_row, next_column = (each.clamp(max=side - 1) for each in (row + 1, column + 1))
        upper = table[row * side + column] * (1 - right) + table[row * side + next_column] * right
        lower = table[next_row * side + column] * (1 - right) + table[next_row * side + next_column] * right
        return upper * (1 - below) + lower * below

    def _merged(self, merger: Any, hidden: Tensor) -> Tensor:
        """Returns the merged tokens [B, N, D]."""
        tokens: Tensor = merger(hidden).view(self.batch_size, -1, self.vision_width)
        return tokens


class Qwen3VLMoeEncoder(Qwen3VLEncoder):
    """The same encoder for models with a mixture of experts."""

    family = "qwen3-vl-moe"
