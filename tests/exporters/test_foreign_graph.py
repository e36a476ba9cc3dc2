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

from mmtok_bench.selector.real_features import ENCODERS as ENCODERS_OF_PACKAGES
from mmtok_bench.selector.real_features import Encoder, encoder_file
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
    # Weights in another file stay there while the opset is converted.
    onnx.save(model, path, save_as_external_data=layout == "rows", size_threshold=0, location="old.weights")
    keys = {"rows": "keys", "nchw": "map", "nhwc": "last"}[layout]
    arguments = ["--vision=tokens", f"--keys={keys}", "--preset=llava-1.5", "--budget=4", f"--output={tmp_path}/a.onnx"]
    if layout != "rows":
        arguments.append(f"--map={layout}")
    assert main(["export", "attach", f"--onnx={path}", *arguments]) == 0
    manifest = Manifest.load(tmp_path / "a.onnx")
    assert manifest.check.status == "passed", manifest.check.detail
    assert ir.load(tmp_path / "a.onnx").graph.opset_imports[""] == max(18, opset)


@pytest.mark.parametrize(
    ("given", "batch", "num_tokens"),
    [
        (["--tokens=4:12:64"], DimRange(1, 1, 8), DimRange(4, 12, 64)),
        (["--tokens=12"], DimRange(1, 1, 8), DimRange.fixed(12)),
        (["--dim=height=42", "--dim=width=56"], DimRange(1, 1, 8), DimRange.fixed(12)),
        (["--dim=height=42", "--dim=width=56", "--tokens=12", "--batch=2"], DimRange.fixed(2), DimRange.fixed(12)),
        (
            ["--dim=height=42", "--dim=width=14:56", "--tokens=3:12", "--batch=2"],
            DimRange.fixed(2),
            DimRange(3, 12, 12),
        ),
    ],
)
def test_sizes_of_dynamic_dimensions(tmp_path: Path, given: list[str], batch: DimRange, num_tokens: DimRange) -> None:
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "kernel": rng.standard_normal((8, 3, 14, 14)).astype(np.float32) / 20,
        "pointwise": rng.standard_normal((6, 8, 1, 1)).astype(np.float32),
        "bias": rng.standard_normal((1, 6, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["pixels", "kernel"], ["map"], strides=[14, 14]),
        helper.make_node("Relu", ["map"], ["keys"]),
        helper.make_node("Conv", ["keys", "pointwise"], ["projected"]),
        helper.make_node("Add", ["projected", "bias"], ["tokens"]),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["images", 3, "height", "width"])],
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["images", 6, "rows", "columns"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "a.onnx")
    # The layout of what convolutions make needs no --map.
    arguments = ["--vision=tokens", "--keys=keys", "--preset=llava-1.5", "--budget=3", *given]
    output = tmp_path / "b.onnx"
    assert main(["export", "attach", f"--onnx={tmp_path}/a.onnx", *arguments, f"--output={output}"]) == 0
    manifest = Manifest.load(output)
    assert manifest.check.status in ("passed", "selection only"), manifest.check.detail
    assert (manifest.check.status == "passed") == ("--dim=height=42" in given)
    assert (manifest.dimensions["B"], manifest.dimensions["N"]) == (batch, num_tokens)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])

    def run(side_px: int) -> Any:
        count, images = 3 * side_px // 14, batch.maximum if batch.is_fixed else 2
        inputs = {
            "pixels": rng.standard_normal((images, 3, 42, side_px), dtype=np.float32),
            "text": np.ones((images, 2, 6), np.float32),
            "text_mask": np.ones((images, 2), bool),
            "excluded": np.zeros((images, count), bool),
        }
        return session.run(["kept", "visual_tokens", "tokens"], inputs)

    kept, rows, tokens = run(56)
    every = tokens.reshape(len(tokens), 6, -1).transpose(0, 2, 1)
    for image in range(len(kept)):
        np.testing.assert_array_equal(rows[image], every[image, kept[image]])
    if num_tokens.is_fixed:
        with pytest.raises(Exception, match=r"INVALID_ARGUMENT|cannot be reshaped|RUNTIME_EXCEPTION"):
            run(70)
    else:
        assert run(28)[0].shape == (len(kept), 3)


