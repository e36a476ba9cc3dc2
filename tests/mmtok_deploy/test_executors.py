from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtok_deploy import SelectionConfig
from mmtok_deploy.backends.triton_plan import FeatureTypes
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines import EngineError
from mmtok_deploy.executors import EngineExecutor, TorchExecutor, make_executor
from mmtok_export.artifact import export_model
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import SelectionSpec
from tests.exporters.graphs import SMALL_SPEC as SPEC
from tests.mmtok_deploy.problems import assert_greedy, random_problem

CPU = torch.device("cpu")


def export(path: Path, spec: SelectionSpec) -> Path:
    export_model(build_selection(spec), path, "selection", spec)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("executors") / "selection.onnx", SPEC)


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_batch_of_many_sizes(name: str, exported: Path) -> None:
    executor = make_executor(
        "torch" if name == "torch" else "onnxruntime", CPU, SPEC.config, None if name == "torch" else exported
    )
    cases = [random_problem(20), random_problem(8, 0), random_problem(20, 5, [0, 3]), random_problem(20, 1, seed=4)]
    problems = [case.picking(num_picks) for case, num_picks in zip(cases, (5, 3, 4, 5), strict=True)]
    for problem, selection in zip(problems, executor.select(problems), strict=True):
        assert_greedy(selection, problem, SPEC.config)


def test_nothing_to_do(exported: Path) -> None:
    assert make_executor("auto", CPU, SPEC.config, exported).select([]) == []


def test_auto_is_the_file_if_there_is_one(exported: Path) -> None:
    assert isinstance(make_executor("auto", CPU, SPEC.config, exported), EngineExecutor)
    assert isinstance(make_executor("auto", CPU, SPEC.config), TorchExecutor)
    assert make_executor("auto", CPU, SPEC.config, exported).name.startswith("selection.onnx by onnxruntime 1.")


def test_features_that_would_be_rounded_are_refused(tmp_path: Path) -> None:
    half = export(tmp_path / "half.onnx", replace(SPEC, dtype="float16", keys_dtype="float16"))
    executor = make_executor("onnxruntime", CPU, SPEC.config, half)
    with pytest.raises(EngineError, match=r"takes torch\.float16, and torch\.float32 would be rounded"):
        executor.select([random_problem(20).picking(5)])


def test_half_features_in_a_float32_file(exported: Path) -> None:
    case = random_problem(20).to(torch.float16)
    (selection,) = make_executor("onnxruntime", CPU, SPEC.config, exported).select([case.picking(5)])
    assert_greedy(selection, case.picking(5), SPEC.config)


def test_more_picks_than_the_file_makes(exported: Path) -> None:
    executor = make_executor("onnxruntime", CPU, SPEC.config, exported)
    with pytest.raises(EngineError, match="keeps 5 tokens, asked for were 6"):
        executor.select([random_problem(20).picking(6)])


@pytest.mark.parametrize(("num_tokens", "num_words"), [(41, 3), (20, 10)])
def test_sizes_that_the_file_does_not_take(exported: Path, num_tokens: int, num_words: int) -> None:
    executor = make_executor("onnxruntime", CPU, SPEC.config, exported)
    with pytest.raises(EngineError, match="export a file for these sizes"):
        executor.select([random_problem(num_tokens, num_words).picking(5)])


def test_another_constant_is_refused(exported: Path) -> None:
    with pytest.raises(EngineError, match=r"was exported with .*alpha=0\.5.*, the server has .*alpha=0\.7"):
        make_executor("onnxruntime", CPU, SelectionConfig(alpha=0.7), exported)


def test_a_file_for_batches_alone_is_refused(tmp_path: Path) -> None:
    file = export(tmp_path / "batch.onnx", replace(SPEC, batch=DimRange.fixed(2)))
    with pytest.raises(EngineError, match="takes 2 images at a time, never one"):
        make_executor("onnxruntime", CPU, SPEC.config, file)


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_a_file_must_be_named(name: str) -> None:
    with pytest.raises(ValueError, match="runs an exported file: name it"):
        make_executor(name, CPU, SPEC.config)  # type: ignore[arg-type]


def test_torch_runs_no_file(exported: Path) -> None:
    with pytest.raises(ValueError, match="runs no exported file"):
        make_executor("torch", CPU, SPEC.config, exported)


def test_torch_is_not_triton() -> None:
    assert make_executor("torch", torch.device("cuda", 0), SPEC.config).name == "torch (reference) on cuda:0"


@pytest.mark.parametrize("tokens", [(1, 16384), (5, 5)])
def test_made_ready(tokens: tuple[int, int]) -> None:
    executor = make_executor("torch", CPU, SPEC.config)
    assert isinstance(executor, TorchExecutor)
    executor.prepare(FeatureTypes(torch.bfloat16, torch.float32, 32, 24), tokens)
    problem = random_problem(20).picking(5)
    assert_greedy(executor.select([problem])[0], problem, SPEC.config)


def test_triton_says_why_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="runs on CUDA devices, the features are on 'cpu'"):
        make_executor("triton", CPU, SPEC.config)


def test_the_wrong_runtime_for_a_file(exported: Path) -> None:
    with pytest.raises(ValueError, match=r"selection\.onnx is run by onnxruntime, not by tensorrt"):
        make_executor("tensorrt", CPU, SPEC.config, exported)
