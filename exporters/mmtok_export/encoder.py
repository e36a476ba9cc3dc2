"""A vision encoder and the selection in one graph: pixels in, kept tokens out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.presets import PRESETS
from mmtok_export.encoders import EncoderError, describe_encoder, export_encoder, native_image_size
from mmtok_export.join import builder_on, join_selection
from mmtok_export.selection_graph import FEATURE_DTYPES, FeatureDtype, Form, SelectionSpec
from mmtok_export.whole_graph import Encoder

__all__ = ["JoinedEncoder", "build_joined_encoder", "num_tokens_of"]


@dataclass(frozen=True, slots=True)
class JoinedEncoder:
    """An encoder with its selection, built.

    Args:
        model: Inputs `pixels`, `text`, `text_mask`, `excluded`; outputs those of the selection, for a model with
            M-RoPE `positions`, and for one with DeepStack `deepstack_tokens`.
        spec: The selection's sizes.
        details: For the manifest.
        encoder: The PyTorch module by itself.
    """

    model: ir.Model
    spec: SelectionSpec
    details: dict[str, Any]
    encoder: Encoder


def build_joined_encoder(
    checkpoint: Path,
    image_size: tuple[int, int] | None,
    budget: int,
    *,
    takes_budget: bool = False,
    is_unpruned_given: bool = False,
    num_words: DimRange,
    dtype: FeatureDtype,
    form: Form,
    batch_size: int = 1,
    config: SelectionConfig | None = None,
    random_weights: bool = False,
) -> JoinedEncoder:
    """Returns the checkpoint's vision tower, projector and selection as one ONNX model.

    Args:
        checkpoint: Hugging Face checkpoint directory.
        image_size: (width, height) in pixels; None for a model that has one size.
        budget: K.
        takes_budget: Whether the budget is an input, and K the largest.
        is_unpruned_given: Whether all tokens are an output too.
        num_words: M.
        dtype: The dtype of the weights, the text and the kept tokens.
        form: How the picks are made.
        batch_size: B.
        config: Temperatures, weight, coverage; the family's preset by default.
        random_weights: Take the sizes from config.json and no weights.

    Raises:
        EncoderError: A checkpoint, image size or dtype that no encoder can be exported from.
        ValueError: A budget above the image's number of tokens.
    """
    size = _size(checkpoint, image_size)
    encoder = export_encoder(
        checkpoint, size, dtype=getattr(torch, dtype), batch_size=batch_size, random_weights=random_weights
    )
    graph = encoder.model.graph
    vision, keys, *levels = graph.outputs
    graph.outputs.clear()
    spec = SelectionSpec(
        budget=budget,
        num_tokens=DimRange.fixed(encoder.num_tokens),
        num_words=num_words,
        batch=DimRange.fixed(batch_size),
        vision_width=encoder.vision_width,
        keys_width=encoder.keys_width,
        dtype=dtype,
        keys_dtype=next(name for name, each in FEATURE_DTYPES.items() if each == keys.dtype),
        config=config or PRESETS[encoder.family].config,
        form=form,
        takes_budget=takes_budget,
    )
    grid_width = encoder.grid[2] if encoder.has_positions else None
    edges = join_selection(
        builder_on(graph),
        vision,
        keys,
        spec,
        levels=levels[0] if levels else None,
        grid_width=grid_width,
        is_unpruned_given=is_unpruned_given,
    )
    details = {
        "family": encoder.family,
        "image_size": list(size),
        "grid": list(encoder.grid),
        "random_weights": random_weights,
        "edges": edges,
        "preset": encoder.family,
        "pixels": encoder.module.pixel_layout,
    }

    @torch.inference_mode()
    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        vision, keys, *_ = encoder.module(inputs["pixels"])
        return vision, keys

    return JoinedEncoder(encoder.model, spec, details, run)


def num_tokens_of(checkpoint: Path, image_size: tuple[int, int] | None) -> int:
    """Returns N, the tokens that the checkpoint's encoder makes of one image; no weights are read.

    Args:
        checkpoint: Hugging Face checkpoint directory.
        image_size: (width, height) in pixels; None for a model that has one size.

    Raises:
        EncoderError: As `build_joined_encoder`.
    """
    return math.prod(describe_encoder(checkpoint, _size(checkpoint, image_size)).grid)


def _size(checkpoint: Path, image_size: tuple[int, int] | None) -> tuple[int, int]:
    size = image_size or native_image_size(checkpoint)
    if size is None:
        raise EncoderError(f"{checkpoint} takes images of many sizes: name one, --image-size WIDTHxHEIGHT")
    return size
