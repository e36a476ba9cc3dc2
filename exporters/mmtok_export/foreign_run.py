"""Computes intermediate tensors of an encoder's ONNX graph of another exporter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from mmtok_deploy.engines.onnxruntime import run_on_cpu
from mmtok_export.foreign_graph import find_value

__all__ = ["run_foreign"]


def run_foreign(path: Path, inputs: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Returns tensors of a graph by name, outputs or intermediate ones, from one run on the CPU.

    Args:
        path: An ONNX file.
        inputs: The graph's inputs by name.
        names: Names of the tensors to return.

    Raises:
        ValueError: A tensor does not exist; the message lists the nearest names.
        EngineError: ONNX Runtime cannot run the graph.
    """
    model = ir.load(path)
    known = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(find_value(model.graph, name) for name in names if name not in known)
    return run_on_cpu(ir.to_proto(model).SerializeToString(), path.parent, inputs, list(names))
