"""The selection as an ONNX graph: standard operators, a fixed number of picks, float32 inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import BUDGET_DIMENSION
from mmtok_export.spec import FeatureDtype, SelectionSpec

__all__ = [
    "FEATURE_DTYPES",
    "Features",
    "add_selection",
    "budget_input",
    "build_selection",
    "dim",
    "kept_dim",
    "kept_rows",
]

OPSET = 20
IR_VERSION = 10

# Gains that the lazy form evaluates at once. With ONNX Runtime on 2 CPU cores, smaller values (down to 16) take longer
# at 2,880 tokens, and larger ones (up to 128) at 576.
LAZY_WIDTH = 64
# The first bounds are sums times this factor, which exceeds the rounding of two sums of 80,000 terms in any order
# (80,000 x 2^-24 each).
_ABOVE_ROUNDING = 1.01
# Bound of a column that is picked or excluded. Gains are never negative.
_BARRED = -1.0

FEATURE_DTYPES: dict[FeatureDtype, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True, slots=True)
class Features:
    """The graph's values that the selection reads: those of SelectionProblem, with a batch dimension.

    Args:
        vision: [B, N, D] tokens after the projector.
        keys: [B, N, d] features before the projector.
        text: [B, M, D] embeddings of the guidance words.
        text_mask: [B, M] bool, False for padding.
        excluded: [B, N] bool, True for tokens that must not be picked.
        budget: [B] int64, number of tokens to keep of each image, if the graph takes it; clipped to 1 to K.
    """

    vision: ir.Value
    keys: ir.Value
    text: ir.Value
    text_mask: ir.Value
    excluded: ir.Value
    budget: ir.Value | None = None


def build_selection(spec: SelectionSpec) -> ir.Model:
    """Returns a model of the selection alone, with the inputs of `Features` and the outputs of `add_selection`."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="mmtok_selection")
    builder = GraphBuilder(graph)
    batch, tokens, words = dim(spec.batch, "B"), dim(spec.num_tokens, "N"), dim(spec.num_words, "M")
    dtype = FEATURE_DTYPES[spec.dtype]
    features = Features(
        vision=builder.input("vision", dtype, [batch, tokens, spec.vision_width]),
        keys=builder.input("keys", FEATURE_DTYPES[spec.keys_dtype], [batch, tokens, spec.keys_width]),
        text=builder.input("text", dtype, [batch, words, spec.vision_width]),
        text_mask=builder.input("text_mask", ir.DataType.BOOL, [batch, words]),
        excluded=builder.input("excluded", ir.DataType.BOOL, [batch, tokens]),
        budget=budget_input(builder, spec),
    )
    for name, value in add_selection(builder, features, spec).items():
        builder.add_output(value, name)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="mmtok-deploy")


def budget_input(builder: GraphBuilder, spec: SelectionSpec) -> ir.Value | None:
    """Returns the graph's input `budget`, if it has one."""
    return builder.input("budget", ir.DataType.INT64, [dim(spec.batch, "B")]) if spec.takes_budget else None


