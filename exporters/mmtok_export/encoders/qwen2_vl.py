"""Encoder of Qwen2-VL: that of Qwen2.5-VL without attention windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mmtok_deploy.dim_range import DimRange
from mmtok_export.encoders.base import ImageSize, as_matrix
from mmtok_export.encoders.qwen import QwenEncoder, patch_positions
from mmtok_export.pixels import CLIP_SCALE

__all__ = ["Qwen2VLEncoder"]


class Qwen2VLEncoder(QwenEncoder):
    """Encodes images into tokens of 28 x 28 px.

    The keys are the last block's output, averaged over each merged group of patches, before the merger.

    Source: transformers 5.19 models/qwen2_vl/modeling_qwen2_vl.py, `Qwen2VisionTransformerPretrainedModel`.
    """

    family = "qwen2-vl"
    pixel_scale = CLIP_SCALE

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        self.visual: Any = Qwen2VisionTransformerPretrainedModel(self.config)

    def widths_of(self, vision: Any) -> tuple[int, int]:
        """Returns D and d; the configuration calls the language model's width the hidden size."""
        return vision.hidden_size, vision.embed_dim

    def prepare(self) -> None:
        """Converts the patch embedding to a matrix; for images of one size, makes the rotary angles."""
        kernel = self.visual.patch_embed.proj.weight
        self.dtype = kernel.dtype
        self.patch_weight = as_matrix(kernel)
        if not self.takes_grid:
            rows, columns = map(torch.tensor, self.grid[1:])
            for name, value in zip(("cos", "sin"), self._of_grid(rows, columns), strict=True):
                self.constant(name, value)
        del self.visual.patch_embed, self.visual.rotary_pos_emb

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns vision [B, N, D] and keys [B, N, d]; see `Encoder.forward`."""
        if self.takes_grid:
            pixels, rows, columns = self.read_grid(pixels, grid_thw)
            angles = self._of_grid(rows, columns)
        else:
            angles = self.get_buffer("cos"), self.get_buffer("sin")
        hidden = F.linear(pixels.to(self.dtype), self.patch_weight).view(self.batch_size, -1, self.keys_width)
        for block in self.visual.blocks:
            hidden = hidden + self.attend(block.attn, block.norm1(hidden), angles)
            hidden = hidden + block.mlp(block.norm2(hidden))
        vision: Tensor = self.visual.merger(hidden).view(self.batch_size, -1, self.vision_width)
        return vision, self.keys_of(hidden)

    def _of_grid(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sin of the patches' rotary angles, [S, head_dim].

        Args:
            rows: [] int, number of rows of tokens.
            columns: [] int, number of columns of tokens.
        """
        tokens = torch.arange(rows.item() * columns.item())
        angles = self.angles_of(patch_positions(tokens // columns, tokens % columns, self.config.spatial_merge_size))
        return angles.cos(), angles.sin()
