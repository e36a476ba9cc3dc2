"""Appends the selection to a graph that computes the features."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from mmtok_export.selection_graph import FEATURE_DTYPES, Features, add_selection, budget_input, dim, kept_dim, kept_rows
from mmtok_export.spec import SelectionSpec

__all__ = ["builder_on", "join_selection"]

_INPUTS = ("text", "text_mask", "excluded", "budget", "tile_grid")
_OUTPUTS = (
    *("kept", "order", "visual_tokens", "coverage", "total", "positions", "deepstack_tokens"),
    *("unpruned_tokens", "unpruned_deepstack_tokens", "joined_tokens"),
)


def builder_on(graph: ir.Graph) -> GraphBuilder:
    """Returns a builder that appends to a finished graph; use only one builder for each graph.

    The builder and other exporters name constants `const_...`, so those of the graph are renamed.
    """
    for value in [value for name, value in graph.initializers.items() if name.startswith("const_")]:
        value.name = f"encoder_{value.name}"
    return GraphBuilder(graph)


def join_selection(
    builder: GraphBuilder,
    vision: ir.Value,
    keys: ir.Value,
    spec: SelectionSpec,
    *,
    levels: ir.Value | None = None,
    grid_width: int | ir.Value | None = None,
    tile_side: int | None = None,
    is_unpruned_given: bool = False,
) -> dict[str, dict[str, str | int]]:
    """Appends the selection to a graph, with its inputs `text`, `text_mask` and `excluded` and its outputs.

    Args:
        builder: Result of `builder_on` for the encoder's graph.
        vision: [B, N, D], the graph's vision tokens.
        keys: [B, N, d], the graph's features before the projector.
        spec: The selection's sizes and constants.
        levels: [B, N, L * D], the features that DeepStack adds to the first L layers at each token. They add the
            output `deepstack_tokens` [B, L, K, D], the features of the kept tokens.
        grid_width: Number of tokens in a row of the image, an integer or a scalar of the graph, for a model with
            M-RoPE. It adds the output `positions` [B, 3, K] int64, each kept token's (t, h, w) in the image's grid, -1
            if `kept` is -1.
        tile_side: Number of tokens on a side of a tile, for a model whose images are B tiles. It adds the input
            `tile_grid` [2] int64, the rows and columns of the crops, and the output `joined_tokens` [B, K, D], the kept
            tokens of all tiles, row by row in the order in which the language model reads them.
        is_unpruned_given: Whether all tokens are an output, too: `unpruned_tokens` [B, N, D], and with `levels`
            `unpruned_deepstack_tokens` [B, L, N, D].

    Returns:
        `name`, `dtype` and `width` of the tensors `vision` and `keys`, from which the check extracts the selection.

    Raises:
        ValueError: The graph already has a tensor with one of these names.
    """
    graph = builder.graph
    taken = {value.name for value in graph.inputs} | {value.name for node in graph for value in node.outputs}
    clashes = [name for name in (*_INPUTS, *_OUTPUTS) if name in taken]
    if clashes:
        raise ValueError(f"the graph has tensors named {', '.join(clashes)} already: rename them")
    batch, words = dim(spec.batch, "B"), dim(spec.num_words, "M")
    # The check finds the tensors by these names.
    vision = builder.op.Identity(vision, _outputs=["mmtok_vision"])
    keys = builder.op.Identity(keys, _outputs=["mmtok_keys"])
    features = Features(
        vision=vision,
        keys=keys,
        text=builder.input("text", vision.dtype, [batch, words, spec.vision_width]),
        text_mask=builder.input("text_mask", ir.DataType.BOOL, [batch, words]),
        excluded=builder.input("excluded", ir.DataType.BOOL, [batch, dim(spec.num_tokens, "N")]),
        budget=budget_input(builder, spec),
    )
    outputs = add_selection(builder, features, spec)
    if grid_width is not None:
        outputs["positions"] = _positions(builder.op, outputs["kept"], grid_width)
        outputs["positions"].shape = ir.Shape([batch, 3, kept_dim(spec)])
    if tile_side is not None:
        tile_grid = builder.input("tile_grid", ir.DataType.INT64, [2])
        outputs["joined_tokens"] = _joined(builder.op, outputs, tile_grid, tile_side)
        outputs["joined_tokens"].shape = ir.Shape([batch, kept_dim(spec), spec.vision_width])
    if is_unpruned_given:
        outputs["unpruned_tokens"] = builder.op.Identity(vision)
        outputs["unpruned_tokens"].shape = ir.Shape([batch, dim(spec.num_tokens, "N"), spec.vision_width])
    if levels is not None:
        planes = {"deepstack_tokens": (kept_rows(builder.op, levels, outputs["kept"]), kept_dim(spec))}
        if is_unpruned_given:
            planes["unpruned_deepstack_tokens"] = (levels, dim(spec.num_tokens, "N"))
        for name, (rows, num_rows) in planes.items():
            outputs[name] = _planes(builder.op, rows, spec.vision_width)
            assert levels.shape is not None
            levels_width = levels.shape[2]
            assert isinstance(levels_width, int)
            num_levels = levels_width // spec.vision_width
            outputs[name].shape = ir.Shape([batch, num_levels, num_rows, spec.vision_width])
    for name, value in outputs.items():
        builder.add_output(value, name)
    names: dict[ir.DataType | None, str] = {dtype: name for name, dtype in FEATURE_DTYPES.items()}
    return {
        "vision": {"name": str(vision.name), "dtype": names[vision.dtype], "width": spec.vision_width},
        "keys": {"name": str(keys.name), "dtype": names[keys.dtype], "width": spec.keys_width},
    }


def _planes(op: Any, rows: ir.Value, width: int) -> ir.Value:
    """Returns the rows [B, K, L * D] in the shape [B, L, K, D]."""
    return op.Transpose(op.Reshape(rows, [0, 0, -1, width]), perm=[0, 2, 1, 3])


def _joined(op: Any, outputs: dict[str, ir.Value], tile_grid: ir.Value, side: int) -> ir.Value:
    """Returns the kept tokens of all tiles [B, K, D]: the base tile's, then the crops' in raster order of their grid.

    If a tile keeps fewer than K tokens, the missing rows are zero and come last. All rows are NaN if the grid has
    another number of crops. To report an error instead, the graph would use the grid as a shape, which TensorRT needs
    on the host.

    Source: Ironieser/MMTok mmtok/llava/llava_arch_mmtok.py, `restore_image_features_sorted`.
    """
    kept, tokens = outputs["kept"], outputs["visual_tokens"]
    columns = op.Slice(tile_grid, [1], [2], [0])
    num_crops = op.Sub(op.Shape(kept, start=0, end=1), 1)
    crop = op.Unsqueeze(op.Range(0, op.Squeeze(num_crops, [0]), 1), [1])
    crops = op.Slice(kept, [1], [2**31 - 1], [0])
    row = op.Add(op.Mul(op.Div(crop, columns), side), op.Div(crops, side))
    column = op.Add(op.Mul(op.Mod(crop, columns), side), op.Mod(crops, side))
    # The tokens of the base tile come first.
    places = op.Add(op.Add(op.Mul(row, op.Mul(columns, side)), column), side**2)
    places = op.Concat(op.Slice(kept, [0], [1], [0]), places, axis=0)
    places = op.Reshape(op.Where(op.GreaterOrEqual(kept, 0), places, 2**31 - 1), [-1])
    _, order = op.TopK(places, op.Shape(places), axis=0, largest=0, sorted=1, _outputs=2)
    rows = op.Reshape(tokens, op.Concat([-1], op.Shape(tokens, start=2, end=3), axis=0))
    joined = op.Reshape(op.Gather(rows, order, axis=0), op.Shape(tokens))
    is_grid = op.Equal(op.ReduceProd(tile_grid, [0], keepdims=1), num_crops)
    # Converted to float32 and back, which is exact, since ONNX Runtime's CPU provider does not add bfloat16.
    zero_or_nan = op.Div(0.0, op.Cast(is_grid, to=ir.DataType.FLOAT))
    return op.CastLike(op.Add(op.Cast(joined, to=ir.DataType.FLOAT), zero_or_nan), tokens)


def _positions(op: Any, kept: ir.Value, grid_width: int | ir.Value) -> ir.Value:
    """Returns (0, row, column) of each kept token, [B, 3, K]; -1 if `kept` is -1.

    Source: Hugging Face transformers 5.19 modeling_qwen2_5_vl.py, get_rope_index: an image is one frame.
    """
    is_kept = op.GreaterOrEqual(kept, 0)
    row, column = op.Div(kept, grid_width), op.Mod(kept, grid_width)
    frame = op.Mul(kept, 0)
    axes = [op.Unsqueeze(op.Where(is_kept, axis, -1), [1]) for axis in (frame, row, column)]
    return op.Concat(*axes, axis=1)