def add_selection(builder: GraphBuilder, features: Features, spec: SelectionSpec) -> dict[str, ir.Value]:
    """Appends the selection to the graph of the features, and returns its outputs.

    Returns:
        By name:
        `kept`: [B, K] int64, token indices in raster order; -1 at the end if an image keeps fewer than K, because
            fewer may be picked or its budget is smaller. With an input `budget`, K is the largest of the batch.
        `order`: [B, K] int64, the same indices in the order of the picks. The first j are the selection for a budget
            of j.
        `visual_tokens`: [B, K, D] in the dtype of `vision`, its rows `kept`; zero if `kept` is -1.
        `coverage`: [B, K] float32, f(S) after each pick; it never falls.
        `total`: [B] float32, f of all N tokens; NaN if a feature is not finite (the picks are then meaningless).

    Source: MMTok, arXiv 2508.18264, Algorithms 1 and 2.
    """
    builder.push_module("mmtok")
    op = builder.op
    columns, is_finite = _coverage_columns(op, features, spec.config)
    row_maxima = op.ReduceMax(columns, [1], keepdims=0)
    budgets, num_trips = _budgets(op, features, spec)
    order, coverage = _pick_all(op, columns, op.Mul(row_maxima, 0.0), features.excluded, spec, budgets, num_trips)
    num_kept = [num_trips] if isinstance(num_trips, int) else op.Reshape(num_trips, [1])
    kept = _raster_order(op, order, columns, num_kept)
    outputs = {
        "kept": kept,
        "order": order,
        "visual_tokens": kept_rows(op, features.vision, kept),
        "coverage": coverage,
        "total": op.Where(is_finite, op.ReduceSum(row_maxima, [1], keepdims=0), float("nan")),
    }
    builder.pop_module()
    batch, num_kept = dim(spec.batch, "B"), kept_dim(spec)
    shapes: dict[str, list[int | str]] = {
        "kept": [batch, num_kept],
        "order": [batch, num_kept],
        "visual_tokens": [batch, num_kept, spec.vision_width],
        "coverage": [batch, num_kept],
        "total": [batch],
    }
    for name, value in outputs.items():
        value.shape = ir.Shape(shapes[name])
    return outputs


def dim(size: DimRange, name: str) -> int | str:
    """Returns a dimension of a graph: its size if it is fixed, else its name."""
    return size.minimum if size.is_fixed else name


def kept_dim(spec: SelectionSpec) -> int | str:
    """Returns K as a dimension of a graph: the budget if it is fixed, else its name."""
    return BUDGET_DIMENSION if spec.is_told_at_run_time else spec.budget


def _budgets(op: Any, features: Features, spec: SelectionSpec) -> tuple[ir.Value | None, ir.Value | int]:
    """Returns the budget of each image [B, 1], None if all are equal; and the number of picks to make."""
    if features.budget is not None:
        budgets = op.Unsqueeze(op.Clip(features.budget, 1, spec.budget), [1, 2])
        one_an_image = op.Unsqueeze(op.Cast(op.Slice(features.excluded, [0], [1], [1]), to=ir.DataType.INT64), [2])
        budgets = op.Squeeze(_of_one_shape(op, budgets, one_an_image), [2])
        return budgets, op.ReduceMax(budgets, keepdims=0)
    if spec.share is None:
        return None, spec.budget
    num_tokens = op.Squeeze(op.Shape(features.vision, start=1, end=2))
    whole = op.Div(op.Mul(num_tokens, spec.share.numerator), spec.share.denominator)
    return None, op.Max(whole, 1)


def _coverage_columns(op: Any, features: Features, config: SelectionConfig) -> tuple[ir.Value, ir.Value]:
    """Returns C transposed, [B, N, R] with contiguous columns, and whether each image's features are finite [B]."""
    vision, vision_ok = _unit_rows(op, features.vision)
    keys, keys_ok = _unit_rows(op, features.keys)
    words = op.Unsqueeze(features.text_mask, [2])
    words = op.Greater(_of_one_shape(op, op.Cast(words, to=ir.DataType.FLOAT), _first_of_rows(op, features.text)), 0.5)
    text, text_ok = _unit_rows(op, features.text, words)
    num_words = op.ReduceSum(op.Cast(words, to=ir.DataType.FLOAT), [1], keepdims=1)
    blocks = []
    if config.coverage != "vision":
        rows = op.Softmax(op.Div(op.MatMul(text, _transpose(op, vision)), float(config.tv_temp)), axis=2)
        blocks.append(op.Where(words, op.Div(rows, op.Max(num_words, 1.0)), 0.0))
    if config.coverage != "text":
        rows = op.Softmax(op.Div(op.MatMul(keys, _transpose(op, keys)), float(config.vv_temp)), axis=2)
        num_tokens = op.Cast(op.Shape(features.keys, start=1, end=2), to=ir.DataType.FLOAT)
        # Without words, alpha would only scale all gains. It is left out, so that alpha = 0 still covers the image.
        alpha = 1.0 if config.coverage == "vision" else op.Where(op.Greater(num_words, 0.0), float(config.alpha), 1.0)
        blocks.append(op.Mul(rows, op.Div(alpha, num_tokens)))
    matrix = op.Concat(*blocks, _padding(op, blocks), axis=1)
    # Concatenated, so that a runtime refuses inputs with different batch sizes.
    are_finite = [op.Unsqueeze(op.Cast(each, to=ir.DataType.FLOAT), [1]) for each in (vision_ok, keys_ok, text_ok)]
    is_finite = op.Greater(op.ReduceMin(op.Concat(*are_finite, axis=1), [1], keepdims=0), 0.5)
    return _transpose(op, matrix), is_finite


