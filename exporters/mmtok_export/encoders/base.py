"""The base class of the exported encoders, and the result of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from mmtok_deploy.dim_range import DimRange

__all__ = ["Encoder", "ExportedEncoder", "ImageSize", "as_matrix"]

ImageSize = tuple[int, int] | DimRange
"""(width, height) in pixels; or, for images of any size, the range of their numbers of tokens."""


class Encoder(nn.Module):
    """A vision tower and its projector; each model family has a subclass.

    The module is made on the meta device, where it takes no memory. Then its weights are loaded by name (attributes
    have the names of the checkpoint, see `checkpoint.py`), and `prepare` adds all other tensors.

    Args:
        config: The checkpoint's configuration, as Transformers reads it.
        image_size: Size of the images.
        batch: B, the number of images in a call.

    Attributes:
        family: The preset's name.
        has_positions: Whether the language model uses (t, h, w) positions (M-RoPE) instead of consecutive ones.
        batch: B.
        num_tokens: N.
        image_size: (width, height) in pixels of an image that it accepts.
        grid: (t, h, w) of the tokens of an image of this size.
        pixels_shape: Shape of `pixels` from the family's image processor for B images; dynamic dimensions are names.
        open_sizes: Ranges of these names, except B.
        pixel_layout: `layout` "images" ([B, 3, height, width]) or "patches" (`pixels.patches_of`, with its arguments),
            and `mean` and `std` of the image processor.
        vision_width: D.
        keys_width: d.
        num_levels: L, the number of the language model's layers to which DeepStack adds features.
        tiles: Range of an image's number of tiles, if B is the tiles of one image; else None.
        takes_grid: Whether `grid_thw` is an input in addition to `pixels`.

    Raises:
        EncoderError: The configuration is not one of the family, or the image size or batch is not supported.
    """

    family: str
    has_positions: bool
    batch: DimRange
    num_tokens: DimRange
    image_size: tuple[int, int]
    grid: tuple[int, int, int]
    pixels_shape: tuple[int | str, ...]
    open_sizes: Mapping[str, DimRange] = {}
    pixel_layout: dict[str, Any]
    vision_width: int
    keys_width: int
    num_levels: int = 0
    tiles: DimRange | None = None
    takes_grid: bool = False

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__()

    @classmethod
    def native_image_size(cls, content: dict[str, Any]) -> tuple[int, int] | None:
        """Returns the only (width, height) that the encoder of a config.json accepts; None if it accepts several."""
        return None

    @classmethod
    def native_batch(cls, config: Any) -> DimRange:
        """Returns the default of B.

        Args:
            config: The checkpoint's configuration, as Transformers reads it.
        """
        return DimRange.fixed(1)

    @classmethod
    def read_config(cls, checkpoint: Path) -> Any:
        """Returns the checkpoint's configuration as an object of Transformers' class."""
        return AutoConfig.from_pretrained(checkpoint)

    def parameters_in(self, stored: str) -> Sequence[str]:
        """Returns the names of the parameters whose rows a tensor of the checkpoint contains, in this order.

        Names of older checkpoints begin with "visual." or "vision_tower.vision_model.", those of newer ones with
        "model.".

        Args:
            stored: The tensor's name.
        """
        return [stored.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.", 1)]

    def example(self) -> dict[str, Tensor]:
        """Returns inputs to trace the module with."""
        # A dynamic dimension needs a size above 1: PyTorch would take 1 for a fixed size.
        sizes = {name: max(2, size.minimum) for name, size in {"B": self.batch, **self.open_sizes}.items()}
        return {"pixels": torch.zeros([sizes[size] if isinstance(size, str) else size for size in self.pixels_shape])}

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Returns the dynamic dimensions of the inputs for `torch.export`."""
        open_axes = (axis for axis, size in enumerate(self.pixels_shape) if isinstance(size, str))
        return {"pixels": dict.fromkeys(open_axes, torch.export.Dim.DYNAMIC)}

    def prepare(self) -> None:
        """Makes positions, orders and masks, after the weights have been loaded."""
        raise NotImplementedError

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns vision [B, N, D] in the weights' dtype, and keys [B, N, d] in this dtype or float32, in raster order.

        With DeepStack, its features [B, N, L * D] are a third output.

        Args:
            pixels: [*pixels_shape] float32.
            grid_thw: [1, 3] int64, (1, rows, columns) of patches, the image processor's `image_grid_thw`; only if the
                encoder `takes_grid`.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class ExportedEncoder:
    """An ONNX model with the inputs of `Encoder.forward` and its outputs `vision`, `keys` and any `levels`.

    Args:
        model: The model; its weights share PyTorch's memory, so save it with external data.
        module: The module that was exported.
    """

    model: onnx_ir.Model
    module: Encoder


def as_matrix(kernel: Tensor) -> nn.Parameter:
    """Returns the weights of a convolution whose stride equals its kernel, as a matrix [outputs, inputs] for patches.

    The product is the same, and ONNX supports it in bfloat16, too.
    """
    return nn.Parameter(kernel.flatten(1), requires_grad=False)
