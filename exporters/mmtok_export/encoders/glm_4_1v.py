"""Encoders of GLM-4.1V to 4.6V: attention to the whole image, and a convolution before the merger."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeVisionModel

from mmtok_deploy.dim_range import DimRange
from mmtok_export.encoders.base import ImageSize, as_matrix
from mmtok_export.encoders.qwen import InterpolatingEncoder
from mmtok_export.pixels import CLIP_SCALE

__all__ = ["Glm41VEncoder", "Glm45VEncoder"]


class Glm41VEncoder(InterpolatingEncoder):
    """Encodes images into tokens of 28 x 28 px.

    The keys are the normalised output of the last block, averaged over the patches that the convolution joins.

    Source: transformers 5.19 models/glm4v/modeling_glm4v.py, `Glm4vVisionModel`.
    """

    family = "glm-4.1v"
    vision_model: ClassVar[type[nn.Module]] = Glm4vVisionModel
    pixel_scale = CLIP_SCALE

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        self.visual: Any = self.vision_model(self.config)

    def prepare(self) -> None:
        """Converts both convolutions to matrices; for images of one size, makes the constants of the grid."""
        visual = self.visual
        kernel = visual.patch_embed.proj
        self.dtype = kernel.weight.dtype
        self.patch_weight, self.patch_bias = as_matrix(kernel.weight), kernel.bias
        joint = visual.downsample
        # The patches of a token lie one after another, each with all its channels.
        self.joint_weight, self.joint_bias = as_matrix(joint.weight.permute(0, 2, 3, 1)), joint.bias
        self.position_table = visual.embeddings.position_embedding.weight
        self.prepare_grid()
        del visual.patch_embed, visual.rotary_pos_emb, visual.embeddings, visual.downsample

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns vision [B, N, D] and keys [B, N, d]; see `Encoder.forward`."""
        pixels, embedded, angles = self.read(pixels, grid_thw)
        visual = self.visual
        hidden = F.linear(pixels.to(self.dtype), self.patch_weight, self.patch_bias)
        hidden = visual.post_conv_layernorm(hidden.view(self.batch_size, -1, self.keys_width)) + embedded
        for block in visual.blocks:
            hidden = hidden + self.attend(block.attn, block.norm1(hidden), angles)
            hidden = hidden + block.mlp(block.norm2(hidden))
        hidden = visual.post_layernorm(hidden)
        groups = hidden.view(self.batch_size, -1, self.config.spatial_merge_size**2 * self.keys_width)
        vision: Tensor = visual.merger(F.linear(groups, self.joint_weight, self.joint_bias))
        return vision, self.keys_of(hidden)

    def interpolate(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Returns position embeddings [S, C] float32, bicubic, of places in the middle of patches."""
        side = math.isqrt(len(self.position_table))
        table = self.position_table.float().view(1, side, side, self.keys_width).permute(0, 3, 1, 2)
        places = ((positions.float() + 0.5) / lengths) * 2 - 1
        sampled = F.grid_sample(
            table, places.flip(1).view(1, -1, 1, 2), mode="bicubic", padding_mode="border", align_corners=False
        )
        return sampled.view(self.keys_width, -1).T


class Glm45VEncoder(Glm41VEncoder):
    """The same encoder for models with a mixture of experts."""

    family = "glm-4.5v"
    vision_model: ClassVar = Glm4vMoeVisionModel
