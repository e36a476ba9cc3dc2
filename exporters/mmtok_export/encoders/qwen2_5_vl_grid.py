"""Encoder of Qwen2.5-VL for images of any size: the graph computes everything that depends on the grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from mmtok_deploy.dim_range import DimRange
from mmtok_export.encoders.base import ImageSize
from mmtok_export.encoders.qwen import patch_positions
from mmtok_export.encoders.qwen2_5_vl import Qwen25VLEncoder, feed_forward

__all__ = ["Qwen25VLGridEncoder"]


class Qwen25VLGridEncoder(Qwen25VLEncoder):
    """Encodes one image of any size; its `grid_thw` is an input.

    The image is padded to whole windows, and the padding is masked in every layer. So all windows have the same number
    of patches, and only the number of windows differs between images.
    """

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        vision = config.vision_config
        self.window_side = vision.window_size // vision.spatial_merge_size // vision.patch_size

    def prepare(self) -> None:
        """Prepares the weights; there are no constants that depend on a grid."""
        self.prepare_weights()

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns vision [1, N, D] and keys [1, N, d]; see `Encoder.forward`."""
        merge, side = self.config.spatial_merge_size, self.window_side
        group = merge**2
        pixels, rows, columns = self.read_grid(pixels, grid_thw)
        num_rows, num_columns = rows.item(), columns.item()
        # ONNX rounds division towards zero, so negative numbers cannot be used to round up.
        num_windows = ((num_rows + side - 1) // side) * ((num_columns + side - 1) // side)
        slots = torch.arange(num_windows * side**2)
        row, column = self._place(slots, columns)
        is_token = (row < rows) & (column < columns)
        turns = self.angles_of(patch_positions(row, column, merge))
        angles = turns.cos(), turns.sin()
        is_patch = is_token[:, None].expand(-1, group).reshape(-1)
        mask = torch.zeros(is_patch.shape, dtype=self.dtype).masked_fill(~is_patch, torch.finfo(self.dtype).min)

        hidden = F.linear(pixels.to(self.dtype), self.patch_weight).view(-1, group * self.keys_width)
        hidden = hidden.index_select(0, torch.where(is_token, row * columns + column, 0)).view(-1, self.keys_width)
        for idx, block in enumerate(self.visual.blocks):
            is_windowed = idx not in self.config.fullatt_block_indexes
            length = side**2 * group if is_windowed else num_windows * side**2 * group
            hidden = hidden + _attend(block.attn, block.norm1(hidden), angles, mask, length)
            hidden = hidden + feed_forward(block.mlp, block.norm2(hidden))

        merger = self.visual.merger
        vision = merger.mlp(merger.ln_q(hidden).to(self.dtype).view(-1, merger.hidden_size))
        slots = self._slots(torch.arange(num_rows * num_columns), columns)
        return vision.index_select(0, slots)[None], self.keys_of(hidden).index_select(1, slots)

    def _place(self, slots: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Returns row and column of the token at each place of the padded windows."""
        side = self.window_side
        across = (columns + side - 1) // side
        window, place = slots // side**2, slots % side**2
        return window // across * side + place // side, window % across * side + place % side

    def _slots(self, tokens: Tensor, columns: Tensor) -> Tensor:
        """Returns the place of each token in the padded windows, the inverse of `_place`."""
        side = self.window_side
        across = (columns + side - 1) // side
        row, column = tokens // columns, tokens % columns
        return (row // side * across + column // side) * side**2 + row % side * side + column % side


def _attend(attention: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, length: int) -> Tensor:
    """Returns the attention [S, C] within each `length` consecutive patches, without the padding.

    Args:
        attention: Hugging Face's module, for its weights.
        hidden: [S, C], patches in window order.
        angles: cos and sin, [S, head_dim].
        mask: [S], added to the scores.
        length: Number of patches that attend to one another.
    """
    mixed = attention.qkv(hidden).view(-1, 3 * attention.num_heads, attention.head_dim)
    query, key, value = mixed.split(attention.num_heads, dim=1)
    query, key = apply_rotary_pos_emb_vision(query, key, *angles)
    query, key, value = (
        each.reshape(-1, length, attention.num_heads, attention.head_dim).transpose(1, 2)
        for each in (query, key, value)
    )
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.view(-1, 1, 1, length))
    output: Tensor = attention.proj(attended.transpose(1, 2).reshape(-1, attention.dim))
    return output
