"""Engines are built here without a GPU, by TensorRT-RTX; they run where there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.engines import open_engine
from mmtok_deploy.engines.tensorrt import tensorrt_module
from mmtok_deploy.greedy_replay import replay_greedy
from mmtok_deploy.manifest import ArtifactError, Manifest, describe_file
from mmtok_export import targets
from mmtok_export.artifact import export_model
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import FORMS, FeatureDtype, Form, SelectionSpec
from mmtok_export.targets import Library, check_targets, choose_library, engine_path
from mmtok_export.tensorrt import EngineBuildError, build_engine
from tests.exporters.graphs import batch_of, relabel
from tests.mmtok_deploy.problems import random_problem

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'mmtok-deploy[tensorrt-rtx]'")

A6000, RTX_4090 = "8.6", "8.9"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_at_hand", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_at_hand", lambda: "9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def build(onnx_file: Path, *targets: str, **options: Any) -> tuple[Path, Manifest]:
    path = engine_path(onnx_file, "tensorrt-rtx", list(targets))
    return path, build_engine(onnx_file, path, "tensorrt-rtx", list(targets), **options)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_form_and_dtype_with_its_ranges(
    spec: SelectionSpec, tmp_path: Path, form: Form, dtype: FeatureDtype
) -> None:
    onnx_file = tmp_path / "selection.onnx"
    chosen = replace(spec, form=form, dtype=dtype)
    export_model(build_selection(chosen), onnx_file, "selection", chosen)
    path, manifest = build(onnx_file, A6000)
    assert path.name == "selection.sm86.rtx.engine"
    assert path.stat().st_size > 10_000
    assert (manifest.format, manifest.form) == ("tensorrt-rtx", form)
    assert manifest.details["compute_capabilities"] == [A6000]
    assert manifest.details["onnx_sha256"] == Manifest.load(onnx_file).files[0].sha256
    assert manifest.dimensions == Manifest.load(onnx_file).dimensions
    assert Manifest.load(path) == manifest
    if not torch.cuda.is_available():
        assert manifest.check.status == "not run"


def test_one_engine_for_several_gpus(exported: Path) -> None:
    path, manifest = build(exported, A6000, RTX_4090)
    assert path.name == "selection.sm86-sm89.rtx.engine"
    assert manifest.details["compute_capabilities"] == [A6000, RTX_4090]


@pytest.mark.usefixtures("hopper")
def test_for_another_gpu_than_the_one_at_hand(exported: Path) -> None:
    path, manifest = build(exported, A6000)
    assert manifest.check.status == "not run"
    assert "built for compute capability 8.6, the GPU at hand has 9.0: run mmtok export check" in manifest.check.detail
    assert Manifest.load(path) == manifest


def test_what_is_there_stays_unless_forced(exported: Path) -> None:
    path, _ = build(exported, A6000)
    with pytest.raises(FileExistsError, match="--force"):
        build(exported, A6000)
    build(exported, A6000, force=True)
    assert Manifest.load(path).format == "tensorrt-rtx"


def test_a_changed_graph_is_not_built(exported: Path) -> None:
    exported.write_bytes(exported.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="export it again"):
        build(exported, A6000)
    assert not list(exported.parent.glob("*.engine*"))


def test_an_open_size_needs_a_range(exported: Path) -> None:
    manifest = Manifest.load(exported)
    relabel(exported, replace(manifest, dimensions={name: manifest.dimensions[name] for name in ("B", "M")}))
    with pytest.raises(ArtifactError, match="has the size N: give its range, --dim N=MIN:MAX"):
        build(exported, A6000)


def test_a_graph_that_tensorrt_does_not_know(exported: Path) -> None:
    model = ir.load(exported)
    node = next(node for node in model.graph if node.op_type == "ReduceL2")
    node.op_type = "NoSuchOperator"
    ir.save(model, exported)
    described = replace(
        Manifest.from_json(Manifest.path_of(exported).read_text()),
        files=(describe_file(exported),),
    )
    Manifest.path_of(exported).write_text(described.to_json())
    with pytest.raises(EngineBuildError, match=r"tensorrt-rtx does not read selection\.onnx: (.|\n)*NoSuchOperator"):
        build(exported, A6000)
    assert not list(exported.parent.glob("*.engine*"))


class TestChoosing:
    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize("targets", [["8.6"], ["8.0", "8.6", "8.9", "12.0", "12.1"]])
    def test_rtx_builds_for_gpus_that_are_not_here(self, targets: list[str]) -> None:
        assert choose_library(targets) == "tensorrt-rtx"

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize("targets", [["9.0"], ["8.6", "9.0"], ["10.0"]])
    def test_datacenter_gpus_need_tensorrt_on_the_machine(self, targets: list[str]) -> None:
        with pytest.raises(ValueError, match=rf"no engines for .*{targets[-1]}.*\[tensorrt\].*CUDA provider"):
            choose_library(targets)

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize("targets", [["7.5"], ["7.5", "8.6"]])
    def test_turing_has_no_float32_products(self, targets: list[str]) -> None:
        with pytest.raises(ValueError, match=r"capability 7\.5 \(for 7\.5 it multiplies no float32 matrices"):
            choose_library(targets)
        with pytest.raises(ValueError, match=r"no float32 matrices"):
            check_targets("tensorrt-rtx", targets, 4)

    @pytest.mark.usefixtures("no_gpu")
    def test_without_a_gpu_a_target_must_be_named(self) -> None:
        with pytest.raises(ValueError, match=r"no NVIDIA GPU here to build for: name one, such as --target 8\.6"):
            choose_library([])

    @pytest.mark.usefixtures("hopper")
    def test_on_hopper(self) -> None:
        assert choose_library([]) == "tensorrt"
        assert choose_library(["9.0"]) == "tensorrt"
        assert choose_library(["8.6"]) == "tensorrt-rtx"
        with pytest.raises(ValueError, match=r"no engines for compute capability 10\.0"):
            choose_library(["10.0"])

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize(("target", "board"), [("8.7", "Orin"), ("11.0", "Thor")])
    def test_for_a_jetson(self, target: str, board: str) -> None:
        with pytest.raises(ValueError, match=f"copy the file to the Jetson {board}, and run there the trtexec command"):
            choose_library([target])

    @pytest.mark.usefixtures("hopper")
    @pytest.mark.parametrize(
        ("library", "targets", "name"),
        [("tensorrt", [], "a.sm90.engine"), ("tensorrt-rtx", ["8.6", "12.0"], "a.sm86-sm120.rtx.engine")],
    )
    def test_names(self, library: Library, targets: list[str], name: str) -> None:
        assert engine_path(Path("a.onnx"), library, targets) == Path(name)


def test_the_targets_are_those_of_the_library() -> None:
    known = {name for name in dir(tensorrt_module("tensorrt-rtx").ComputeCapability) if name.startswith("SM")}
    assert known - {"SM75"} == {f"SM{target.replace('.', '')}" for target in targets.RTX_TARGETS}


def test_why_one_of_its_targets_is_left_out(exported: Path) -> None:
    # Once the library builds for Turing, it belongs to the targets.
    with pytest.raises(EngineBuildError, match="FP32 GEMM is not supported"):
        build(exported, "7.5")
    assert not list(exported.parent.glob("*.engine*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_an_engine_gives_the_references_answer(spec: SelectionSpec, tmp_path: Path, form: Form) -> None:
    library = choose_library([])
    pytest.importorskip({"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}[library])
    onnx_file = tmp_path / "selection.onnx"
    chosen = replace(spec, form=form)
    export_model(build_selection(chosen), onnx_file, "selection", chosen)
    path = engine_path(onnx_file, library, [])
    assert build_engine(onnx_file, path, library, []).check.status == "passed"
    device = torch.device("cuda")
    inputs = {name: tensor.to(device) for name, tensor in batch_of([random_problem(30)]).items()}
    order = open_engine(path, device).run(inputs)["order"][0].tolist()
    replay_greedy(random_problem(30).picking(5), SelectionConfig(), order)


def test_a_plugin_library_that_is_none(exported: Path, tmp_path: Path) -> None:
    library = tmp_path / "plugin.so"
    library.write_bytes(b"no library")
    with pytest.raises(EngineBuildError, match=r"does not load .*plugin\.so: it has no plugins, or lacks a library"):
        build_engine(exported, tmp_path / "a.engine", "tensorrt-rtx", ["8.6"], plugins=[library])
    assert not (tmp_path / "a.engine").exists()
