"""What an encoder is to the exporter, and what its export returns."""

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

__all__ = ["Encoder", "EncoderError", "ExportedEncoder", "ImageSize", "as_matrix"]

ImageSize = tuple[int, int] | DimRange
"""(width, height) in pixels; or, for images of any size, how many tokens they may have."""


class EncoderError(ValueError):
    """A checkpoint, an image size or a type that no encoder can be exported from."""


class Encoder(nn.Module):
    """A vision tower and its projector; one subclass a model family.

    Made on the meta device, where it takes no memory. Weights then come by name (attributes are named as in the
    checkpoint, see `checkpoint.py`), and `prepare` adds what is no weight.

    Args:
        config: The checkpoint's configuration, as Transformers reads it.
        image_size: The images' size.
        batch: B, images a call.

    Attributes:
        family: The preset's name.
        has_positions: Whether the language model reads (t, h, w) positions (M-RoPE) and not a running number.
        batch: B.
        num_tokens: N.
        image_size: (width, height) in pixels, of one of the images that it takes.
        grid: (t, h, w) of the tokens of an image of that size.
        pixels_shape: Shape of `pixels`, as the family's image processor yields it for B images; open sizes are names.
        open_sizes: The ranges of these names, but for B.
        pixel_layout: `layout` "images" ([B, 3, height, width]) or "patches" (`pixels.patches_of`, with its arguments),
            and `mean` and `std` of the image processor.
        vision_width: D.
        keys_width: d.
        num_levels: L, layers of the language model that DeepStack adds a part of the features to.
        tiles: How many tiles the images of a family have that cuts each into tiles, which are its B; else None.
        takes_grid: Whether `grid_thw` is an input beside `pixels`.

    Raises:
        EncoderError: A configuration that the family does not have, or an image size or batch that it does not take.
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
        """Returns the only (width, height) that a config.json's encoder takes, None if it takes many."""
        return None

    @classmethod
    def native_batch(cls, config: Any) -> DimRange:
        """Returns B where nobody names it.

        Args:
            config: The checkpoint's configuration, as Transformers reads it.
        """
        return DimRange.fixed(1)

    @classmethod
    def read_config(cls, checkpoint: Path) -> Any:
        """Returns the checkpoint's configuration, as Transformers' class has it."""
        return AutoConfig.from_pretrained(checkpoint)

    def parameters_in(self, stored: str) -> Sequence[str]:
        """Returns the names of the parameters that a tensor of the checkpoint holds, one after another in its rows.

        Older checkpoints keep the towers at the top ("visual.", "vision_tower.vision_model."), newer ones below
        "model.".

        Args:
            stored: The tensor's name.
        """
        return [stored.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.", 1)]

    def example(self) -> dict[str, Tensor]:
        """Returns inputs to trace the module with."""
        # More than one image where their number is open: PyTorch takes a size of 1 for fixed.
        sizes = {name: max(2, size.minimum) for name, size in {"B": self.batch, **self.open_sizes}.items()}
        return {"pixels": torch.zeros([sizes[size] if isinstance(size, str) else size for size in self.pixels_shape])}

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Returns the open sizes of the inputs, as `torch.export` takes them."""
        open_axes = (axis for axis, size in enumerate(self.pixels_shape) if isinstance(size, str))
        return {"pixels": dict.fromkeys(open_axes, torch.export.Dim.DYNAMIC)}

    def prepare(self) -> None:
        """Makes positions, orders and masks, once the weights are there."""
        raise NotImplementedError

    def forward(self, pixels: Tensor, grid_thw: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns vision [B, N, D] of the weights' dtype, and keys [B, N, d] of that or float32, in raster order.

        Where there are levels, they are a third output, [B, N, L * D].

        Args:
            pixels: [*pixels_shape] float32.
            grid_thw: [1, 3] int64, (1, rows, columns) of patches, as the image processor's `image_grid_thw`; where the
                encoder `takes_grid`.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class ExportedEncoder:
    """An ONNX model with the inputs of `Encoder.forward` and its outputs `vision`, `keys` and any `levels`.

    Args:
        model: Its weights are PyTorch's memory, not a copy; save it with external data.
        module: What was exported.
    """

    model: onnx_ir.Model
    module: Encoder


def as_matrix(kernel: Tensor) -> nn.Parameter:
    """Returns [outputs, inputs]: the weights of a convolution whose stride is its kernel, for patches that are cut.

    The same product, and one that ONNX's operators take in bfloat16 as well.
    """
    return nn.Parameter(kernel.flatten(1), requires_grad=False)
