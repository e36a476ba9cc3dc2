"""Reads exported ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from mmtok_deploy.engines import check_graph
from mmtok_deploy.manifest import ArtifactError, Manifest, TensorInfo

__all__ = ["load_graph", "tensor_infos"]

_DTYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
}


def load_graph(file: Path, manifest: Manifest) -> ir.Model:
    """Returns an exported ONNX file's model after comparing it with the manifest; weights are read when needed.

    Raises:
        ArtifactError: The file is not an ONNX file, or not the one that the manifest describes.
    """
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf's and onnx_ir's errors have no common class
        raise ArtifactError(f"{file} is not an ONNX file: {error}") from error
    graph = model.graph
    check_graph(manifest, tensor_infos(graph.inputs), tensor_infos(graph.outputs), model.metadata_props)
    return model


def tensor_infos(values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
    """Returns the manifest's entries for a graph's inputs or outputs.

    Raises:
        ValueError: The type of a tensor is not supported.
    """
    return tuple(
        TensorInfo(
            value.name or "",
            _dtype_name(value),
            tuple(
                size if isinstance(size, int) else size.value or f"{value.name}_{axis}"
                for axis, size in enumerate(value.shape or ())
            ),
        )
        for value in values
    )


def _dtype_name(value: ir.Value) -> str:
    name = None if value.dtype is None else _DTYPE_NAMES.get(value.dtype)
    if name is None:
        raise ValueError(f"{value.name} has the type {value.dtype}: expected one of {', '.join(_DTYPE_NAMES.values())}")
    return name
