"""Exports an encoder from a checkpoint directory as an ONNX model, with PyTorch's own exporter."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import torch
from huggingface_hub.errors import StrictDataclassError

from mmtok_deploy.dim_range import DimRange
from mmtok_export.checkpoint_config import EncoderError, check_any_size, family_of, read_json
from mmtok_export.encoders.base import Encoder, ExportedEncoder, ImageSize
from mmtok_export.encoders.checkpoint import fill_with_noise, load_weights
from mmtok_export.encoders.glm_4_1v import Glm41VEncoder, Glm45VEncoder
from mmtok_export.encoders.internvl3 import InternVL3Encoder
from mmtok_export.encoders.llava_1_5 import Llava15Encoder
from mmtok_export.encoders.llava_next import LlavaNextEncoder
from mmtok_export.encoders.qwen2_5_vl import Qwen25VLEncoder
from mmtok_export.encoders.qwen2_5_vl_grid import Qwen25VLGridEncoder
from mmtok_export.encoders.qwen2_vl import Qwen2VLEncoder
from mmtok_export.encoders.qwen3_5 import Qwen35Encoder, Qwen35MoeEncoder
from mmtok_export.encoders.qwen3_vl import Qwen3VLEncoder, Qwen3VLMoeEncoder

__all__ = ["build_encoder", "describe_encoder", "export_encoder", "native_image_size"]

_ENCODERS: dict[str, type[Encoder]] = {
    each.family: each
    for each in (
        *(Llava15Encoder, LlavaNextEncoder, InternVL3Encoder, Qwen2VLEncoder, Qwen25VLEncoder),
        *(Qwen3VLEncoder, Qwen3VLMoeEncoder, Qwen35Encoder, Qwen35MoeEncoder),
        *(Glm41VEncoder, Glm45VEncoder),
    )
}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Has Gelu and LayerNormalization as single nodes, and is supported by TensorRT and ONNX Runtime.
_OPSET = 20


def export_encoder(
    checkpoint: Path,
    image_size: ImageSize,
    *,
    dtype: torch.dtype = torch.float32,
    batch: DimRange | None = None,
    random_weights: bool = False,
) -> ExportedEncoder:
    """Returns the checkpoint's vision tower and projector as an ONNX model of standard operators.

    The language model is not read.

    Args:
        checkpoint: A Hugging Face checkpoint directory: config.json, and safetensors unless `random_weights`.
        image_size: (width, height) in pixels, after the image processor has scaled the image; or N, for any size.
        dtype: The dtype of the weights and of `vision`: float32, float16 or bfloat16.
        batch: Images in a call; by default the family's: 1, except for tiles.
        random_weights: Whether weights are random and not read from the checkpoint.

    Raises:
        EncoderError: The directory has no configuration, weights or vision tower, or the architecture, image size,
            batch or dtype is not supported.
    """
    encoder = build_encoder(checkpoint, image_size, dtype=dtype, batch=batch, random_weights=random_weights)
    inputs = encoder.example()
    with torch.no_grad():
        program = torch.onnx.export(
            encoder,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            input_names=list(inputs),
            output_names=["vision", "keys", *(["levels"] if encoder.num_levels else [])],
            dynamic_shapes=encoder.dynamic_shapes(),
        )
    assert program is not None
    model = program.model
    _clean(model)
    _name_sizes(model, encoder)
    model.graph.name = f"{encoder.family} encoder"
    return ExportedEncoder(model, encoder)


def build_encoder(
    checkpoint: Path,
    image_size: ImageSize,
    *,
    dtype: torch.dtype = torch.float32,
    batch: DimRange | None = None,
    random_weights: bool = False,
) -> Encoder:
    """Returns the PyTorch module that `export_encoder` exports; arguments and errors are the same."""
    if dtype not in _DTYPES:
        raise EncoderError(f"dtype is one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    encoder = describe_encoder(checkpoint, image_size, batch)
    if random_weights:
        fill_with_noise(encoder, dtype)
    else:
        load_weights(encoder, checkpoint, dtype)
    encoder.prepare()
    return encoder.eval().requires_grad_(False)


def describe_encoder(checkpoint: Path, image_size: ImageSize, batch: DimRange | None = None) -> Encoder:
    """Returns the PyTorch module with its sizes, but without weights; errors are those of `export_encoder`."""
    family = _ENCODERS[family_of(checkpoint)]
    if isinstance(image_size, DimRange):
        check_any_size(family.family)
        # Its windows depend on the grid.
        family = Qwen25VLGridEncoder if family is Qwen25VLEncoder else family
    try:
        config = family.read_config(checkpoint)
        with torch.device("meta"):
            return family(config, image_size, batch or family.native_batch(config))
    except EncoderError:
        raise
    except (StrictDataclassError, LookupError, TypeError, ValueError) as error:
        raise EncoderError(f"{checkpoint / 'config.json'} describes no {family.family} model: {error}") from error


def native_image_size(checkpoint: Path) -> tuple[int, int] | None:
    """Returns the only (width, height) that the checkpoint's encoder accepts; None if it accepts several.

    Raises:
        EncoderError: As in `export_encoder`.
    """
    return _ENCODERS[family_of(checkpoint)].native_image_size(read_json(checkpoint, "config.json"))


def _name_sizes(model: onnx_ir.Model, encoder: Encoder) -> None:
    """Gives dynamic dimensions of inputs and outputs the selection's names for them."""
    model.graph.inputs[0].shape = onnx_ir.Shape(encoder.pixels_shape)
    batch, tokens = (
        size.minimum if size.is_fixed else name for size, name in ((encoder.batch, "B"), (encoder.num_tokens, "N"))
    )
    for value in model.graph.outputs:
        assert value.shape is not None
        value.shape = onnx_ir.Shape([batch, tokens, value.shape[2]])


def _clean(model: onnx_ir.Model) -> None:
    """Removes the exporter's debugging data from all nodes and values: stack traces with this machine's paths."""
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
        for value in [*graph.inputs, *graph.initializers.values(), *(each for node in graph for each in node.outputs)]:
            value.metadata_props.clear()
    model.metadata_props.clear()
