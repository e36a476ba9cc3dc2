from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.exporters.artifact import export_model
from mmtok_deploy.exporters.check import CheckFailedError, check_artifact
from mmtok_deploy.exporters.selection_graph import SelectionSpec, build_selection
from mmtok_deploy.manifest import Manifest


def test_smallest_optimal_and_largest_sizes(exported: Path) -> None:
    cases: list[str] = []
    check = check_artifact(exported, Manifest.load(exported), on_case=cases.append)
    assert cases == ["1 x 5 tokens, 1 words", "1 x 20 tokens, 3 words", "3 x 40 tokens, 9 words"]
    assert check.status == "passed"
    assert check.runtime.endswith("CPUExecutionProvider")


@pytest.mark.parametrize(
    ("output", "operator", "message"),
    [
        ("order", "Abs", None),
        ("order", "Neg", "pick 0 is token"),
        ("kept", "Neg", "kept is not order sorted"),
        ("visual_tokens", "Neg", "visual_tokens are not the rows"),
        ("coverage", "Neg", "coverage differs"),
        ("total", "Neg", "total differs"),
    ],
)
def test_a_wrong_output_is_found(
    spec: SelectionSpec, tmp_path: Path, output: str, operator: str, message: str | None
) -> None:
    model = build_selection(replace(spec, num_tokens=DimRange.fixed(20)))
    (place,) = (idx for idx, value in enumerate(model.graph.outputs) if value.name == output)
    value = model.graph.outputs[place]
    value.name = f"{output}_before"
    changed = ir.node(operator, [value])
    changed.outputs[0].name = output
    changed.outputs[0].type, changed.outputs[0].shape = value.type, value.shape
    model.graph.append(changed)
    model.graph.outputs[place] = changed.outputs[0]
    path = tmp_path / "changed.onnx"
    described = replace(spec, num_tokens=DimRange.fixed(20))
    if message is None:  # no change at all: what is found below is found for its reason
        export_model(model, path, "selection", described)
        return
    with pytest.raises(CheckFailedError, match=message):
        export_model(model, path, "selection", described)
    assert not path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_engine_is_not_checked_without_a_gpu(exported: Path) -> None:
    check = check_artifact(exported, replace(Manifest.load(exported), format="tensorrt-rtx"))
    assert check.status == "not run"
    assert "no NVIDIA GPU" in check.detail
