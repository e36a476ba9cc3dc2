from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import Manifest
from mmtok_export.artifact import export_model
from mmtok_export.check import CheckFailedError, check_artifact
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import SelectionSpec


def test_smallest_optimal_and_largest_sizes(exported: Path) -> None:
    cases: list[str] = []
    check = check_artifact(exported, Manifest.load(exported), on_case=cases.append)
    assert cases == [
        f"{sizes}{padded}"
        for sizes in ("1 x 5 tokens, 1 words", "1 x 20 tokens, 3 words", "3 x 40 tokens, 9 words")
        for padded in ("", ", padding and excluded tokens")
    ]
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


@pytest.mark.parametrize(
    ("mask", "operator", "message"),
    [("text_mask", "Or", "coverage differs|pick|total"), ("excluded", "And", "pick|may be picked")],
)
def test_a_mask_that_is_not_read_is_found(
    spec: SelectionSpec, tmp_path: Path, mask: str, operator: str, message: str
) -> None:
    fixed = replace(
        spec, num_tokens=DimRange.fixed(64), num_words=DimRange.fixed(12), batch=DimRange.fixed(1), budget=4
    )
    model = build_selection(fixed)
    (value,) = (each for each in model.graph.inputs if each.name == mask)
    # Everything is a word, or nothing is excluded.
    inverse = ir.node("Not", [value])
    same = ir.node(operator, [value, inverse.outputs[0]])
    inverse.outputs[0].name, same.outputs[0].name = "inverse", "always"
    for node, place in list(value.uses()):
        if node not in (inverse, same):
            node.replace_input_with(place, same.outputs[0])
    model.graph.insert_before(model.graph.node(0), [inverse, same])
    with pytest.raises(CheckFailedError, match=message):
        export_model(model, tmp_path / "a.onnx", "selection", fixed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_engine_is_not_checked_without_a_gpu(exported: Path) -> None:
    check = check_artifact(exported, replace(Manifest.load(exported), format="tensorrt-rtx"))
    assert check.status == "not run"
    assert "no NVIDIA GPU" in check.detail


@pytest.mark.parametrize("has_gpu", [False, True])
def test_an_engine_with_an_encoder_is_not_sent_to_a_gpu(
    exported: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    check = check_artifact(exported, replace(Manifest.load(exported), format="tensorrt-rtx", kind="encoder"))
    assert (check.status, check.detail) == ("not run", "an engine with an encoder is checked by its ONNX file alone")