def _of_one_shape(op: Any, value: ir.Value, other: ir.Value) -> ir.Value:
    """Returns value [B, R, 1], in operations for which a runtime refuses to broadcast another B or R of `other`."""
    return op.Slice(op.Concat(value, other, axis=2), [0], [1], [2])


def _first_of_rows(op: Any, rows: ir.Value) -> ir.Value:
    return op.Cast(op.Slice(rows, [0], [1], [2]), to=ir.DataType.FLOAT)


def _padding(op: Any, blocks: list[ir.Value]) -> ir.Value:
    """Returns rows of zeros [B, 1 to 16, N] that make the length of a column of C a multiple of 16.

    They do not change any gain, but give all columns the same alignment in memory. ONNX Runtime sums by vectors from
    the first aligned element on, so with different alignments, sums of equal columns could differ in the last bit.
    """
    num_rows = op.Shape(blocks[0], start=1, end=2)
    for block in blocks[1:]:
        num_rows = op.Add(num_rows, op.Shape(block, start=1, end=2))
    num_missing = op.Sub(op.Mul(op.Add(op.Div(num_rows, 16), 1), 16), num_rows)
    batch, width = op.Shape(blocks[0], start=0, end=1), op.Shape(blocks[0], start=2, end=3)
    return op.Expand(0.0, op.Concat(batch, num_missing, width, axis=0))


