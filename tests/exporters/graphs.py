"""Selection graphs to test with, and ONNX Runtime to run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from mmtok_deploy import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import Manifest, describe_file
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import FeatureDtype, Form, SelectionSpec
from tests.mmtok_deploy.problems import Problem, random_problem

__all__ = ["SMALL_SPEC", "all_nodes", "batch_of", "relabel", "run", "session_of", "spec_for"]


def spec_for(
    problem: Problem,
    budget: int,
    form: Form = "lazy",
    *,
    config: SelectionConfig = SelectionConfig(),
    num_tokens: DimRange | None = None,
    num_words: DimRange | None = None,
    batch: int | DimRange = 1,
    dtype: FeatureDtype = "float32",
) -> SelectionSpec:
    """Returns a spec of the problem's own sizes, where no others are given."""
    return SelectionSpec(
        budget=budget,
        num_tokens=num_tokens or DimRange.fixed(len(problem)),
        num_words=num_words or DimRange.fixed(max(1, len(problem.text))),
        batch=DimRange.fixed(batch) if isinstance(batch, int) else batch,
        vision_width=problem.vision.shape[1],
        keys_width=problem.keys.shape[1],
        dtype=dtype,
        keys_dtype=dtype,
        config=config,
        form=form,
    )


SMALL_SPEC = spec_for(
    random_problem(20),
    5,
    num_tokens=DimRange(5, 20, 40),
    num_words=DimRange(2, 3, 9),
    batch=DimRange(1, 1, 2),
)
"""A graph of few tokens, whose sizes are open."""


def session_of(spec: SelectionSpec) -> onnxruntime.InferenceSession:
    """Returns the graph, valid in the eyes of ONNX, in ONNX Runtime."""
    model = ir.to_proto(build_selection(spec))
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, values, strict=True)}


def batch_of(problems: Sequence[Problem], num_words: int | None = None, *, in_front: bool = False) -> dict[str, Tensor]:
    """Returns a graph's inputs; padding is NaN, so that a graph that reads it is found out."""
    num_words = num_words or max(1, *(len(problem.text) for problem in problems))
    text = torch.full((len(problems), num_words, problems[0].vision.shape[1]), float("nan"))
    mask = torch.zeros(len(problems), num_words, dtype=torch.bool)
    excluded = torch.zeros(len(problems), len(problems[0]), dtype=torch.bool)
    for row, problem in enumerate(problems):
        start = num_words - len(problem.text) if in_front else 0
        text[row, start : start + len(problem.text)] = problem.text
        mask[row, start : start + len(problem.text)] = True
        if problem.excluded is not None:
            excluded[row] = problem.excluded
    return {
        "vision": torch.stack([problem.vision for problem in problems]),
        "keys": torch.stack([problem.keys for problem in problems]),
        "text": text,
        "text_mask": mask,
        "excluded": excluded,
    }


def all_nodes(graph: Any) -> Iterator[Any]:
    """Yields the nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)


def relabel(file: Path, manifest: Manifest) -> None:
    """Has a file and its manifest say the same, whatever the graph computes."""
    model = ir.load(file)
    model.metadata_props.update(manifest.metadata())
    ir.save(model, file)
    Manifest.path_of(file).write_text(replace(manifest, files=(describe_file(file),)).to_json())
