"""Qwen3-VL's encoder, dense and mixture of experts: attention to the whole image, the merger, and DeepStack's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel, apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from mmtok_deploy.dim_range import DimRange
from mmtok_export.encoders.base import ImageSize, as_matrix
from mmtok_export.encoders.qwen import QwenEncoder, rotary_angles

__all__ = ["Qwen3VLEncoder", "Qwen3VLMoeEncoder"]


class Qwen3VLEncoder(QwenEncoder):
    """Tokens of 32 x 32 px; beside them what DeepStack adds to the language model's first layers, a part a layer.

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
        """Makes rotary angles and interpolates the position embeddings to the grid."""
        visual, grid, merge = self.visual, torch.tensor([self.patches]), self.config.spatial_merge_size
        kernel = visual.patch_embed.proj
        self.dtype = kernel.weight.dtype
        self.patch_weight, self.patch_bias = as_matrix(kernel.weight), kernel.bias
        corners, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        embedded = (visual.pos_embed.weight[corners] * weights[:, :, None]).sum(dim=1)
        self.constant("position_embeddings", embedded.to(self.dtype).detach())
        angles = rotary_angles(get_vision_position_ids(grid, merge), self.config)
        self.constant("cos", angles.cos())
        self.constant("sin", angles.sin())
        del visual.patch_embed, visual.rotary_pos_emb, visual.pos_embed

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns vision [B, N, D], keys [B, N, d] and, with DeepStack, levels [B, N, L * D]."""
        hidden = F.linear(pixels.to(self.dtype), self.patch_weight, self.patch_bias)
        hidden = hidden.view(self.batch_size, -1, self.keys_width) + self.get_buffer("position_embeddings")
        levels: list[Tensor] = []
        for idx, block in enumerate(self.visual.blocks):
            hidden = hidden + self._attend(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
            if idx in self.level_blocks:
                levels.append(self._merged(self.visual.deepstack_merger_list[len(levels)], hidden))
        features = self._merged(self.visual.merger, hidden), self.keys_of(hidden)
        return (*features, torch.cat(levels, dim=2)) if levels else features

    def _merged(self, merger: Any, hidden: Tensor) -> Tensor:
        """Returns [B, N, D]."""
        tokens: Tensor = merger(hidden).view(self.batch_size, -1, self.vision_width)
        return tokens

    def _attend(self, attention: Any, hidden: Tensor) -> Tensor:
        """Returns [B, S, C]: attention over the image.

        Args:
            attention: Hugging Face's module, for its weights.
            hidden: [B, S, C], patches, those of a token after one another.
        """
        mixed = attention.qkv(hidden).view(self.batch_size, -1, 3 * attention.num_heads, attention.head_dim)
        query, key, value = mixed.split(attention.num_heads, dim=2)
        query, key = apply_rotary_pos_emb_vision(query, key, self.get_buffer("cos"), self.get_buffer("sin"))
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = attention.proj(attended.transpose(1, 2).reshape(self.batch_size, -1, attention.dim))
        return output


class Qwen3VLMoeEncoder(Qwen3VLEncoder):
    """The same encoder, before a mixture of experts."""

    family = "qwen3-vl-moe"