def test_a_class_token_of_an_image_of_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of patches is not known, and the position embeddings fix the number of rows."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "kernel": rng.standard_normal((8, 3, 14, 14)).astype(np.float32) / 20,
        "rows": np.array([0, 8, -1]),
        "class": rng.standard_normal((1, 1, 8)).astype(np.float32),
        "places": rng.standard_normal((1, 13, 8)).astype(np.float32),
        "mix": rng.standard_normal((8, 8)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["pixels", "kernel"], ["map"], strides=[14, 14]),
        helper.make_node("Reshape", ["map", "rows"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["patches"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["class", "patches"], ["sequence"], axis=1),
        helper.make_node("Add", ["sequence", "places"], ["keys"]),
        helper.make_node("MatMul", ["keys", "mix"], ["tokens"]),
    ]
    graph = helper.make_graph(
        nodes,
        "class",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, "height", "width"])],
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, 13, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "a.onnx")
    command = ["export", "attach", f"--onnx={tmp_path}/a.onnx", "--vision=tokens", "--keys=keys", "--preset=llava-1.5"]
    command += ["--budget=3", f"--output={tmp_path}/b.onnx", "--force"]
    assert main(command) == 2
    assert "give it (--skip-tokens 1, or 0 for none), or the size (--dim NAME=SIZE)" in capsys.readouterr().err
    assert main([*command, "--skip-tokens=13"]) == 2
    assert "--skip-tokens 13 leaves no tokens: tokens has 13 rows, keys 13" in capsys.readouterr().err
    for given, num_tokens in ((["--skip-tokens=1"], 12), (["--dim=height=42", "--dim=width=56"], 12)):
        assert main([*command, *given]) == 0
        assert Manifest.load(tmp_path / "b.onnx").dimensions["N"] == DimRange.fixed(num_tokens)


def test_an_unknown_dimension(encoder: tuple[Path, str, int], capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("3", "3:4"):
        assert attach(encoder[0], "--keys=last_hidden_state", f"--dim=height={size}") == 2
        message = "--dim height: the other open dimensions of the encoder are none"
        assert message in capsys.readouterr().err


def test_a_square_is_no_key(encoder: tuple[Path, str, int], capsys: pytest.CaptureFixture[str]) -> None:
    path, name, _ = encoder
    steps = [node for node in ir.load(path).graph if node.op_type in ("Softmax", "Erf", "Pow", "Sigmoid", "Tanh")]
    if not steps:
        pytest.skip(f"{name} has none")
    assert attach(path, f"--keys={steps[0].outputs[0].name}") == 2
    assert re.search(r"is a \w+, a step inside a layer, no features; the nearest that", capsys.readouterr().err)


@pytest.mark.parametrize("encoder", ENCODERS_OF_PACKAGES, ids=lambda encoder: encoder.package)
def test_a_real_trained_encoder(encoder: Encoder, tmp_path: Path) -> None:
    if importlib.util.find_spec(encoder.file.partition("/")[0]) is None:
        pytest.skip(f"{encoder.package} is not installed")
    arguments = [f"--vision={encoder.tokens}", f"--keys={encoder.keys}", "--preset=llava-1.5", "--budget=32"]
    if encoder.attention is None:
        arguments += [f"--dim=DynamicDimension.{axis}={encoder.image_px}" for axis in (1, 2)]
    command = ["export", "attach", f"--onnx={encoder_file(encoder)}", *arguments, f"--output={tmp_path}/a.onnx"]
    assert main(command) == 0
    manifest = Manifest.load(tmp_path / "a.onnx")
    assert (manifest.check.status, manifest.dimensions["N"]) == ("passed", DimRange.fixed(encoder.num_tokens))
