"""Reads an encoder's ONNX graph of another exporter: its opset, its dimensions, and tensors that may be features."""

from __future__ import annotations

import difflib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir
import torch
from onnx import external_data_helper
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor

from mmtok_deploy.engines import EngineError
from mmtok_deploy.engines.onnxruntime import run_on_cpu
from mmtok_deploy.manifest import why_no_file
from mmtok_export.pixels import images_of
from mmtok_export.selection_graph import FEATURE_DTYPES

__all__ = [
    "GROUPS",
    "OWN_DIMENSIONS",
    "Candidate",
    "candidates",
    "find_value",
    "fix_sizes",
    "has_convolution",
    "hold_to_one_image",
    "index_of",
    "is_a_step",
    "is_convolved",
    "load_foreign",
    "num_patches",
    "open_dimensions",
    "read_foreign",
    "shape_text",
    "times",
    "unknown_dimension",
]

OWN_DIMENSIONS = ("B", "N", "M", "K")

# The selection's operators take their axes as inputs, which needs this opset and this version of the ONNX format.
_MIN_OPSET, _MIN_IR_VERSION = 18, 8
# Constants that ONNX's converter may read have fewer values.
_MAX_CONSTANT_SIZE = 1024
_NUM_SUGGESTIONS = 5
# Tensors of a smaller width are means or lengths, not features.
_MIN_WIDTH = 2
# The most class and register tokens before the patches; DINOv2 has 1 + 4.
_MAX_EXTRA_TOKENS = 16
# Numbers of features that a projector merges into one token: squares of 2, 3 and 4.
GROUPS = (4, 9, 16)
# Inputs that have the end or the size of each image -> number of their rows for one image.
_SIZES_OF_ONE_IMAGE = {"cu_seqlens": 2, "grid_thw": 1, "image_grid_thw": 1}
# Operators that return each element of their first input in its place.
_ELEMENTWISE = ("Add", "BatchNormalization", "Cast", "Clip", "Gelu", "HardSwish", "Identity", "Mul", "Relu", "Sub")
_SUMS = ("Add", "LayerNormalization", "Sum", "Conv", "SimplifiedLayerNormalization")
# Operators inside a norm, an attention or an activation.
_STEPS = ("Pow", "Sqrt", "Softmax", "Exp", "Erf", "ReduceMean", "Reciprocal", "Sigmoid", "Tanh", "Div", "Sub", "Neg")


def read_foreign(path: Path) -> ir.Model:
    """Returns an ONNX file's model; ONNX's own converter converts it to opset 18 if its opset is older.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not an ONNX file, or ONNX cannot convert its opset.
    """
    if obstacle := why_no_file(path):
        raise FileNotFoundError(obstacle)
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's errors have no common class
        raise ValueError(f"{path} is not an ONNX file: {error}") from error
    if not model.graph.outputs:
        raise ValueError(f"{path} is not an ONNX file: it has no graph with outputs")
    opset = model.graph.opset_imports.get("", 0)
    if opset >= _MIN_OPSET:
        return model
    try:
        model = ir.from_proto(onnx.version_converter.convert_version(_without_weights(path), _MIN_OPSET))
    except Exception as error:  # RuntimeError of C++, protobuf's
        said = " ".join(str(error).split())
        raise ValueError(
            f"{path} has opset {opset}, the selection needs {_MIN_OPSET}, and ONNX does not convert it ({said:.200}): "
            "export it again"
        ) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    model.ir_version = max(model.ir_version or 0, _MIN_IR_VERSION)
    return model


def _without_weights(path: Path) -> onnx.ModelProto:
    """Returns an ONNX file's content without large weights of other files, with which it may have over 2 GiB."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        # The converter reads axes and scales.
        if external_data_helper.uses_external_data(tensor) and math.prod(tensor.dims) < _MAX_CONSTANT_SIZE:
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    return proto


def load_foreign(path: Path, names: list[str], sizes: Mapping[str, int]) -> ir.Model:
    """Returns the model of `read_foreign` with shapes from ONNX's inference, or from a run on a photograph.

    A dynamic batch dimension gets the selection's name B. Other dynamic dimensions are renamed if they have a name of
    the selection.

    Args:
        path: The file.
        names: Names of the tensors whose shapes are needed.
        sizes: Dynamic dimensions of the inputs, by their new names -> the size that they get.

    Raises:
        ValueError: As in `read_foreign`, or no input has a dimension in `sizes`.
    """
    model = read_foreign(path)
    _rename_dimensions(model)
    unknown = sorted(set(sizes) - open_dimensions(model) - {"B"})
    if unknown:
        raise unknown_dimension(unknown[0], open_dimensions(model))
    fix_sizes(model, sizes)
    values = _values(model.graph)
    if any(name in values and not _is_known(values[name]) for name in names) or not set(names) <= values.keys():
        _measure(model, path)
    return model


def open_dimensions(model: ir.Model) -> set[str]:
    """Returns the names of the dynamic dimensions of a model's inputs, except the selection's own."""
    names = {size.value for value in model.graph.inputs for size in value.shape or () if not isinstance(size, int)}
    return {str(name) for name in names if name not in OWN_DIMENSIONS}


def unknown_dimension(name: str, known: Iterable[str]) -> ValueError:
    """Returns the error for a dimension that the inputs do not have."""
    return ValueError(
        f"--dim {name}: the other open dimensions of the encoder are {', '.join(sorted(known)) or 'none'}"
    )


def fix_sizes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Replaces dynamic dimensions of a model's inputs by fixed sizes, and infers the other shapes from them.

    Args:
        model: The model, which is changed.
        sizes: Names of dimensions -> their size; names that no input has are left out.
    """
    for value in _every_value(model):
        if value.shape is not None and not value.is_initializer():
            value.shape = ir.Shape(
                [size if isinstance(size, int) else sizes.get(str(size.value), size) for size in value.shape]
            )
    ShapeInferencePass()(model)
    _rename_dimensions(model)


