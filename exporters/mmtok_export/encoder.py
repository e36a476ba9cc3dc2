"""A vision encoder and the selection in one graph: pixels in, kept tokens out."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder
from torch import Tensor

from mmtok_deploy.budget import Budget, tokens_per_tile
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.presets import PRESETS
from mmtok_export.encoders import EncoderError, ImageSize, describe_encoder, export_encoder, native_image_size
from mmtok_export.encoders.base import Encoder as Module
from mmtok_export.join import builder_on, join_selection
from mmtok_export.selection_graph import FEATURE_DTYPES
from mmtok_export.spec import FeatureDtype, Form, SelectionSpec, num_kept, share_of
from mmtok_export.whole_graph import Encoder

__all__ = ["JoinedEncoder", "build_joined_encoder", "num_kept_of", "takes_grid"]


@dataclass(frozen=True, slots=True)
class JoinedEncoder:
    """An encoder and its selection in one model.

    Args:
        model: Inputs are `pixels`, `text`, `text_mask`, `excluded`, for images of any size `grid_thw`, and for tiles
            `tile_grid`. Outputs are those of the selection, for a model with M-RoPE `positions`, for one with DeepStack
            `deepstack_tokens`, and for tiles `joined_tokens`.
        spec: The selection's sizes and constants.
        details: Entries of the manifest.
        dimensions: Ranges of the dynamic dimensions that are not the selection's.
        encoder: Runs the PyTorch module without the selection.
    """

    model: ir.Model
    spec: SelectionSpec
    details: dict[str, Any]
    dimensions: dict[str, DimRange]
    encoder: Encoder


def build_joined_encoder(
    checkpoint: Path,
    image_size: ImageSize | None,
    budget: int,
    *,
    takes_budget: bool = False,
    share: Fraction | None = None,
    is_unpruned_given: bool = False,
    num_words: DimRange,
    dtype: FeatureDtype,
    form: Form,
    batch: DimRange | None = None,
    config: SelectionConfig | None = None,
    random_weights: bool = False,
) -> JoinedEncoder:
    """Returns the checkpoint's vision tower, projector and selection as one ONNX model.

    Args:
        checkpoint: Hugging Face checkpoint directory.
        image_size: (width, height) in pixels, or N for images of any size; None for a model with one size.
        budget: K.
        takes_budget: Whether the budget is an input; K is then the largest budget.
        share: The share of an image's tokens to keep instead of a number, for images of any size.
        is_unpruned_given: Whether all tokens are an output, too.
        num_words: M.
        dtype: The dtype of the weights, the text and the kept tokens.
        form: Form of the selection's graph.
        batch: B; by default the family's.
        config: Temperatures, weight, coverage; by default the family's preset.
        random_weights: Read only config.json, and draw random weights.

    Raises:
        EncoderError: The checkpoint, the image size or the dtype is not supported.
        ValueError: The budget is above the image's number of tokens.
    """
    size = _size(checkpoint, image_size)
    exported = export_encoder(checkpoint, size, dtype=getattr(torch, dtype), batch=batch, random_weights=random_weights)
    encoder, graph = exported.module, exported.model.graph
    vision, keys, *levels = graph.outputs
    graph.outputs.clear()
    spec = SelectionSpec(
        budget=budget,
        num_tokens=encoder.num_tokens,
        num_words=num_words,
        batch=encoder.batch,
        vision_width=encoder.vision_width,
        keys_width=encoder.keys_width,
        dtype=dtype,
        keys_dtype=next(name for name, each in FEATURE_DTYPES.items() if each == keys.dtype),
        config=config or PRESETS[encoder.family].config,
        form=form,
        takes_budget=takes_budget,
        share=share,
    )
    builder = builder_on(graph)
    edges = join_selection(
        builder,
        vision,
        keys,
        spec,
        levels=levels[0] if levels else None,
        grid_width=_grid_width(builder, encoder),
        tile_side=encoder.grid[1] if encoder.tiles else None,
        is_unpruned_given=is_unpruned_given,
    )
    details = {
        "family": encoder.family,
        "image_size": list(encoder.image_size),
        "grid": list(encoder.grid),
        "random_weights": random_weights,
        "edges": edges,
        "preset": encoder.family,
        "pixels": encoder.pixel_layout,
    }

    @torch.inference_mode()
    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        vision, keys, *_ = encoder(inputs["pixels"], inputs.get("grid_thw"))
        return vision, keys

    return JoinedEncoder(exported.model, spec, details, dict(encoder.open_sizes), run)


def num_kept_of(
    checkpoint: Path, image_size: ImageSize | None, budget: Budget, *, batch: DimRange | None, is_input: bool
) -> tuple[int, Fraction | None]:
    """Returns K of an encoder's graph, and the share of each image that the graph must compute; reads no weights.

    Args:
        checkpoint: Hugging Face checkpoint directory.
        image_size: As in `build_joined_encoder`.
        budget: A count or a share; for an image that is cut into tiles, with the server's meaning (`tokens_per_tile`).
        batch: As in `build_joined_encoder`.
        is_input: Whether the budget is an input.

    Raises:
        EncoderError: As in `build_joined_encoder`.
        ValueError: The budget is all tokens.
    """
    encoder = describe_encoder(checkpoint, _size(checkpoint, image_size), batch)
    kept, share = num_kept(budget, encoder.num_tokens), share_of(budget, encoder.num_tokens, is_input=is_input)
    if encoder.tiles is not None:
        kept = tokens_per_tile(budget, encoder.num_tokens.maximum, encoder.batch.minimum, encoder.tiles.maximum)
    return kept, share


def takes_grid(checkpoint: Path, image_size: ImageSize | None) -> bool:
    """Returns whether the graph has the input `grid_thw`, for images of any size; reads no weights.

    Args:
        checkpoint: Hugging Face checkpoint directory.
        image_size: As in `build_joined_encoder`.
    """
    return describe_encoder(checkpoint, _size(checkpoint, image_size)).takes_grid


def _grid_width(builder: GraphBuilder, encoder: Module) -> int | ir.Value | None:
    """Returns the number of tokens in a row of the image; None if the language model reads no positions."""
    if not encoder.has_positions:
        return None
    if not encoder.takes_grid:
        return encoder.grid[2]
    grid = next(value for value in builder.graph.inputs if value.name == "grid_thw")
    merge_size = encoder.pixel_layout["merge_size"]
    width: ir.Value = builder.op.Div(builder.op.Slice(grid, [2], [3], [1]), merge_size)
    return width


def _size(checkpoint: Path, image_size: ImageSize | None) -> ImageSize:
    size = image_size or native_image_size(checkpoint)
    if size is None:
        raise EncoderError(
            f"{checkpoint} takes images of many sizes: name one, --image-size WIDTHxHEIGHT, "
            "or where the family has it how many tokens they may have, --tokens MIN:MAX"
        )
    return size