def _unit_rows(op: Any, rows: ir.Value, mask: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
    """Returns rows of length 1, zero if not finite or masked out; and whether all rows in the mask are finite [B]."""
    rows = op.Cast(rows, to=ir.DataType.FLOAT)
    lengths = op.ReduceL2(rows, [2], keepdims=1)
    is_finite = op.Less(lengths, float("inf"))  # False for NaN as well
    counts = is_finite if mask is None else op.And(is_finite, mask)
    # Zero instead of NaN, since comparisons with NaN are false and a loop might not end.
    unit = op.Where(counts, op.Div(rows, op.Max(lengths, 1e-8)), 0.0)
    is_bad = op.Not(is_finite) if mask is None else op.And(op.Not(is_finite), mask)
    num_bad = op.ReduceSum(op.Cast(is_bad, to=ir.DataType.FLOAT), [1, 2], keepdims=0)
    return unit, op.Equal(num_bad, 0.0)


def _transpose(op: Any, matrices: ir.Value) -> ir.Value:
    return op.Transpose(matrices, perm=[0, 2, 1])


def _pick_all(
    op: Any,
    columns: ir.Value,
    covered: ir.Value,
    excluded: ir.Value,
    spec: SelectionSpec,
    budgets: ir.Value | None,
    num_trips: ir.Value | int,
) -> tuple[ir.Value, ir.Value]:
    """Returns order [B, K] and coverage [B, K] of all picks."""
    bounds = op.Mul(op.ReduceSum(columns, [2], keepdims=1), _ABOVE_ROUNDING)
    excluded = op.Unsqueeze(op.Cast(excluded, to=ir.DataType.FLOAT), [2])
    bounds = op.Where(op.Greater(_of_one_shape(op, excluded, bounds), 0.5), _BARRED, bounds)
    bounds = op.Squeeze(bounds, [2])
    indices = op.Range(0, op.Squeeze(op.Shape(columns, start=1, end=2)), 1)
    if spec.form == "unrolled":
        picks, values = [], []
        for _ in range(spec.budget):
            covered, bounds, pick, value = _pick(op, columns, covered, bounds, indices, _all_gains)
            picks.append(op.Unsqueeze(pick, [1]))
            values.append(op.Unsqueeze(value, [1]))
        return op.Concat(*picks, axis=1), op.Concat(*values, axis=1)

    refresh = _lazy_gains(min(LAZY_WIDTH, spec.num_tokens.minimum)) if spec.form == "lazy" else _all_gains

    def body(op: Any, place: ir.Value, __: ir.Value, covered: ir.Value, bounds: ir.Value) -> Sequence[ir.Value]:
        op.builder.push_module("pick")  # names of values are unique, also in subgraphs
        if budgets is not None:
            bounds = op.Where(op.Less(place, budgets), bounds, _BARRED)
        return op.Identity(True), *_pick(op, columns, covered, bounds, indices, refresh)

    floats, ints = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
    state = [("covered", floats, covered.shape), ("bounds", floats, bounds.shape)]
    scanned = [("pick", ints, None), ("value", floats, None)]
    loop = op.builder.subgraph(
        body,
        inputs=[*_loop_inputs(), *(ir.Value(name=name, type=kind, shape=shape) for name, kind, shape in state)],
        outputs=[
            ir.Value(name="continue", type=ir.TensorType(ir.DataType.BOOL)),
            *(ir.Value(name=f"{name}_out", type=kind, shape=shape) for name, kind, shape in [*state, *scanned]),
        ],
        name="pick",
    )
    # Only the trip count ends the loop; with a condition as well, TensorRT would warn.
    *_, picks, values = op.Loop(num_trips, None, covered, bounds, body=loop, _outputs=4)
    return op.Transpose(picks, perm=[1, 0]), op.Transpose(values, perm=[1, 0])


_Refresh = Callable[[Any, ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]
"""(op, columns, covered, bounds, indices) -> [B, N] gains or upper bounds; the largest value is a gain."""


def _pick(
    op: Any, columns: ir.Value, covered: ir.Value, bounds: ir.Value, indices: ir.Value, refresh: _Refresh
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Returns covered, bounds, the pick [B] and the coverage [B] after one pick."""
    gains = refresh(op, columns, covered, bounds, indices)
    best, top = _best(op, gains, indices)
    may_pick = op.GreaterOrEqual(top, 0.0)
    column = op.Squeeze(_rows(op, columns, best), [1])
    covered = op.Where(may_pick, op.Max(covered, column), covered)
    bounds = op.Where(op.Equal(indices, best), _BARRED, gains)
    pick = op.Squeeze(op.Where(may_pick, best, -1), [1])
    return covered, bounds, pick, op.ReduceSum(covered, [1], keepdims=0)


def _best(op: Any, gains: ir.Value, indices: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Returns the lowest index of the largest gain, and the gain, both [B, 1]; for ties, runtimes' ArgMax differs."""
    top = op.ReduceMax(gains, [1], keepdims=1)
    beyond = op.Squeeze(op.Shape(gains, start=1, end=2))
    return op.ReduceMin(op.Where(op.Equal(gains, top), indices, beyond), [1], keepdims=1), top


def _gains(op: Any, columns: ir.Value, covered: ir.Value) -> ir.Value:
    """Returns the gains [B, W] of the columns [B, W, R] over the coverage so far [B, R]."""
    return op.ReduceSum(op.Relu(op.Sub(columns, op.Unsqueeze(covered, [1]))), [2], keepdims=0)


def _all_gains(op: Any, columns: ir.Value, covered: ir.Value, bounds: ir.Value, indices: ir.Value) -> ir.Value:
    return op.Where(op.Less(bounds, 0.0), bounds, _gains(op, columns, covered))


def _lazy_gains(width: int) -> _Refresh:
    """Returns a refresh that evaluates `width` gains at a time until the largest bound is a new gain.

    A gain never rises as more is covered, so an old gain is an upper bound. This is exact in float32, since
    subtraction, maximum and a sum in a fixed order round monotonically, and all gains are sums of the same shape.
    """

    def refresh(op: Any, columns: ir.Value, covered: ir.Value, bounds: ir.Value, indices: ir.Value) -> ir.Value:
        def body(op: Any, _: ir.Value, __: ir.Value, bounds: ir.Value, stale: ir.Value) -> Sequence[ir.Value]:
            op.builder.push_module("evaluate")
            # `stale` has only bounds that are not evaluated yet, so that each round makes progress if columns tie.
            _, candidates = op.TopK(stale, [width], axis=1, _outputs=2)
            old = op.GatherElements(bounds, candidates, axis=1)
            new = op.Where(op.Less(old, 0.0), old, _gains(op, _rows(op, columns, candidates), covered))
            bounds = op.ScatterElements(bounds, candidates, new, axis=1)
            # Numbers, since TensorRT does not scatter booleans.
            stale = op.ScatterElements(stale, candidates, op.Expand(_BARRED, op.Shape(old)), axis=1)
            best, _ = _best(op, bounds, indices)
            is_done = op.Less(op.GatherElements(stale, best, axis=1), 0.0)  # evaluated, or no token is left
            num_left = op.ReduceSum(op.Cast(op.Not(is_done), to=ir.DataType.FLOAT), [0, 1], keepdims=0)
            return op.Greater(num_left, 0.0), bounds, stale

        booleans, floats = ir.TensorType(ir.DataType.BOOL), ir.TensorType(ir.DataType.FLOAT)
        state = [("lazy_bounds", floats), ("stale", floats)]
        loop = op.builder.subgraph(
            body,
            inputs=[
                *_loop_inputs("round", "go_on"),
                *(ir.Value(name=name, type=kind, shape=bounds.shape) for name, kind in state),
            ],
            outputs=[
                ir.Value(name="go_on_out", type=booleans),
                *(ir.Value(name=f"{name}_out", type=kind, shape=bounds.shape) for name, kind in state),
            ],
            name="evaluate",
        )
        gains, _ = op.Loop(None, True, bounds, bounds, body=loop, _outputs=2)
        return gains

    return refresh


def _loop_inputs(iteration: str = "iteration", condition: str = "condition") -> list[ir.Value]:
    return [
        ir.Value(name=iteration, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([])),
        ir.Value(name=condition, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([])),
    ]


def kept_rows(op: Any, rows: ir.Value, kept: ir.Value) -> ir.Value:
    """Returns the rows of [B, N, W] at indices [B, K], as [B, K, W]; zero if the index is -1."""
    # Converted to float32 and back, which is exact, since ONNX Runtime's Where does not support bfloat16.
    found = op.Cast(_rows(op, rows, op.Max(kept, 0)), to=ir.DataType.FLOAT)
    return op.CastLike(op.Where(op.Unsqueeze(op.GreaterOrEqual(kept, 0), [2]), found, 0.0), rows)


def _rows(op: Any, rows: ir.Value, indices: ir.Value) -> ir.Value:
    """Returns the rows of [B, N, W] at indices [B, K], as [B, K, W]."""
    return op.GatherND(rows, op.Unsqueeze(indices, [2]), batch_dims=1)


def _raster_order(op: Any, order: ir.Value, columns: ir.Value, num_kept: ir.Value | list[int]) -> ir.Value:
    """Returns order [B, K] sorted, with every -1 at the end."""
    beyond = op.Squeeze(op.Shape(columns, start=1, end=2))
    places = op.Where(op.Less(order, 0), beyond, order)
    sorted_places, _ = op.TopK(places, num_kept, axis=1, largest=0, sorted=1, _outputs=2)
    return op.Where(op.Equal(sorted_places, beyond), -1, sorted_places)
