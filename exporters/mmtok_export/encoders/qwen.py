"""What the encoders of Qwens have in common: patches of any multiple of a token's side, rotary angles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok_export.encoders.base import Encoder, EncoderError

__all__ = ["QwenEncoder", "rotary_angles"]


class QwenEncoder(Encoder):
    """Any multiple of a token's side; `pixels` is [B * num_patches, channels * frames * patch * patch]."""

    has_positions = True
    pixel_scale: ClassVar[Mapping[str, tuple[float, float, float]]]
    """`mean` and `std` of the family's image processor, of values from 0 to 1."""

    def __init__(self, config: Any, image_size: tuple[int, int], batch_size: int) -> None:
        super().__init__(config, image_size, batch_size)
        vision = config.vision_config
        _check_image_size(image_size, vision.patch_size * vision.spatial_merge_size)
        width, height = image_size
        self.config = vision
        self.batch_size = batch_size
        self.patches = torch.Size((1, height // vision.patch_size, width // vision.patch_size))
        patch_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.pixels_shape = (batch_size * self.patches.numel(), patch_width)
        self.pixel_layout = {
            "layout": "patches",
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
            **self.pixel_scale,
        }
        self.grid = (1, self.patches[1] // vision.spatial_merge_size, self.patches[2] // vision.spatial_merge_size)
        self.vision_width = vision.out_hidden_size
        self.keys_width = vision.hidden_size

    def constant(self, name: str, value: Tensor) -> None:
        """Makes a tensor that depends on the grid alone a constant of the graph."""
        self.register_buffer(name, value, persistent=False)

    def keys_of(self, hidden: Tensor) -> Tensor:
        """Returns the keys [B, N, d] float32 of the last block's output: means over what becomes one token."""
        group = self.config.spatial_merge_size**2
        return hidden.view(self.batch_size, -1, group, self.keys_width).float().mean(dim=2)


def rotary_angles(positions: Tensor, config: Any) -> Tensor:
    """Returns [S, head_dim] float32: by row in the first and third quarter of a head, by column in the others.

    Args:
        positions: [S, 2] int, row and column of each patch.
        config: The vision tower's; 10000 is the base where it names none.
    """
    base = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    quarter = torch.arange(config.hidden_size // config.num_heads // 4)
    frequencies = 1.0 / base ** (quarter / len(quarter))
    return (positions[:, :, None] * frequencies).flatten(1).repeat(1, 2)


def _check_image_size(image_size: tuple[int, int], factor: int) -> None:
    nearest = [max(factor, round(length / factor) * factor) for length in image_size]
    if nearest != list(image_size):
        raise EncoderError(
            f"width and height are multiples of {factor} px, got {image_size[0]}x{image_size[1]}: "
            f"the nearest size, and what the image processor makes of it, is {nearest[0]}x{nearest[1]}"
        )
