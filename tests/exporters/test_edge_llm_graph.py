"""A graph built as TensorRT-Edge-LLM 0.11 exports Qwen2.5-VL's encoder: its inputs, order, opset and plugin."""

from __future__ import annotations

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

from mmtok_deploy import select_tokens
from mmtok_deploy.cli import main
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines import EngineError, check_inputs
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.presets import PRESETS

GROUP, WIDTH, OUT = 4, 8, 16
CPU = torch.device("cpu")
PATCHES, TOKENS = "4*num_groups", "num_groups"
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


def weights() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (12, WIDTH),
        "qkv": (WIDTH, 3 * WIDTH),
        "up": (WIDTH, 20),
        "down": (20, WIDTH),
    }
    shapes |= {"merge": (GROUP * WIDTH, OUT), "norm": (WIDTH,)}
    made: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {
        "groups": np.array([-1, GROUP, WIDTH]),
        "rows": np.array([-1, WIDTH]),
        "merged": np.array([-1, GROUP * WIDTH]),
        "last": np.array([-1]),
        "two": np.array(2, np.float32),
        "eps": np.array(1e-6, np.float32),
    }


def norm(name: str, hidden: str) -> list[Any]:
    """Returns the nodes of an RMSNorm, as PyTorch's exporter writes them."""
    return [
        helper.make_node("Pow", [hidden, "two"], [f"{name}_pow"]),
        helper.make_node("ReduceMean", [f"{name}_pow", "last"], [f"{name}_mean"]),
        helper.make_node("Add", [f"{name}_mean", "eps"], [f"{name}_add"]),
        helper.make_node("Sqrt", [f"{name}_add"], [f"{name}_sqrt"]),
        helper.make_node("Reciprocal", [f"{name}_sqrt"], [f"{name}_rsqrt"]),
        helper.make_node("Mul", [hidden, f"{name}_rsqrt"], [f"{name}_mul"]),
        helper.make_node("Mul", ["norm", f"{name}_mul"], [f"{name}_out"]),
    ]


def block(idx: int, hidden: str) -> list[Any]:
    """Returns the nodes of a block that reads `hidden` and ends in `add_<idx>_1`."""
    return [
        *norm(f"n{idx}_0", hidden),
        helper.make_node("MatMul", [f"n{idx}_0_out", "qkv"], [f"qkv_{idx}"]),
        helper.make_node("Split", [f"qkv_{idx}"], [f"{name}_{idx}" for name in "qkv"], axis=1, num_outputs=3),
        helper.make_node(
            "ViTAttentionPlugin",
            [*(f"{name}_{idx}" for name in "qkv"), "cu_seqlens" if idx else "cu_window_seqlens", "max_seqlen_carrier"],
            [f"attention_{idx}"],
            domain="trt_edgellm",
        ),
        helper.make_node("Add", [hidden, f"attention_{idx}"], [f"add_{idx}_0"]),
        *norm(f"n{idx}_1", f"add_{idx}_0"),
        helper.make_node("MatMul", [f"n{idx}_1_out", "up"], [f"up_{idx}"]),
        helper.make_node("Gelu", [f"up_{idx}"], [f"gelu_{idx}"]),
        helper.make_node("MatMul", [f"gelu_{idx}", "down"], [f"down_{idx}"]),
        helper.make_node("Add", [f"add_{idx}_0", f"down_{idx}"], [f"add_{idx}_1"]),
    ]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, tuple[Any, list[int | str]]] = {
        "input": (FLOAT, [PATCHES, 12]),
        "cu_seqlens": (INT32, ["batch_p1"]),
        "cu_window_seqlens": (INT32, ["num_windows_p1"]),
        "window_index": (INT64, [TOKENS]),
        "reverse_window_index": (INT64, [TOKENS]),
        "max_seqlen_carrier": (INT32, ["max_seqlen"]),
    }
    nodes = [
        helper.make_node("MatMul", ["input", "embed"], ["embedded"]),
        helper.make_node("Reshape", ["embedded", "groups"], ["grouped"]),
        helper.make_node("Unsqueeze", ["window_index", "last"], ["windows"]),
        helper.make_node("GatherND", ["grouped", "windows"], ["in_windows"]),
        helper.make_node("Reshape", ["in_windows", "rows"], ["hidden"]),
        *block(0, "hidden"),
        *block(1, "add_0_1"),
        *norm("merger", "add_1_1"),
        helper.make_node("Reshape", ["merger_out", "merged"], ["view"]),
        helper.make_node("MatMul", ["view", "merge"], ["projected"]),
        helper.make_node("Unsqueeze", ["reverse_window_index", "last"], ["places"]),
        helper.make_node("GatherND", ["projected", "places"], ["output"]),
    ]
    features = ["hidden", "attention_0", "add_0_0", "add_0_1", "attention_1", "add_1_0", "add_1_1"]
    graph = helper.make_graph(
        nodes,
        "visual",
        [helper.make_tensor_value_info(name, *size) for name, size in sizes.items()],
        [helper.make_tensor_value_info("output", FLOAT, [TOKENS, OUT])],
        [numpy_helper.from_array(value, name) for name, value in weights().items()],
        value_info=[helper.make_tensor_value_info(name, FLOAT, [PATCHES, WIDTH]) for name in features]
        + [helper.make_tensor_value_info("projected", FLOAT, [TOKENS, OUT])],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("trt_edgellm", 1)]
    path = tmp_path_factory.mktemp("visual") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path, save_as_external_data=True)
    return path


