"""The selection as an exported ONNX graph, to be timed beside the backends."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmtok_bench.dense_loop import Baseline
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.executors import Executor, make_executor
from mmtok_deploy.problem import SelectionProblem

__all__ = ["EXPORTED_FORMS", "exported_graph"]

EXPORTED_FORMS = {"onnx-lazy": "lazy", "onnx-loop": "loop", "onnx-unrolled": "unrolled"}
"""By the name of what is timed: the form of the graph, run by ONNX Runtime."""


def exported_graph(form: str, device: torch.device) -> Baseline:
    """Returns a selection by graphs of this form, each exported in its first call on problems of its sizes."""
    executors: dict[tuple[int, ...], Executor] = {}

    def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Tensor]:
        first = problems[0]
        key = (len(problems), len(first.vision), len(first.text), first.num_picks)
        if key not in executors:
            executors[key] = _export(form, problems, config, device)
        return [selection.order for selection in executors[key].select(problems)]

    return select


def _export(form: str, problems: Sequence[SelectionProblem], config: SelectionConfig, device: torch.device) -> Executor:
    # Only whoever times an exported graph needs ONNX.
    from mmtok_deploy.dim_range import DimRange
    from mmtok_export.artifact import export_model
    from mmtok_export.selection_graph import FORMS, SelectionSpec, build_selection

    first = problems[0]
    spec = SelectionSpec(
        budget=first.num_picks,
        num_tokens=DimRange.fixed(len(first.vision)),
        num_words=DimRange.fixed(len(first.text)),
        batch=DimRange(1, len(problems), len(problems)),
        vision_width=first.vision.shape[1],
        keys_width=first.keys.shape[1],
        dtype="float32",
        keys_dtype="float32",
        config=config,
        form=next(each for each in FORMS if each == form),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "selection.onnx"
        export_model(build_selection(spec), path, "selection", spec)
        return make_executor("auto", device, config, path)
