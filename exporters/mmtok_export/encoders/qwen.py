"""The base class of the Qwens' encoders, with patches and rotary angles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (PyTorch's own abbreviation)
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from mmtok_deploy.dim_range import DimRange
from mmtok_export.checkpoint_config import EncoderError, check_multiples
from mmtok_export.encoders.base import Encoder, ImageSize

__all__ = ["InterpolatingEncoder", "QwenEncoder", "patch_positions"]


class QwenEncoder(Encoder):
    """Encodes images whose sides are multiples of a token's side.

    `pixels` is [B * num_patches, channels * frames * patch * patch].
    """

    has_positions = True
    pixel_scale: ClassVar[Mapping[str, tuple[float, float, float]]]
    """`mean` and `std` of the family's image processor, for values from 0 to 1."""

    def __init__(self, config: Any, image_size: ImageSize, batch: DimRange) -> None:
        super().__init__(config, image_size, batch)
        if not batch.is_fixed:
            raise EncoderError(f"a graph of {self.family} takes a fixed number of images, got {batch}: name one")
        self.takes_grid = isinstance(image_size, DimRange)
        if self.takes_grid and batch.maximum > 1:
            raise EncoderError(
                f"a graph for images of any size takes one at a time, got {batch}: leave --batch-size out"
            )
        vision = config.vision_config
        token_side = vision.patch_size * vision.spatial_merge_size
        if isinstance(image_size, DimRange):
            self.num_tokens = image_size
            rows, columns = _grid_within(image_size)
            image_size = columns * token_side, rows * token_side
        check_multiples(image_size, token_side)
        width, height = image_size
        self.image_size = image_size
        self.config = vision
        self.batch = batch
        self.batch_size = batch.minimum
        self.patches = torch.Size((1, height // vision.patch_size, width // vision.patch_size))
        patch_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.pixel_layout = {
            "layout": "patches",
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
            **self.pixel_scale,
        }
        self.grid = (1, self.patches[1] // vision.spatial_merge_size, self.patches[2] // vision.spatial_merge_size)
        self.vision_width, self.keys_width = self.widths_of(vision)
        if self.takes_grid:
            group = vision.spatial_merge_size**2
            self.pixels_shape = ("patches", patch_width)
            bounds = (self.num_tokens.minimum, self.num_tokens.optimum, self.num_tokens.maximum)
            self.open_sizes = {"patches": DimRange(*(group * each for each in bounds))}
        else:
            self.num_tokens = DimRange.fixed(math.prod(self.grid))
            self.pixels_shape = (self.batch_size * self.patches.numel(), patch_width)

    def widths_of(self, vision: Any) -> tuple[int, int]:
        """Returns D and d.

        Args:
            vision: Configuration of the vision tower.
        """
        return vision.out_hidden_size, vision.hidden_size

    def example(self) -> dict[str, Tensor]:
        """Returns an image of `image_size`, and its grid if the encoder takes it."""
        pixels = torch.zeros(self.batch_size * self.patches.numel(), int(self.pixels_shape[1]))
        return {"pixels": pixels} | ({"grid_thw": torch.tensor([list(self.patches)])} if self.takes_grid else {})

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Returns the dynamic dimensions of the inputs for `torch.export`."""
        return super().dynamic_shapes() | ({"grid_thw": {}} if self.takes_grid else {})

    def constant(self, name: str, value: Tensor) -> None:
        """Adds a tensor that depends only on the grid as a constant of the graph."""
        self.register_buffer(name, value, persistent=False)

    def read_grid(self, pixels: Tensor, grid_thw: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `pixels` unchanged, and rows and columns of the image's tokens, for images of any size.

        The graph adds zeros in the shape of the grid to the pixels, so a runtime refuses a grid with another number of
        patches, with half tokens or with several frames.

        Args:
            pixels: [patches, channels * frames * patch * patch].
            grid_thw: [1, 3] int64, (1, rows, columns) of patches.
        """
        assert grid_thw is not None
        merge = self.config.spatial_merge_size
        rows, columns = grid_thw[0, 1] // merge, grid_thw[0, 2] // merge
        num_rows, num_columns = rows.item(), columns.item()
        for length in (num_rows, num_columns):
            torch._check(length >= 1)
        num_left = (grid_thw[0, 1:] % merge).sum().item()
        num_patches = grid_thw[0, 0].item() ** 2 * num_rows * num_columns * merge**2 + num_left
        torch._check(num_patches == len(pixels))
        return pixels + torch.zeros(num_patches, 1), rows, columns

    def keys_of(self, hidden: Tensor) -> Tensor:
        """Returns the keys [B, N, d] float32: means of the last block's output over the patches of each token."""
        group = self.config.spatial_merge_size**2
        return hidden.view(self.batch_size, -1, group, self.keys_width).float().mean(dim=2)

    def angles_of(self, positions: Tensor) -> Tensor:
        """Returns the rotary angles [S, head_dim] float32 of patches.

        They go by row in the first and third quarter of a head, and by column in the others.

        Args:
            positions: [S, 2] int, row and column of each patch.
        """
        # The default of the configurations.
        base = (getattr(self.config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        quarter = torch.arange(self.keys_width // self.config.num_heads // 4)
        frequencies = 1.0 / base ** (quarter / len(quarter))
        return (positions[:, :, None] * frequencies).flatten(1).repeat(1, 2)

    def attend(self, attention: Any, hidden: Tensor, angles: Sequence[Tensor]) -> Tensor:
        """Returns the attention over the whole image, [B, S, C].

        Args:
            attention: Hugging Face's module, for its weights.
            hidden: [B, S, C], patches, token by token.
            angles: cos and sin, [S, head_dim].
        """
        mixed = attention.qkv(hidden).view(self.batch_size, -1, 3 * attention.num_heads, attention.head_dim)
        query, key, value = mixed.split(attention.num_heads, dim=2)
        query, key = apply_rotary_pos_emb_vision(query, key, *angles)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = attention.proj(attended.transpose(1, 2).reshape(self.batch_size, -1, attention.dim))
        return output


class InterpolatingEncoder(QwenEncoder):
    """An encoder with position embeddings of a square grid, which are interpolated for the image's."""

    position_table: Tensor
    """[side * side, C]."""
    dtype: torch.dtype
    """The weights'."""

    def prepare_grid(self) -> None:
        """Makes the constants of the grid, for images of one size; call it with `position_table` set."""
        if not self.takes_grid:
            rows, columns = map(torch.tensor, self.grid[1:])
            named = zip(("position_embeddings", "cos", "sin"), self._of_grid(rows, columns), strict=True)
            for name, value in named:
                self.constant(name, value.detach())
            del self.position_table

    def read(self, pixels: Tensor, grid_thw: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns `pixels`, the patches' position embeddings [S, C], and cos and sin of their angles [S, head_dim]."""
        if self.takes_grid:
            pixels, rows, columns = self.read_grid(pixels, grid_thw)
            embedded, *angles = self._of_grid(rows, columns)
        else:
            embedded, *angles = (self.get_buffer(name) for name in ("position_embeddings", "cos", "sin"))
        return pixels, embedded, angles

    def interpolate(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Returns position embeddings [S, C] float32.

        Args:
            positions: [S, 2] int, row and column of each patch.
            lengths: [2] int, rows and columns of the grid.
        """
        raise NotImplementedError

    def _of_grid(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the patches' position embeddings, and cos and sin of their rotary angles.

        Args:
            rows: [] int, number of rows of tokens.
            columns: [] int, number of columns of tokens.
        """
        merge = self.config.spatial_merge_size
        tokens = torch.arange(rows.item() * columns.item())
        positions = patch_positions(tokens // columns, tokens % columns, merge)
        embedded = self.interpolate(positions, torch.stack([rows, columns]) * merge)
        angles = self.angles_of(positions)
        return embedded.to(self.dtype), angles.cos(), angles.sin()


def patch_positions(rows: Tensor, columns: Tensor, merge_size: int) -> Tensor:
    """Returns row and column of the patches of each token, token by token, [T * merge_size ** 2, 2] int.

    Args:
        rows: [T] int, rows of the tokens.
        columns: [T] int, columns of the tokens.
        merge_size: Number of patches on a side of a token.
    """
    within = torch.arange(merge_size)
    row = (rows[:, None, None] * merge_size + within[:, None]).expand(-1, merge_size, merge_size)
    column = (columns[:, None, None] * merge_size + within).expand(-1, merge_size, merge_size)
    return torch.stack([row, column], dim=-1).reshape(-1, 2)


def _grid_within(num_tokens: DimRange) -> tuple[int, int]:
    """Returns rows and columns of a nearly square image with about the optimal number of tokens."""
    for columns in range(math.isqrt(num_tokens.optimum), 1, -1):
        rows = num_tokens.optimum // columns
        if rows * columns in num_tokens:
            return rows, columns
    return num_tokens.optimum, 1
