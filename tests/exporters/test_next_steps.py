from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from mmtok_deploy.cli import main
from mmtok_deploy.greedy_replay import replay_greedy
from mmtok_deploy.manifest import Manifest, TensorInfo
from mmtok_export.artifact import export_model
from mmtok_export.next_steps import next_steps, triton_config
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import SelectionSpec
from tests.exporters.graphs import batch_of
from tests.mmtok_deploy.problems import random_problem

NODE_MODULES = Path(__file__).parents[2] / "artifacts" / "node" / "node_modules"


def test_trtexec_is_given_every_open_shape(exported: Path) -> None:
    command = shlex.split(next_steps(exported, Manifest.load(exported))["TensorRT"])
    assert command[:4] == ["trtexec", f"--onnx={exported}", "--stronglyTyped", "--noTF32"]
    assert command[4:7] == [
        "--minShapes=vision:1x5x8,keys:1x5x6,text:1x1x8,text_mask:1x1,excluded:1x5",
        "--optShapes=vision:1x20x8,keys:1x20x6,text:1x3x8,text_mask:1x3,excluded:1x20",
        "--maxShapes=vision:3x40x8,keys:3x40x6,text:3x9x8,text_mask:3x9,excluded:3x40",
    ]
    assert command[7] == f"--saveEngine={exported.with_suffix('.engine')}"


def test_of_fixed_sizes_no_shapes(exported: Path) -> None:
    manifest = Manifest.load(exported)
    fixed = tuple(TensorInfo(each.name, each.dtype, (1,) * len(each.shape)) for each in manifest.inputs)
    assert "Shapes" not in next_steps(exported, replace(manifest, inputs=fixed))["TensorRT"]


def test_each_runtime_by_what_takes_the_file(spec: SelectionSpec, exported: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(exported)
    runtimes = ["ONNX Runtime, Python", "ONNX Runtime, C++", "ONNX Runtime, JavaScript", "OpenVINO", "Triton"]
    engines = ["TensorRT", "TensorRT-RTX", "Jetson"]
    assert list(next_steps(exported, manifest)) == ["SGLang", *engines, *runtimes]
    assert list(next_steps(exported, replace(manifest, kind="encoder"))) == [*engines, *runtimes]
    assert list(next_steps(exported, replace(manifest, format="tensorrt"))) == ["SGLang", "Python"]
    any_size = replace(manifest, kind="encoder", inputs=(*manifest.inputs, TensorInfo("grid_thw", "int64", (1, 3))))
    assert list(next_steps(exported, any_size)) == runtimes
    told = replace(spec, takes_budget=True)
    path = tmp_path / "told.onnx"
    assert list(next_steps(path, export_model(build_selection(told), path, "selection", told))) == [
        *("SGLang", *runtimes)
    ]


def test_a_jetson_has_the_command_of_an_opset_that_its_tensorrt_reads(exported: Path) -> None:
    manifest = Manifest.load(exported)
    steps = next_steps(exported, manifest)
    assert steps["Jetson"] == f"/usr/src/tensorrt/bin/{steps['TensorRT']}"
    for newer in ({"onnx opset": "21"}, {"onnx ir version": "11"}):
        assert "Jetson" not in next_steps(exported, replace(manifest, requires=manifest.requires | newer))


def test_operators_of_a_plugin_are_tensorrts_alone(exported: Path) -> None:
    manifest = Manifest.load(exported)
    steps = next_steps(exported, replace(manifest, requires=manifest.requires | {"operators of trt_edgellm": "1"}))
    assert list(steps) == ["SGLang", "TensorRT", "TensorRT-RTX", "Jetson"]
    assert all("--staticPlugins=LIB.so" in steps[name] for name in ("TensorRT", "Jetson"))
    assert steps["TensorRT-RTX"].endswith("--plugin LIB.so")


def test_the_engine_of_a_file_as_printed(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'mmtok-deploy[tensorrt-rtx]'"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = shlex.split(next_steps(exported, Manifest.load(exported))["TensorRT-RTX"])[1:]
    assert main(arguments) == 0
    engine = exported.with_name("selection.sm86.rtx.engine")
    assert Manifest.load(engine).details["compute_capabilities"] == ["8.6"]
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*arguments, f"--output={exported.with_name('other.engine')}"]) == 0
    assert Manifest.load(exported.with_name("other.engine")).dimensions == Manifest.load(exported).dimensions


def test_a_call_runs_as_printed(exported: Path) -> None:
    call = next_steps(exported, Manifest.load(exported))["ONNX Runtime, Python"]
    session = eval(call, {"ort": onnxruntime})
    assert [each.name for each in session.get_inputs()] == ["vision", "keys", "text", "text_mask", "excluded"]


