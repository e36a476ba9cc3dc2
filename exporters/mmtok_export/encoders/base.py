"""What an encoder is to the exporter, and what its export returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

__all__ = ["Encoder", "EncoderError", "ExportedEncoder", "as_matrix"]


class EncoderError(ValueError):
    """A checkpoint, an image size or a type that no encoder can be exported from."""


class Encoder(nn.Module):
    """A vision tower and its projector, for images of one size; one subclass a model family.

    Made on the meta device, where it takes no memory. Weights then come by name (attributes are named as in the
    checkpoint, see `checkpoint.py`), and `prepare` adds what is no weight.

    Args:
        config: The checkpoint's configuration, as Transformers reads it.
        image_size: (width, height) in pixels.
        batch_size: B, images a call.

    Attributes:
        family: The preset's name.
        has_positions: Whether the language model reads (t, h, w) positions (M-RoPE) and not a running number.
        pixels_shape: Shape of `pixels`, as the family's image processor yields it for B images.
        pixel_layout: `layout` "images" ([B, 3, height, width]) or "patches" (`pixels.patches_of`, with its arguments),
            and `mean` and `std` of the image processor.
        grid: (t, h, w) of one image's tokens.
        vision_width: D.
        keys_width: d.
        num_levels: L, layers of the language model that DeepStack adds a part of the features to.

    Raises:
        EncoderError: A configuration that the family does not have, or an image size that it does not take.
    """

    family: str
    has_positions: bool
    pixels_shape: tuple[int, ...]
    pixel_layout: dict[str, Any]
    grid: tuple[int, int, int]
    vision_width: int
    keys_width: int
    num_levels: int = 0

    def __init__(self, config: Any, image_size: tuple[int, int], batch_size: int) -> None:
        super().__init__()

    @classmethod
    def native_image_size(cls, content: dict[str, Any]) -> tuple[int, int] | None:
        """Returns the only (width, height) that a config.json's encoder takes, None if it takes many."""
        return None

    def prepare(self) -> None:
        """Makes positions, orders and masks, once the weights are there."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Returns vision [B, N, D] of the weights' dtype, and keys [B, N, d] of that or float32, in raster order.

        Where there are levels, they are a third output, [B, N, L * D].

        Args:
            pixels: [*pixels_shape] float32.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class ExportedEncoder:
    """An ONNX model with the input `pixels` and the outputs `vision` [B, N, D] and `keys` [B, N, d], all static.

    With DeepStack it has `levels` [B, N, L * D], too: what is added to the first L layers at each token's place.

    Args:
        model: Its weights are PyTorch's memory, not a copy; save it with external data.
        module: What was exported.
        family: The preset's name.
        image_size: (width, height) in pixels.
        batch_size: B.
        pixels_shape: Shape of `pixels`, float32, as the Hugging Face image processor yields it.
        grid: (t, h, w) of one image's tokens, t = 1; token i stands at (0, i // w, i % w).
        vision_width: D.
        keys_width: d.
        dtype: The dtype of the weights and of `vision`. `keys` are as the family computes them: float32 where they are
            means (Qwens), else of this type.
        has_positions: Whether the language model reads (t, h, w) positions (M-RoPE) and not a running number.
    """

    model: onnx_ir.Model
    module: Encoder
    family: str
    image_size: tuple[int, int]
    batch_size: int
    pixels_shape: tuple[int, ...]
    grid: tuple[int, int, int]
    vision_width: int
    keys_width: int
    dtype: torch.dtype
    has_positions: bool

    @property
    def num_tokens(self) -> int:
        """N, the tokens of one image."""
        frames, rows, columns = self.grid
        return frames * rows * columns


def as_matrix(kernel: Tensor) -> nn.Parameter:
    """Returns [outputs, inputs]: the weights of a convolution whose stride is its kernel, for patches that are cut.

    The same product, and one that ONNX's operators take in bfloat16 as well.
    """
    return nn.Parameter(kernel.flatten(1), requires_grad=False)