def find_value(graph: ir.Graph, name: str) -> ir.Value:
    """Returns the tensor with this name.

    Raises:
        ValueError: The tensor does not exist; the message lists the nearest names.
    """
    values = _values(graph)
    if name in values:
        return values[name]
    nearest = difflib.get_close_matches(name, values, n=_NUM_SUGGESTIONS, cutoff=0) or list(values)[-_NUM_SUGGESTIONS:]
    listed = "".join(f"\n  {each} {shape_text(values[each])}" for each in nearest)
    raise ValueError(f"the graph has no tensor {name!r}; the nearest of its {len(values)}:{listed}")


def shape_text(value: ir.Value) -> str:
    """Returns the shape as text for a message."""
    return "of unknown shape" if value.shape is None else f"[{', '.join(map(str, value.shape))}]"


def is_a_step(value: ir.Value) -> bool:
    """Returns whether a tensor is a step inside a norm, an attention or an activation, such as a softmax."""
    node = value.producer()
    if node is None:
        return False
    is_square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    return is_square or (node.domain == "" and node.op_type in _STEPS)


def num_patches(graph: ir.Graph) -> int | None:
    """Returns the number of patches of the first convolution; None if there is none or its output size is dynamic."""
    for node in graph:
        if node.op_type == "Conv" and (shape := node.outputs[0].shape) is not None and len(shape) == 4:
            rows, columns = shape[2], shape[3]
            return rows * columns if isinstance(rows, int) and isinstance(columns, int) else None
    return None


def has_convolution(graph: ir.Graph) -> bool:
    """Returns whether a graph convolves images, as encoders make their patches."""
    weights = (node.inputs[1] for node in graph if node.op_type == "Conv")
    return any(each is not None and each.shape is not None and len(each.shape) == 4 for each in weights)


class Candidate(NamedTuple):
    """A tensor that may be the keys, and the number of its rows for each token."""

    value: ir.Value
    keys_per_token: int


def is_convolved(value: ir.Value) -> bool:
    """Returns whether a tensor is the output of a convolution, or made of one element by element: [B, C, H, W]."""
    node = value.producer()
    while node is not None and node.op_type in _ELEMENTWISE:
        made_of = node.inputs[0]
        node = None if made_of is None else made_of.producer()
    return node is not None and node.op_type in ("Conv", "ConvTranspose")


def candidates(graph: ir.Graph, vision: ir.Value, num_tokens: int | str) -> list[Candidate]:
    """Returns the tensors that may be the keys of `vision`: the nearest before it with rows for each token.

    Ends of layers come before other tensors.

    Args:
        graph: The encoder's graph.
        vision: The vision tokens.
        num_tokens: Number of tokens of an image, or the name of this dimension.
    """
    found = []
    seen, queue = {vision}, deque([vision])
    while queue:
        value = queue.popleft()
        node = value.producer()
        for each in node.inputs if node is not None else ():
            if each is not None and each not in seen and each.producer() is not None:
                seen.add(each)
                queue.append(each)
                group = _rows_a_token(each, num_tokens)
                if each.dtype in FEATURE_DTYPES.values() and group and not is_a_step(each):
                    found.append(Candidate(each, group))

    def is_sum(value: ir.Value) -> bool:
        node = value.producer()
        # An Add of two paths ends a layer; an Add of a bias does not.
        paths = [] if node is None else [each for each in node.inputs if each is not None and each.producer()]
        return node is not None and node.op_type in _SUMS and (node.op_type != "Add" or len(paths) > 1)

    return sorted(found, key=lambda each: not is_sum(each.value))[:_NUM_SUGGESTIONS]


def index_of(vision: ir.Value) -> str | None:
    """Returns the name of the graph's input that reorders the tokens at the encoder's end; None if there is none."""
    node = vision.producer()
    value = node.inputs[1] if node is not None and node.op_type in ("Gather", "GatherND") else None
    while value is not None and (node := value.producer()) is not None:
        value = node.inputs[0] if node.op_type in ("Unsqueeze", "Reshape", "Cast", "Identity") else None
    is_row = value is not None and value.is_graph_input() and value.shape is not None and len(value.shape) == 1
    return str(value.name) if value is not None and is_row else None


