"""Attaches the selection to an encoder's ONNX graph that another exporter wrote."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import GraphBuilder
from torch import Tensor

from mmtok_deploy.budget import Budget
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines.onnxruntime import run_on_cpu
from mmtok_export.foreign_graph import (
    GROUPS,
    candidates,
    find_value,
    fix_sizes,
    has_convolution,
    hold_to_one_image,
    index_of,
    is_a_step,
    is_convolved,
    load_foreign,
    num_patches,
    open_dimensions,
    read_foreign,
    shape_text,
    times,
)
from mmtok_export.join import builder_on, join_selection
from mmtok_export.selection_graph import FEATURE_DTYPES
from mmtok_export.spec import FeatureDtype, Form, SelectionSpec, num_kept, share_of
from mmtok_export.whole_graph import Encoder

__all__ = ["Attached", "Attachment", "KeysNotNamedError", "attach_selection"]

_MAX_EXTRA_TOKENS = 16
_OPEN_BATCH = DimRange(1, 1, 8)


@dataclass(frozen=True, slots=True)
class Attachment:
    """The feature tensors of a graph, and the selection to attach.

    Args:
        vision: Name of the tensor of tokens after the projector, [N, D], [B, N, D], or a map [B, D, H, W] or
            [B, H, W, D].
        keys: Name of the tensor of features before the projector: [N * keys_per_token, d], with an optional batch
            dimension before it, or a map. With None, the error lists the candidates.
        keys_per_token: Number of consecutive features that the projector merges into one token; the token's key is
            their mean.
        keys_index: Name of an integer tensor [N], the index of each token's merged feature, if the encoder computes in
            another order than that of its output (Qwen2.5-VL's `reverse_window_index`).
        budget: K, or a share of N.
        num_tokens: N; None reads it from the graph.
        num_words: M.
        config: Temperatures, weight, coverage.
        form: Form of the graph.
        grid_width: Tokens in a row of the image, for the output `positions`.
        takes_budget: Whether the budget is an input; K is then the largest budget.
        is_unpruned_given: Whether all tokens are an output, too.
        batch: B, if it is dynamic in the graph.
        skip_tokens: Number of class and register tokens before the patches; None finds it from the shapes.
        map_layout: "nchw" or "nhwc", if the shape of a map does not show its layout.
        dimensions: Sizes or ranges of other dynamic dimensions of the graph's inputs; one with a single size gets it in
            the graph.
    """

    vision: str
    keys: str | None
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
    batch: DimRange | None = None
    skip_tokens: int | None = None
    map_layout: str | None = None
    dimensions: Mapping[str, DimRange] = field(default_factory=dict)


class KeysNotNamedError(ValueError):
    """No tensor was named that may be the keys.

    Args:
        problem: What was named.
        candidates: Options of `mmtok export attach` that name a candidate -> the candidate's shape.
    """

    def __init__(self, problem: str, candidates: Mapping[tuple[str, ...], str]) -> None:
        self.problem, self.candidates = problem, candidates
        super().__init__(self.text())

    def text(self, command: Sequence[str] = ()) -> str:
        """Returns the message, with a command line for each candidate, or without `command` its options alone."""
        listed = "".join(
            f"\n  {shlex.join([*command, *options])}  # {shape}" for options, shape in self.candidates.items()
        )
        return f"{self.problem}; the nearest that have rows for each token:{listed}" if listed else self.problem


@dataclass(frozen=True, slots=True)
class Attached:
    """An encoder of another exporter with the selection at its end.

    Args:
        model: The model.
        spec: The selection's sizes and constants.
        details: Entries of the manifest.
        dimensions: Ranges of the encoder's dynamic dimensions: those given, and those that follow from the number of
            tokens.
        encoder: Runs the encoder's original file, and makes the features from its tensors with PyTorch.
    """

    model: ir.Model
    spec: SelectionSpec
    details: dict[str, Any]
    dimensions: dict[str, DimRange]
    encoder: Encoder


def attach_selection(onnx_file: Path, attachment: Attachment) -> Attached:
    """Returns the encoder with the selection at its end.

    All outputs of the encoder stay. Its weights are not copied before the model is saved.

    Args:
        onnx_file: The encoder.
        attachment: The feature tensors and the selection.

    Raises:
        ValueError: The file is not an ONNX file, ONNX cannot convert its opset to 18, a tensor does not exist or holds
            no features (the message lists similar ones), or the tensors do not fit together.
        FileNotFoundError: The file does not exist.
    """
    names = [attachment.vision, *([attachment.keys] if attachment.keys else [])]
    _check_attachment(attachment)
    given = dict(attachment.dimensions) | ({} if attachment.batch is None else {"B": attachment.batch})
    model = load_foreign(onnx_file, names, {name: size.minimum for name, size in given.items() if size.is_fixed})
    builder = builder_on(model.graph)
    vision = find_value(model.graph, attachment.vision)
    if attachment.num_tokens is not None and attachment.num_tokens.is_fixed:
        sizes = _dimensions(model, vision, attachment.num_tokens)
        fix_sizes(model, {name: size.minimum for name, size in sizes.items()})
    keys = _keys_of(attachment, model.graph, vision)
    layouts = _layouts(attachment, model.graph, vision, keys)
    assert vision.shape is not None
    one_image = hold_to_one_image(model) if len(vision.shape) == 2 else []
    vision, keys = (_rows(builder, value, layout) for value, layout in zip((vision, keys), layouts, strict=True))
    keys = _merged_keys(builder, model.graph, keys, attachment)
    vision, keys = (_with_num_tokens(builder, value, attachment.num_tokens) for value in (vision, keys))
    spec = _spec(attachment, vision, keys)
    ranges = {name: size for name, size in attachment.dimensions.items() if not size.is_fixed}
    dimensions = _dimensions(model, vision, spec.num_tokens) | ranges
    edges = join_selection(
        builder,
        vision,
        keys,
        spec,
        grid_width=attachment.grid_width,
        is_unpruned_given=attachment.is_unpruned_given,
    )
    source = {"onnx": onnx_file.name, "vision": attachment.vision, "keys": attachment.keys}
    details = {"edges": edges, "attached_to": source, "one_image": one_image}
    encoder = partial(_run_alone, onnx_file, attachment, layouts, spec.keys_dtype)
    return Attached(model, spec, details, dimensions, encoder)


def _run_alone(
    onnx_file: Path,
    attachment: Attachment,
    layouts: tuple[_Layout, _Layout],
    keys_dtype: str,
    inputs: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns vision [B, N, D] and keys [B, N, d], computed by the encoder's original file."""
    model = read_foreign(onnx_file)
    names = [attachment.vision, str(attachment.keys), *([attachment.keys_index] if attachment.keys_index else [])]
    taken = list(dict.fromkeys(name for name in names if name not in inputs))
    graph = ir.convenience.extract(model.graph, [str(value.name) for value in model.graph.inputs], taken)
    alone = ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString()
    found = inputs | run_on_cpu(alone, onnx_file.parent, inputs, taken)
    vision, keys = (
        layout.rows_of(found[name])
        for layout, name in zip(layouts, (attachment.vision, str(attachment.keys)), strict=True)
    )
    if attachment.keys_per_token > 1 or attachment.keys_index is not None:
        keys = keys.unflatten(1, (-1, attachment.keys_per_token)).float().mean(dim=2)
    if attachment.keys_index is not None:
        keys = keys[:, found[attachment.keys_index].long()]
    return vision, keys.to(getattr(torch, keys_dtype))


def _dimensions(model: ir.Model, vision: ir.Value, num_tokens: DimRange) -> dict[str, DimRange]:
    assert vision.shape is not None
    size, found = vision.shape[-2], {}
    for factor in (1, *GROUPS):
        name = times(factor, "" if isinstance(size, int) else str(size.value))
        if name in open_dimensions(model):
            bounds = (num_tokens.minimum, num_tokens.optimum, num_tokens.maximum)
            found[name] = DimRange(*(factor * bound for bound in bounds))
    return found


def _check_attachment(attachment: Attachment) -> None:
    if attachment.keys_per_token < 1:
        raise ValueError(f"--keys-per-token is at least 1, got {attachment.keys_per_token}")
    if attachment.grid_width is not None and attachment.grid_width < 1:
        raise ValueError(f"--grid-width is at least 1, got {attachment.grid_width}")


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of the features in a tensor.

    Args:
        is_map: "nchw" or "nhwc" for a map, "" for rows.
        num_skipped: Number of class and register tokens before the patches.
    """

    is_map: str
    num_skipped: int

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Returns the features [B, N, width] of a tensor."""
        if self.is_map == "nchw":
            tensor = tensor.flatten(2).transpose(1, 2)
        elif self.is_map == "nhwc":
            tensor = tensor.flatten(1, 2)
        return (tensor if tensor.ndim == 3 else tensor[None])[:, self.num_skipped :]


def _layouts(attachment: Attachment, graph: ir.Graph, vision: ir.Value, keys: ir.Value) -> tuple[_Layout, _Layout]:
    """Returns the layouts of vision and keys.

    Class and register tokens are the rows beyond the number of patches of the first convolution, or, without one,
    beyond the rows of the other tensor.

    Raises:
        ValueError: A tensor does not have the rank of features, the layout of a map is ambiguous, or the number of
            patches is dynamic.
    """
    maps = [_map_of(value, attachment.map_layout) for value in (vision, keys)]
    rows = [_num_rows(value, is_map) for value, is_map in zip((vision, keys), maps, strict=True)]
    if attachment.skip_tokens is not None:
        if any(isinstance(each, int) and each <= attachment.skip_tokens for each in rows):
            raise ValueError(
                f"--skip-tokens {attachment.skip_tokens} leaves no tokens: {attachment.vision} has {rows[0]} rows, "
                f"{keys.name} {rows[1]}"
            )
        fewest = min((each for each in rows if isinstance(each, int)), default=0)
        skipped = [
            0 if is_map or (each == fewest and rows[0] != rows[1]) else attachment.skip_tokens
            for each, is_map in zip(rows, maps, strict=True)
        ]
    elif attachment.keys_per_token > 1:
        skipped = [0, 0]
    else:
        known = [each for each in rows if isinstance(each, int)]
        wanted = num_patches(graph)
        if wanted is None and has_convolution(graph) and not all(maps):
            raise ValueError(
                "the number of class and register tokens before the patches is not known, since the size of the images "
                "is dynamic: give it (--skip-tokens 1, or 0 for none), or the size (--dim NAME=SIZE)"
            )
        wanted = wanted or min(known, default=0)
        extra = [each - wanted if isinstance(each, int) else 0 for each in rows]
        skipped = [each if 0 <= each <= _MAX_EXTRA_TOKENS else 0 for each in extra]
    return _Layout(maps[0], skipped[0]), _Layout(maps[1], skipped[1])


def _map_of(value: ir.Value, asked: str | None) -> str:
    if value.shape is None or len(value.shape) not in (2, 3, 4):
        raise ValueError(
            f"{value.name} has to be [N, width], [B, N, width], or a map [B, C, H, W], got {shape_text(value)}"
        )
    if len(value.shape) < 4 or asked is not None:
        return "" if len(value.shape) < 4 else str(asked)
    _, first, middle, last = value.shape
    if is_convolved(value):
        return "nchw"
    if (middle == last) != (first == middle):
        return "nchw" if middle == last else "nhwc"
    raise ValueError(f"{value.name} {shape_text(value)} may have either layout: add --map nchw or --map nhwc")


def _num_rows(value: ir.Value, is_map: str) -> int | str:
    assert value.shape is not None
    if not is_map:
        size = value.shape[-2]
        return size if isinstance(size, int) else str(size)
    sides = value.shape[2:] if is_map == "nchw" else value.shape[1:3]
    known = [each for each in sides if isinstance(each, int)]
    return math.prod(known) if len(known) == len(sides) else "N"


def _rows(builder: GraphBuilder, value: ir.Value, layout: _Layout) -> ir.Value:
    """Returns the value's features [B, N, width]."""
    op = builder.op
    assert value.shape is not None
    batch, width = (value.shape[0] if len(value.shape) > 2 else 1), value.shape[1 if layout.is_map == "nchw" else -1]
    num_rows = _num_rows(value, layout.is_map)
    rows = value
    if layout.is_map == "nchw":
        rows = op.Transpose(op.Reshape(value, [0, 0, -1]), perm=[0, 2, 1])
    elif layout.is_map == "nhwc":
        if not isinstance(width, int):
            raise ValueError(f"the width of {value.name} is not known: {shape_text(value)}")
        rows = op.Reshape(value, [0, -1, width])
    elif len(value.shape) == 2:
        rows = op.Unsqueeze(value, [0])
    if layout.num_skipped:
        rows = op.Slice(rows, [layout.num_skipped], [2**31 - 1], [1])
        num_rows = num_rows - layout.num_skipped if isinstance(num_rows, int) else "N"
    if rows is not value:
        rows.shape, rows.type = ir.Shape([batch, num_rows, width]), value.type
    return rows


def _with_num_tokens(builder: GraphBuilder, value: ir.Value, num_tokens: DimRange | None) -> ir.Value:
    """Returns features [B, N, width] of the asked number of tokens; a run with another number of tokens fails."""
    assert value.shape is not None
    batch, rows, width = value.shape
    if num_tokens is None or not num_tokens.is_fixed or isinstance(rows, int) or not isinstance(width, int):
        return value
    fixed = builder.op.Reshape(value, [0, num_tokens.minimum, width])
    fixed.shape, fixed.type = ir.Shape([batch, num_tokens.minimum, width]), value.type
    return fixed


def _keys_of(attachment: Attachment, graph: ir.Graph, vision: ir.Value) -> ir.Value:
    """Returns the tensor of the keys.

    Raises:
        KeysNotNamedError: `attachment` names no tensor, or a step inside a layer.
    """
    problem = "name the features before the projector, --keys TENSOR"
    if attachment.keys:
        keys = find_value(graph, attachment.keys)
        if not is_a_step(keys):
            return keys
        node = keys.producer()
        problem = f"{keys.name} is a {node.op_type if node else ''}, a step inside a layer, no features"
    num_tokens = num_patches(graph) or _num_rows(vision, _map_of(vision, attachment.map_layout))
    index = attachment.keys_index or index_of(vision)
    found = {}
    for each in candidates(graph, vision, num_tokens):
        if attachment.keys_per_token in (1, each.keys_per_token):
            options = ["--keys", str(each.value.name)]
            if each.keys_per_token > 1:
                options += ["--keys-per-token", str(each.keys_per_token), *(["--keys-index", index] if index else [])]
            found[tuple(options)] = shape_text(each.value)
    raise KeysNotNamedError(problem, found)


def _merged_keys(builder: GraphBuilder, graph: ir.Graph, keys: ir.Value, attachment: Attachment) -> ir.Value:
    """Returns the keys [B, N, d], one for each token, in the order of the tokens."""
    op = builder.op
    if attachment.keys_per_token == 1 and attachment.keys_index is None:
        return keys
    assert keys.shape is not None
    batch, size, width = keys.shape
    if not isinstance(width, int):
        raise ValueError(f"the width of {attachment.keys} is not known: {shape_text(keys)}")
    num_groups: int | str = "N"
    if isinstance(size, int):
        num_groups, left = divmod(size, attachment.keys_per_token)
        if left:
            raise ValueError(f"{attachment.keys} has {size} rows, not a multiple of {attachment.keys_per_token}")
    groups = op.Reshape(keys, [0, -1, attachment.keys_per_token, width])
    # In float32, like the selection.
    merged = op.ReduceMean(op.Cast(groups, to=ir.DataType.FLOAT), [2], keepdims=0)
    if attachment.keys_index is not None:
        index = find_value(graph, attachment.keys_index)
        if index.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or index.shape is None or len(index.shape) != 1:
            raise ValueError(f"--keys-index is a row of integers, got {index.name} {shape_text(index)}, {index.dtype}")
        merged = op.Gather(merged, index, axis=1)
    merged.shape, merged.type = ir.Shape([batch, num_groups, width]), ir.TensorType(ir.DataType.FLOAT)
    return merged


def _spec(attachment: Attachment, vision: ir.Value, keys: ir.Value) -> SelectionSpec:
    assert vision.shape is not None
    assert keys.shape is not None
    batch, tokens, width = vision.shape
    keys_batch, keys_tokens, keys_width = keys.shape
    if not (isinstance(width, int) and isinstance(keys_width, int)):
        raise ValueError(f"the widths must be known: {shape_text(vision)} and {shape_text(keys)}")
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
        raise ValueError(
            f"the features of {attachment.vision} are {shape_text(vision)}: give the number of tokens or its range, "
            "--tokens MIN:MAX"
        )
    if not isinstance(batch, int) and str(batch) != "B":
        raise ValueError(
            f"the batch of {attachment.vision} is not known to be that of the images, got {shape_text(vision)}: fix it "
            "(--batch 1)"
        )
    if isinstance(batch, int) and attachment.batch not in (None, DimRange.fixed(batch)):
        raise ValueError(f"the graph takes {batch} images at a time, not {attachment.batch}: leave --batch out")
    images = DimRange.fixed(batch) if isinstance(batch, int) else attachment.batch or _OPEN_BATCH
    return SelectionSpec(
        budget=num_kept(attachment.budget, num_tokens),
        num_tokens=num_tokens,
        num_words=attachment.num_words,
        batch=images,
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
