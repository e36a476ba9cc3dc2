"""Encoder of Qwen2.5-VL for images of one size: window attention, the merger, and tokens in raster order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from mmtok_deploy.dim_range import DimRange
from mmtok_export.encoders.base import ImageSize, as_matrix
from mmtok_export.encoders.qwen import QwenEncoder
from mmtok_export.pixels import CLIP_SCALE

__all__ = ["Qwen25VLEncoder", "feed_forward"]


class Qwen25VLEncoder(QwenEncoder):
    """Encodes images into tokens of 28 x 28 px.

    Patches are reordered by windows once, as in Hugging Face's model, so the patches of a window follow one another.
    Layers with windows compute attention in one batch of windows, [B * W, L]; windows at the image's edge are padded to
    L and masked. Rotary angles, orders and the mask depend only on the grid and are constants of the graph.

    The keys are the last block's output before the merger, averaged over each merged group of patches, in float32.
    This output overflows float16 in Qwen2.5-VL-3B, so with float16 weights the last block's last product and sum are
    float32, too.

    Source: transformers 5.19 models/qwen2_5_vl/modeling_qwen2_5_vl.py, `Qwen2_5_VisionTransformerPretrainedModel`;
        for the overflow, a note in NVIDIA TensorRT-Edge-LLM's visual_models/qwen2_5_vl_model.py.
    """

    family = "qwen2.5-vl"
    pixel_scale = CLIP_SCALE

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel(self.config)

    def prepare(self) -> None:
        """Makes orders, rotary angles and the mask of the windows."""
        self.prepare_weights()
        grid = torch.tensor([self.patches])
        merge = self.config.spatial_merge_size
        order, boundaries = get_vision_window_index(grid, merge, self.config.window_size, self.config.patch_size)
        self.constant("window_order", order)
        self.constant("raster_order", order.argsort())
        positions = get_vision_position_ids(grid, merge).unflatten(0, (-1, merge**2))[order].flatten(0, 1)
        angles = self.angles_of(positions)
        self.constant("cos", angles.cos())
        self.constant("sin", angles.sin())
        self._prepare_windows(boundaries.diff())

    def prepare_weights(self) -> None:
        """Converts the patch embedding to a matrix, and the last block's last product from float16 to float32."""
        patch_embed = self.visual.patch_embed
        self.dtype = patch_embed.proj.weight.dtype
        self.patch_weight = as_matrix(patch_embed.proj.weight)
        del self.visual.patch_embed, self.visual.rotary_pos_emb
        if self.dtype == torch.float16:
            self.visual.blocks[-1].mlp.down_proj.float()

    def _prepare_windows(self, lengths: Tensor) -> None:
        """Makes the indices, the mask and the rotary angles of padded windows.

        Args:
            lengths: [W] int, number of patches in each window.
        """
        self.window_length = int(lengths.max())
        self.has_cut_windows = bool((lengths < self.window_length).any())
        if not self.has_cut_windows:
            return
        is_patch = torch.arange(self.window_length) < lengths[:, None]
        filled = torch.zeros_like(is_patch, dtype=torch.int64)
        filled[is_patch] = torch.arange(int(lengths.sum()))
        self.constant("filled", filled.flatten())
        self.constant("unfilled", is_patch.flatten().nonzero()[:, 0])
        # Added to the scores. For a boolean mask, the exporter would add operations for rows without any patch.
        mask = torch.zeros(is_patch.shape, dtype=self.dtype).masked_fill(~is_patch, torch.finfo(self.dtype).min)
        self.constant("window_mask", mask[:, None, None].repeat(self.batch_size, 1, 1, 1))
        self.constant("window_cos", self.get_buffer("cos")[filled.flatten()])
        self.constant("window_sin", self.get_buffer("sin")[filled.flatten()])

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns vision [B, N, D] and keys [B, N, d]; see `Encoder.forward`."""
        group = self.config.spatial_merge_size**2
        hidden = F.linear(pixels.to(self.dtype), self.patch_weight)
        hidden = hidden.view(self.batch_size, -1, group * hidden.shape[-1])
        hidden = hidden.index_select(1, self.get_buffer("window_order")).view(self.batch_size, -1, self.keys_width)
        for idx, block in enumerate(self.visual.blocks):
            is_windowed = idx not in self.config.fullatt_block_indexes
            hidden = hidden + self._attend(block.attn, block.norm1(hidden), is_windowed)
            hidden = hidden + feed_forward(block.mlp, block.norm2(hidden))

        keys = self.keys_of(hidden)
        merger = self.visual.merger
        groups = merger.ln_q(hidden).to(self.dtype).view(self.batch_size, -1, merger.hidden_size)
        raster_order = self.get_buffer("raster_order")
        return merger.mlp(groups).index_select(1, raster_order), keys.index_select(1, raster_order)

    def _attend(self, attention: Any, hidden: Tensor, is_windowed: bool) -> Tensor:
        """Returns the attention within the windows, or over the whole image, [B, S, C].

        Args:
            attention: Hugging Face's module, for its weights.
            hidden: [B, S, C], patches in window order.
            is_windowed: Whether a patch attends only to its window.
        """
        is_filled = is_windowed and self.has_cut_windows
        length = self.window_length if is_windowed else self.patches.numel()
        cos, sin = (self.get_buffer(f"window_{name}" if is_filled else name) for name in ("cos", "sin"))
        mixed = attention.qkv(hidden)
        if is_filled:
            mixed = mixed.index_select(1, self.get_buffer("filled"))
        mixed = mixed.view(self.batch_size, -1, 3 * attention.num_heads, attention.head_dim)
        query, key, value = mixed.split(attention.num_heads, dim=2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        query, key, value = (
            each.reshape(-1, length, attention.num_heads, attention.head_dim).transpose(1, 2)
            for each in (query, key, value)
        )
        mask = self.get_buffer("window_mask") if is_filled else None
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = attended.transpose(1, 2).reshape(self.batch_size, -1, attention.dim)
        if is_filled:
            attended = attended.index_select(1, self.get_buffer("unfilled"))
        return attention.proj(attended)


def feed_forward(mlp: Any, hidden: Tensor) -> Tensor:
    """Returns the output [..., C] of a block's gated layer, in the dtype of its last product's weights."""
    gated = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
    return mlp.down_proj(gated.to(mlp.down_proj.weight.dtype))