def _rows_a_token(value: ir.Value, num_tokens: int | str) -> int:
    """Returns the number of rows of a tensor for each token; 0 if it has no rows for each token."""
    shape = value.shape
    if shape is None or len(shape) not in (2, 3, 4) or not all(isinstance(size, int) for size in shape[1:]):
        return 0
    if len(shape) == 4:
        sizes = [int(size) for size in shape[1:]]  # type: ignore[arg-type]
        return int(num_tokens in (sizes[1] * sizes[2], sizes[0] * sizes[1]))
    rows, width = shape[-2:]
    if isinstance(width, int) and width < _MIN_WIDTH:
        return 0
    if isinstance(rows, int) and isinstance(num_tokens, int):
        if 0 <= rows - num_tokens <= _MAX_EXTRA_TOKENS:
            return 1
        return next((group for group in GROUPS if rows == group * num_tokens), 0)
    return next((group for group in (1, *GROUPS) if str(rows) == times(group, num_tokens)), 0)


def hold_to_one_image(model: ir.Model) -> list[str]:
    """Gives the inputs that separate images the shape for one image; returns the names of these inputs.

    A runtime then refuses several images, from which one selection would be made, since the tokens have no batch
    dimension.

    Args:
        model: An encoder whose tokens have no batch dimension.
    """
    held = {}
    for value in model.graph.inputs:
        size = value.shape[0] if value.shape is not None and len(value.shape) > 0 else None
        if value.name in _SIZES_OF_ONE_IMAGE and size is not None and not isinstance(size, int):
            held[str(value.name)] = (str(size.value), _SIZES_OF_ONE_IMAGE[str(value.name)])
    fixed = dict(held.values())
    for value in _every_value(model):
        if fixed and value.shape is not None and not value.is_initializer():
            value.shape = ir.Shape(
                [size if isinstance(size, int) else fixed.get(str(size.value), size) for size in value.shape]
            )
    return list(held)


def times(factor: int, size: int | str) -> str:
    """Returns the name that PyTorch's exporter gives to a multiple of a dynamic dimension."""
    return str(size) if factor == 1 else f"{factor}*{size}"


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = {str(value.name): value for value in graph.inputs}
    return values | {value.name: value for node in graph for value in node.outputs if value.name}


def _every_value(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _rename_dimensions(model: ir.Model) -> None:
    # The first dimension of an image input is the batch.
    images = [value for value in model.graph.inputs if value.shape is not None and len(value.shape) == 4]
    batch = images[0].shape[0] if images and images[0].shape is not None else None
    batch_name = None if batch is None or isinstance(batch, int) else batch.value
    for value in _every_value(model):
        if value.shape is None or value.is_initializer():
            continue
        sizes: list[int | str | None] = [size if isinstance(size, int) else size.value for size in value.shape]
        value.shape = ir.Shape(
            [
                "B" if size and size == batch_name else f"encoder_{size}" if size in OWN_DIMENSIONS else size
                for size in sizes
            ]
        )


def _is_known(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(size, int) for size in value.shape[1:])


def _measure(model: ir.Model, path: Path) -> None:
    """Sets unknown shapes from a run on a photograph, if only the batch is dynamic and the CPU can run the graph."""
    if len(model.graph.inputs) != 1:
        return
    image = model.graph.inputs[0]
    if not _is_known(image) or image.dtype not in FEATURE_DTYPES.values():
        return
    assert image.shape is not None
    sizes = [int(size) for size in image.shape[1:]]  # type: ignore[arg-type]
    if len(sizes) != 3 or 3 not in (sizes[0], sizes[2]):
        return
    is_first = sizes[0] == 3
    height, width = sizes[1:] if is_first else sizes[:2]
    batch = image.shape[0] if isinstance(image.shape[0], int) else 1
    pixels = images_of((width, height), batch)
    pixels = pixels if is_first else pixels.permute(0, 2, 3, 1).contiguous()
    unknown = [value for node in model.graph for value in node.outputs if value.name and not _is_known(value)]
    shapes = _shapes_of_a_run(model, path, {str(image.name): pixels}, unknown)
    for value in unknown:
        if (shape := shapes.get(str(value.name))) and shape[0] == batch:
            value.shape = ir.Shape(["B" if not isinstance(image.shape[0], int) else batch, *shape[1:]])


def _shapes_of_a_run(
    model: ir.Model, path: Path, inputs: dict[str, Tensor], unknown: list[ir.Value]
) -> Mapping[str, list[int]]:
    floats = [value for value in unknown if value.dtype in FEATURE_DTYPES.values()]
    before = list(model.graph.outputs)
    try:
        model.graph.outputs.extend(value for value in floats if value not in before)
        content = ir.to_proto(model).SerializeToString()
        dtype = next(str(name) for name, each in FEATURE_DTYPES.items() if each == model.graph.inputs[0].dtype)
        typed = {name: tensor.to(getattr(torch, dtype)) for name, tensor in inputs.items()}
        found = run_on_cpu(content, path.parent, typed, [str(value.name) for value in floats])
    except EngineError:
        return {}
    finally:
        del model.graph.outputs[len(before) :]
    return {name: list(tensor.shape) for name, tensor in found.items()}
