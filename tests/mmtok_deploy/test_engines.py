from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines import Engine, EngineError, open_engine
from mmtok_deploy.engines.tensorrt import tensorrt_module
from mmtok_deploy.greedy_replay import replay_greedy
from mmtok_deploy.manifest import ArtifactError, Manifest
from mmtok_export.artifact import export_model
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import FeatureDtype
from tests.exporters.graphs import SMALL_SPEC, batch_of, spec_for
from tests.mmtok_deploy.problems import random_problem

CPU = torch.device("cpu")
SPEC = replace(SMALL_SPEC, num_words=DimRange(1, 3, 9), batch=DimRange(1, 1, 3))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "selection.onnx"
    export_model(build_selection(SPEC), path, "selection", SPEC)
    return path


@pytest.fixture(scope="module")
def engine(exported: Path) -> Engine:
    return open_engine(exported, CPU)


def inputs_of(num_tokens: int = 12, batch: int = 1) -> dict[str, Tensor]:
    return batch_of([random_problem(num_tokens)] * batch)


def test_it_runs_and_says_by_what(engine: Engine) -> None:
    outputs = engine.run(inputs_of(batch=2))
    for order in outputs["order"]:
        replay_greedy(random_problem(12).picking(5), SelectionConfig(), order.tolist())
    assert engine.name == f"onnxruntime {onnxruntime.__version__}, CPUExecutionProvider"


def test_memory_is_pytorchs_and_strides_do_not_matter(engine: Engine) -> None:
    inputs = inputs_of()
    spread = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in spread.values())
    for name, tensor in engine.run(spread).items():
        assert torch.equal(tensor, engine.run(inputs)[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_goes_in_and_comes_out(tmp_path: Path, dtype: FeatureDtype) -> None:
    spec = replace(spec_for(random_problem(20), 5), dtype=dtype, keys_dtype=dtype)
    path = tmp_path / "half.onnx"
    export_model(build_selection(spec), path, "selection", spec)
    half = random_problem(20).to(getattr(torch, dtype))
    inputs = inputs_of(20)
    inputs |= {name: inputs[name].to(half.vision.dtype) for name in ("vision", "keys", "text")}
    outputs = open_engine(path, CPU).run(inputs)
    replay_greedy(half.picking(5), SelectionConfig(), outputs["order"][0].tolist())
    assert torch.equal(outputs["visual_tokens"][0], half.vision[outputs["kept"][0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.pop("text"), "the inputs are vision, keys, text, text_mask, excluded, got"),
        (lambda inputs: inputs.update(more=inputs["text"]), "the inputs are"),
        (lambda inputs: inputs.update(keys=inputs["keys"].half()), "keys is float32 on cpu, got float16 on cpu"),
        (lambda inputs: inputs.update(keys=inputs["keys"][0]), r"keys has shape \[B, N, 6\], got \(12, 6\)"),
        (lambda inputs: inputs.update(keys=inputs["keys"][:, :9]), r"keys has shape .*N 5:20:40.*got \(1, 9, 6\)"),
        (lambda inputs: inputs.update(text=inputs["text"][..., :4]), "text has shape"),
    ],
)
def test_inputs_that_are_not_the_files_are_refused(engine: Engine, change: object, message: str) -> None:
    inputs = inputs_of()
    change(inputs)  # type: ignore[operator]
    with pytest.raises(EngineError, match=message):
        engine.run(inputs)


@pytest.mark.parametrize(("num_tokens", "batch"), [(4, 1), (41, 1), (12, 4)])
def test_sizes_outside_the_ranges_are_refused(engine: Engine, num_tokens: int, batch: int) -> None:
    with pytest.raises(EngineError, match="export a file for these sizes"):
        engine.run(inputs_of(num_tokens, batch))


def test_a_provider_that_is_not_there_is_no_silent_cpu(exported: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build of ONNX Runtime has CUDA")
    with pytest.raises(EngineError, match=r"has no CUDAExecutionProvider, only .*export-gpu"):
        open_engine(exported, torch.device("cuda"))


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("CUDAExecutionProvider", "works on cuda tensors, these are on cpu"),
        ("TensorrtExecutionProvider", "works on cuda tensors, these are on cpu"),
        ("MagicExecutionProvider", "is one of CPUExecutionProvider, CUDAExecutionProvider, TensorrtExecutionProvider"),
    ],
)
def test_a_provider_for_another_device_is_refused(exported: Path, provider: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        open_engine(exported, CPU, provider)


def test_a_file_that_changed_is_refused(exported: Path, tmp_path: Path) -> None:
    for path in (exported, Manifest.path_of(exported)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = tmp_path / exported.name
    model = ir.load(changed)
    model.graph.name = "another"
    ir.save(model, changed)
    with pytest.raises(ArtifactError, match="export it again"):
        open_engine(changed, CPU)


class TestTensorRT:
    @pytest.fixture
    def engine_file(self, exported: Path, tmp_path: Path) -> Path:
        """Not an engine: what is tested is refused before it is read."""
        path = tmp_path / "selection.engine"
        path.write_bytes(exported.read_bytes())
        manifest = Manifest.load(exported)
        described = replace(
            manifest,
            format="tensorrt-rtx",
            files=(replace(manifest.files[0], name=path.name),),
            details={"compute_capabilities": ["1.0"]},
        )
        Manifest.path_of(path).write_text(described.to_json())
        return path

    def test_needs_a_gpu(self, engine_file: Path) -> None:
        with pytest.raises(EngineError, match="runs on an NVIDIA GPU, not on cpu"):
            open_engine(engine_file, CPU)

    def test_has_no_providers(self, engine_file: Path) -> None:
        with pytest.raises(EngineError, match="no providers to choose CUDAExecutionProvider from"):
            open_engine(engine_file, CPU, "CUDAExecutionProvider")

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_of_another_compute_capability(self, engine_file: Path) -> None:
        with pytest.raises(EngineError, match=r"built for compute capability 1\.0"):
            open_engine(engine_file, torch.device("cuda"))

    def test_a_library_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(EngineError, match=r"tensorrt is not installed .*pip install 'mmtok-deploy\[tensorrt\]'"):
            tensorrt_module("tensorrt")