@pytest.mark.parametrize("package", ["onnxruntime-web", "onnxruntime-node"])
def test_javascript_picks_the_tokens_as_printed(exported: Path, package: str) -> None:
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / package).is_dir():
        pytest.skip(f"Node.js or {package} is not installed: npm install --no-save --prefix artifacts/node {package}")
    manifest, problem = Manifest.load(exported), random_problem(30)
    tensors = {
        each.name: (each.dtype, list(tensor.shape), tensor.flatten().tolist())
        for each, tensor in ((manifest.input(name), tensor) for name, tensor in batch_of([problem]).items())
    }
    call = next_steps(exported, manifest)["ONNX Runtime, JavaScript"]
    script = f"""
        const ort = require("{package}");
        const inputs = {{}};
        for (const [name, [type, shape, values]] of Object.entries({json.dumps(tensors)}))
            inputs[name] = new ort.Tensor(type, new (type === "bool" ? Uint8Array : Float32Array)(values), shape);
        (async () => {{
            const session = {call};
            const outputs = await session.run(inputs);
            console.log(JSON.stringify(Array.from(outputs.order.data, Number)));
        }})();
    """
    environment = {**os.environ, "NODE_PATH": str(NODE_MODULES)}
    ran = subprocess.run([node, "-e", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    replay_greedy(problem.picking(5), manifest.constants, json.loads(ran.stdout))


def test_openvino_picks_the_tokens_as_printed(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # OpenVINO's code generator fails where its copy of oneDNN alone is held to older instructions.
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    manifest = Manifest.load(exported)
    model = eval(next_steps(exported, manifest)["OpenVINO"], {"ov": openvino})
    problem = random_problem(30)
    outputs = model({name: tensor.numpy() for name, tensor in batch_of([problem]).items()})
    replay_greedy(problem.picking(5), manifest.constants, outputs["order"][0].tolist())


def test_a_triton_model(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = shlex.split(next_steps(exported, Manifest.load(exported))["Triton"])
    arguments = [*command[1:-1], str(tmp_path / "models")]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path}/models/selection\n"
    model = tmp_path / "models" / "selection"
    assert sorted(str(path.relative_to(model)) for path in model.rglob("*.*")) == [
        "1/selection.onnx",
        "1/selection.onnx.json",
        "config.pbtxt",
    ]
    Manifest.load(model / "1" / "selection.onnx")
    said = (model / "config.pbtxt").read_text()
    assert 'input { name: "vision" data_type: TYPE_FP32 dims: [ -1, -1, 8 ] }' in said
    assert 'output { name: "kept" data_type: TYPE_INT64 dims: [ -1, 5 ] }' in said
    assert main(arguments) == 2
    assert "is there already: choose another --repository" in capsys.readouterr().err
    assert main([*arguments[:-1], str(exported)]) == 2
    assert "selection.onnx is no folder: choose another --repository" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


def test_the_configuration_is_tritons(exported: Path) -> None:
    config = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    from google.protobuf import text_format  # type: ignore[import-untyped]

    manifest = Manifest.load(exported)
    parsed = text_format.Parse(triton_config(manifest, "selection"), config.ModelConfig())
    assert [each.name for each in parsed.input] == [each.name for each in manifest.inputs]
    assert list(parsed.output[0].dims) == [-1, 5]
    assert [(group.kind, group.count) for group in parsed.instance_group] == [(config.ModelInstanceGroup.KIND_CPU, 1)]


def test_an_encoder_in_bfloat16_needs_a_gpu(exported: Path) -> None:
    manifest = Manifest.load(exported)
    inputs = tuple(replace(each, dtype="bfloat16") for each in manifest.inputs)
    steps = next_steps(exported, replace(manifest, kind="encoder", inputs=inputs))
    assert list(steps) == ["TensorRT", "TensorRT-RTX", "Jetson", "ONNX Runtime, Python"]
    assert "CUDAExecutionProvider" in steps["ONNX Runtime, Python"]


def test_bfloat16_needs_a_newer_triton(tmp_path: Path) -> None:
    path = tmp_path / "selection.onnx"
    command = ["export", "selection", "--budget=4", "--tokens=20", "--dtype=bfloat16", "--skip-check"]
    assert main([*command, f"--output={path}"]) == 0
    steps = next_steps(path, Manifest.load(path))
    assert "Triton" not in steps
    assert steps["Triton 26.03 or later"].startswith("mmtok export triton ")


def test_an_export_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--budget=4", "--tokens=16", "--vision-width=8", "--keys-width=6", f"--output={tmp_path}/a.onnx"]
    assert main(["export", "selection", *arguments]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  next, TensorRT: trtexec --onnx=.*a\.onnx --stronglyTyped --noTF32", said, re.MULTILINE)
    assert re.search(r"^  next, OpenVINO: .*INFERENCE_PRECISION_HINT", said, re.MULTILINE)
    # The constants are those of a preset though none was named.
    assert ir.load(tmp_path / "a.onnx").metadata_props["mmtok.preset"] == "llava-1.5"