def without_plugins(file: Path) -> bytes:
    """Returns the graph with each attention replaced by its values, which ONNX Runtime can run, and one output more."""
    model = ir.load(file)
    model.graph.outputs.append(next(node.outputs[0] for node in model.graph if node.outputs[0].name == "add_1_1"))
    for node in [node for node in model.graph if node.domain == "trt_edgellm"]:
        value, output = node.inputs[2], node.outputs[0]
        assert value is not None
        ir.convenience.replace_all_uses_with(output, value)
        model.graph.remove(node, safe=True)
    content: bytes = ir.to_proto(ir.external_data.load_to_model(model)).SerializeToString()
    return content


def test_the_suggested_keys_are_those_before_the_merger(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--vision=output", "--tokens=8:24:64", "--preset=qwen2.5-vl", "--budget=6", "--text-tokens=1:3:9"]
    monkeypatch.chdir(tmp_path)
    given = ["export", "attach", f"--onnx={onnx_file}", *where, "--output=a.onnx"]
    assert main(given) == 2
    commands = re.findall(r"^  mmtok (.*)  # (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert commands[0][1] == f"[{PATCHES}, {WIDTH}]"
    typed = shlex.split(commands[0][0])
    assert typed == [*given, *["--keys", "add_1_1", "--keys-per-token", "4", "--keys-index", "reverse_window_index"]]
    assert main(typed) == 0
    manifest = Manifest.load(tmp_path / "a.onnx")
    assert manifest.check.status == "selection only"
    assert "the CPU has no trt_edgellm.ViTAttentionPlugin" in manifest.check.detail
    # The encoder's sizes that the number of tokens tells.
    assert manifest.dimensions[PATCHES] == DimRange(32, 96, 256)
    assert manifest.dimensions[TOKENS] == DimRange(8, 24, 64)
    # Several images in a run would share one budget.
    assert manifest.input("cu_seqlens").shape == (2,)
    assert "cu_seqlens tells one image: a run of several is refused" in capsys.readouterr().err
    assert main(["export", "triton", "a.onnx", "--repository=models"]) == 2
    assert "a.onnx has operators of trt_edgellm, which Triton's ONNX Runtime cannot run" in capsys.readouterr().err

    session = onnxruntime.InferenceSession(without_plugins(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    order = rng.permutation(20)
    text = rng.standard_normal((1, 3, OUT), dtype=np.float32)
    inputs = {
        "input": rng.standard_normal((20 * GROUP, 12), dtype=np.float32),
        "cu_seqlens": np.array([0, 80], np.int32),
        "cu_window_seqlens": np.array([0, 80], np.int32),
        "max_seqlen_carrier": np.zeros(80, np.int32),
        "window_index": order,
        "reverse_window_index": order.argsort(),
        "text": text,
        "text_mask": np.ones((1, 3), bool),
        "excluded": np.zeros((1, 20), bool),
    }
    two_images = inputs | {"cu_seqlens": np.array([0, 40, 80], np.int32)}
    with pytest.raises(Exception, match="invalid dimensions for input: cu_seqlens"):
        session.run(["kept"], two_images)
    with pytest.raises(EngineError, match=r"cu_seqlens has shape .*got \(3,\): several images would share one budget"):
        check_inputs(manifest, {name: torch.from_numpy(array) for name, array in two_images.items()}, CPU)
    kept, output, rows = session.run(["kept", "output", "add_1_1"], inputs)
    keys = torch.from_numpy(rows).unflatten(0, (-1, GROUP)).mean(dim=1)[order.argsort()]
    config = PRESETS["qwen2.5-vl"].config
    expected = select_tokens(torch.from_numpy(output), keys, torch.from_numpy(text[0]), 6, config=config)
    assert kept[0].tolist() == expected.kept.tolist()
