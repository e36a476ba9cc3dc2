"""The selection attached to an encoder graph that somebody else exported."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript import GraphBuilder
from torch import Tensor

from mmtok_deploy.budget import Budget
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines.onnxruntime import run_on_cpu
from mmtok_export.budget import num_kept, share_of
from mmtok_export.join import builder_on, join_selection
from mmtok_export.selection_graph import FEATURE_DTYPES, FeatureDtype, Form, SelectionSpec
from mmtok_export.whole_graph import Encoder

__all__ = ["Attached", "Attachment", "attach_selection", "open_dimensions"]

# The operators of the selection take their axes as inputs, which came with this opset.
_MIN_OPSET = 18
_NUM_SUGGESTIONS = 5
_OWN_DIMENSIONS = ("B", "N", "M")


@dataclass(frozen=True, slots=True)
class Attachment:
    """Where in a graph the features are, and what is selected from them.

    Args:
        vision: Tensor of the tokens after the projector, [N, D] or [B, N, D].
        keys: Tensor of the features before it: [N * keys_per_token, d], or with a batch in front.
        keys_per_token: Features that the projector merges into one token: consecutive ones, whose mean is its key.
        keys_index: Integer tensor [N]: which merged feature belongs to each token, where the encoder works in another
            order than it answers in (Qwen2.5-VL's `reverse_window_index`).
        budget: K, or a share of N.
        num_tokens: N; None to read it from the graph.
        num_words: M.
        config: Temperatures, weight, coverage.
        form: How the picks are made.
        grid_width: Tokens in a row of the image, for the output `positions`.
        takes_budget: Whether the budget is an input, and K the largest.
        is_unpruned_given: Whether all tokens are an output too.
    """

    vision: str
    keys: str
    keys_per_token: int
    keys_index: str | None
    budget: Budget
    num_tokens: DimRange | None
    num_words: DimRange
    config: SelectionConfig
    form: Form
    grid_width: int | None = None
    takes_budget: bool = False
    is_unpruned_given: bool = False


@dataclass(frozen=True, slots=True)
class Attached:
    """An encoder of somebody else's with the selection at its end.

    Args:
        model: What was made.
        spec: The selection's sizes.
        details: For the manifest.
        encoder: The encoder's file run by itself, and its tensors made features by PyTorch.
    """

    model: ir.Model
    spec: SelectionSpec
    details: dict[str, Any]
    encoder: Encoder


def attach_selection(onnx_file: Path, attachment: Attachment) -> Attached:
    """Returns the encoder with the selection at its end.

    Everything that the encoder gave before it still gives; its weights stay where they are until the model is saved.

    Args:
        onnx_file: The encoder.
        attachment: Where the features are.

    Raises:
        ValueError: Not an ONNX file, an opset below 18, a tensor that is not there (the message lists the nearest
            names), or tensors that do not belong together.
        FileNotFoundError: The file is not there.
    """
    model = _load(onnx_file)
    _check_attachment(attachment)
    builder = builder_on(model.graph)
    vision = _batched(builder, _find(model.graph, attachment.vision))
    keys = _batched(builder, _merged_keys(builder, model.graph, attachment))
    spec = _spec(attachment, vision, keys)
    edges = join_selection(
        builder,
        vision,
        keys,
        spec,
        grid_width=attachment.grid_width,
        is_unpruned_given=attachment.is_unpruned_given,
    )
    source = {"onnx": onnx_file.name, "vision": attachment.vision, "keys": attachment.keys}
    details = {"edges": edges, "attached_to": source}
    return Attached(model, spec, details, partial(_run_alone, onnx_file, attachment, spec.keys_dtype))


def _run_alone(
    onnx_file: Path, attachment: Attachment, keys_dtype: str, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns vision [B, N, D] and keys [B, N, d] of the encoder's own file."""
    model = ir.load(onnx_file)
    names = [attachment.vision, attachment.keys, *([attachment.keys_index] if attachment.keys_index else [])]
    taken = list(dict.fromkeys(name for name in names if name not in inputs))
    graph = ir.convenience.extract(model.graph, [str(value.name) for value in model.graph.inputs], taken)
    alone = ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString()
    found = inputs | run_on_cpu(alone, onnx_file.parent, inputs, taken)
    vision, keys = (
        tensor if tensor.ndim == 3 else tensor[None] for tensor in (found[attachment.vision], found[attachment.keys])
    )
    if attachment.keys_per_token > 1 or attachment.keys_index is not None:
        keys = keys.unflatten(1, (-1, attachment.keys_per_token)).float().mean(dim=2)
    if attachment.keys_index is not None:
        keys = keys[:, found[attachment.keys_index].long()]
    return vision, keys.to(getattr(torch, keys_dtype))


def open_dimensions(model: ir.Model) -> set[str]:
    """Returns the names of the sizes that a model's inputs leave open, but for the selection's own."""
    names = {size.value for value in model.graph.inputs for size in value.shape or () if not isinstance(size, int)}
    return {str(name) for name in names if name not in _OWN_DIMENSIONS}


def _check_attachment(attachment: Attachment) -> None:
    if attachment.keys_per_token < 1:
        raise ValueError(f"--keys-per-token is at least 1, got {attachment.keys_per_token}")
    if attachment.grid_width is not None and attachment.grid_width < 1:
        raise ValueError(f"--grid-width is at least 1, got {attachment.grid_width}")


def _rename_dimensions(model: ir.Model) -> None:
    """Renames the encoder's open sizes where they are called as the selection's."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None and not value.is_initializer():
            sizes = [size if isinstance(size, int) else size.value for size in value.shape]
            value.shape = ir.Shape([f"encoder_{size}" if size in _OWN_DIMENSIONS else size for size in sizes])


def _load(path: Path) -> ir.Model:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's errors have no common class
        raise ValueError(f"{path} is not an ONNX file: {error}") from error
    opset = model.graph.opset_imports.get("", 0)
    if opset < _MIN_OPSET:
        raise ValueError(f"{path} has opset {opset}, the selection needs {_MIN_OPSET} or later: export it again")
    ShapeInferencePass()(model)
    _rename_dimensions(model)
    return model


def _find(graph: ir.Graph, name: str) -> ir.Value:
    values = {value.name: value for value in graph.inputs if value.name}
    values |= {value.name: value for node in graph for value in node.outputs if value.name}
    if name in values:
        return values[name]
    nearest = difflib.get_close_matches(name, values, n=_NUM_SUGGESTIONS, cutoff=0) or list(values)[-_NUM_SUGGESTIONS:]
    listed = "".join(f"\n  {each} {_shape_text(values[each])}" for each in nearest)
    raise ValueError(f"the graph has no tensor {name!r}; the nearest of its {len(values)}:{listed}")


def _shape_text(value: ir.Value) -> str:
    return "of unknown shape" if value.shape is None else f"[{', '.join(map(str, value.shape))}]"


def _rank(value: ir.Value) -> int:
    if value.shape is None or len(value.shape) not in (2, 3):
        raise ValueError(f"{value.name} is a matrix, or one with a batch in front, got {_shape_text(value)}")
    return len(value.shape)


def _batched(builder: GraphBuilder, value: ir.Value) -> ir.Value:
    if _rank(value) == 3:
        return value
    assert value.shape is not None
    batched = builder.op.Unsqueeze(value, [0])
    batched.shape, batched.type = ir.Shape([1, *value.shape]), value.type
    return batched


def _merged_keys(builder: GraphBuilder, graph: ir.Graph, attachment: Attachment) -> ir.Value:
    """Returns the keys, one a token, in the tokens' order."""
    op = builder.op
    keys = _find(graph, attachment.keys)
    if attachment.keys_per_token == 1 and attachment.keys_index is None:
        return keys
    rank = _rank(keys)
    assert keys.shape is not None
    leading, (size, width) = list(keys.shape[:-2]), keys.shape[-2:]
    if not isinstance(width, int):
        raise ValueError(f"the width of {keys.name} is not known: {_shape_text(keys)}")
    num_groups: int | str = "N"
    if isinstance(size, int):
        num_groups, left = divmod(size, attachment.keys_per_token)
        if left:
            raise ValueError(f"{keys.name} has {size} rows, not a multiple of {attachment.keys_per_token}")
    batch = [0] if rank == 3 else []
    groups = op.Reshape(keys, [*batch, -1, attachment.keys_per_token, width])
    # In float32, as the selection itself is.
    merged = op.ReduceMean(op.Cast(groups, to=ir.DataType.FLOAT), [rank - 1], keepdims=0)
    if attachment.keys_index is not None:
        index = _find(graph, attachment.keys_index)
        if index.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or index.shape is None or len(index.shape) != 1:
            raise ValueError(f"--keys-index is a row of integers, got {index.name} {_shape_text(index)}, {index.dtype}")
        merged = op.Gather(merged, index, axis=rank - 2)
    merged.shape, merged.type = ir.Shape([*leading, num_groups, width]), ir.TensorType(ir.DataType.FLOAT)
    return merged


def _spec(attachment: Attachment, vision: ir.Value, keys: ir.Value) -> SelectionSpec:
    assert vision.shape is not None
    assert keys.shape is not None
    batch, tokens, width = vision.shape
    keys_batch, keys_tokens, keys_width = keys.shape
    if not (isinstance(width, int) and isinstance(keys_width, int)):
        raise ValueError(f"the widths must be known: {_shape_text(vision)} and {_shape_text(keys)}")
    for name, of_vision, of_keys in (("batch", batch, keys_batch), ("tokens", tokens, keys_tokens)):
        if isinstance(of_vision, int) and isinstance(of_keys, int) and of_vision != of_keys:
            raise ValueError(f"one key a token is needed, got {of_vision} and {of_keys} {name}: see --keys-per-token")
    num_tokens = attachment.num_tokens
    if isinstance(tokens, int):
        if num_tokens not in (None, DimRange.fixed(tokens)):
            raise ValueError(f"the graph makes {tokens} tokens, not {num_tokens}: leave --tokens out")
        num_tokens = DimRange.fixed(tokens)
        if attachment.grid_width is not None and tokens % attachment.grid_width:
            raise ValueError(f"{tokens} tokens are no grid {attachment.grid_width} wide: see --grid-width")
    elif attachment.grid_width is not None:
        raise ValueError("--grid-width is for images of one size: leave it out, positions are (0, kept // w, kept % w)")
    if num_tokens is None:
        raise ValueError(f"{vision.name} has {_shape_text(vision)}: give the range of its tokens, --tokens MIN:MAX")
    if not isinstance(batch, int):
        raise ValueError(f"the batch must be fixed, got {_shape_text(vision)}")
    return SelectionSpec(
        budget=num_kept(attachment.budget, num_tokens),
        num_tokens=num_tokens,
        num_words=attachment.num_words,
        batch=DimRange.fixed(batch),
        vision_width=width,
        keys_width=keys_width,
        dtype=_dtype(vision),
        keys_dtype=_dtype(keys),
        config=attachment.config,
        form=attachment.form,
        takes_budget=attachment.takes_budget,
        share=share_of(attachment.budget, num_tokens, is_input=attachment.takes_budget),
    )


def _dtype(value: ir.Value) -> FeatureDtype:
    for name, dtype in FEATURE_DTYPES.items():
        if value.dtype == dtype:
            return name
    raise ValueError(f"{value.name} is one of {', '.join(FEATURE_DTYPES)}, got {value.dtype}")
